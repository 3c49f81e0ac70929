"""How often data is read and prepared: caches of data sets, openings of streams, renderings of conversations."""

import json
import shutil
import subprocess
import sys
import time

import pytest
from datasets import IterableDataset
from trl import SFTConfig, SFTTrainer

from wit_trl.conversation.template_memory import TemplateMemory
from wit_trl.conversation.turns import Conversation
from wit_trl.data import preparation

from ..conversation.test_turns import CHATML, CHATML_PROMPT
from ..forks import REPOSITORY, Fork
from ..helpers import make_trainer


def print_first_rows(folder, prompt_loss_weight, max_length):
    trainer = worker_trainer(folder, float(prompt_loss_weight), int(max_length))
    rows = [[row["input_ids"], row["completion_mask"]] for row in trainer.train_dataset.select(range(20))]
    print("RESULT", json.dumps([len(trainer.train_dataset), rows]))


def worker_trainer(folder, prompt_loss_weight, max_length):
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from wit_trl import WITSFTConfig, WITSFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=500, hidden_size=8, num_attention_heads=1, num_hidden_layers=1))
    args = WITSFTConfig(
        f"{folder}/runs",
        prompt_loss_weight=prompt_loss_weight,
        max_length=max_length,
        bf16=False,
        use_cpu=True,
        report_to="none",
        gradient_checkpointing=False,
    )
    data = load_dataset("json", data_files=f"{folder}/data.jsonl", split="train", cache_dir=f"{folder}/cache")
    return WITSFTTrainer(model, args, train_dataset=data, processing_class=tokenizer)


@pytest.fixture
def write(tokenizer, tmp_path):
    """A function that writes this number of rows, and their tokenizer."""
    tokenizer.chat_template = CHATML + CHATML_PROMPT
    tokenizer.save_pretrained(tmp_path)

    def write(count):
        with (tmp_path / "data.jsonl").open("w") as file:
            for number in range(count):
                turns = [("user", f"Is {number} even?"), ("assistant", "Yes." if number % 2 == 0 else "No, it is not.")]
                file.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")

    return write


def result(status, output):
    assert status == 0, output[-2000:]
    return json.loads(output.rpartition("RESULT")[2].splitlines()[0])


def start(folder, prompt_loss_weight=0.2, max_length=64):
    return Fork(print_first_rows, folder, prompt_loss_weight, max_length, HF_DATASETS_DISABLE_PROGRESS_BARS="1")


def prepare(*arguments):
    return result(*start(*arguments).finish())


def prepare_in_another_interpreter(*arguments):
    """As forks of one process do not: with another seed of the hashes, and so with sets in another order."""
    code = "import sys; from tests.data.test_preparation_cache import *; print_first_rows(*sys.argv[1:])"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    return result(process.returncode, process.stdout or process.stderr)


def cached(tmp_path):
    return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("cache-*.arrow")}


def test_second_start_reads_all_from_the_cache_whatever_the_weights(write, tmp_path):
    write(30)
    first, files = prepare_in_another_interpreter(tmp_path, 0.2, 64), cached(tmp_path)
    assert files
    assert prepare(tmp_path, 0.0) == first
    assert cached(tmp_path) == files
    cut = prepare(tmp_path, 0.2, 50)
    assert max(len(input_ids) for input_ids, _ in cut[1]) == 50 < max(len(input_ids) for input_ids, _ in first[1])
    assert len(cached(tmp_path)) == len(files) + 1


def test_kill_while_rows_are_prepared_leaves_no_half_of_them(write, tmp_path):
    write(8_000)
    fork = start(tmp_path)
    deadline = time.monotonic() + 100
    # The rows go into a file of another name until they are complete
    while not [path for path in (tmp_path / "cache").rglob("tmp*") if path.is_file() and path.stat().st_size]:
        assert fork.process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    fork.process.kill()
    fork.finish()
    assert not cached(tmp_path)
    count, rows = prepare(tmp_path)
    assert count == 8_000
    assert len(cached(tmp_path)) == 1
    assert len({tuple(input_ids) for input_ids, _ in rows}) == 20
    assert all(sum(mask) > 0 for _, mask in rows)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("kind", ["text", "messages"])
def test_stream_is_read_as_often_as_by_trl(kind, shuffle, make_model, tokenizer, config_kwargs):
    reads = []
    turns = [{"role": "user", "content": "Sum?"}, {"role": "assistant", "content": "Three."}]
    row = {"prompt": "Sum?", "completion": " Three."} if kind == "text" else {"messages": turns}

    def rows():
        for number in range(40):
            reads.append(number)
            yield row

    config_kwargs |= {"shuffle_dataset": shuffle}
    stream = IterableDataset.from_generator(rows)
    counts = []
    for make in (
        lambda: SFTTrainer(make_model(), SFTConfig(**config_kwargs), processing_class=tokenizer, train_dataset=stream),
        lambda: make_trainer(make_model, tokenizer, None, config_kwargs, train_dataset=stream),
    ):
        reads.clear()
        trainer = make()
        assert len(list(trainer.train_dataset)) == 40
        counts.append(len(reads))
    assert counts[1] <= counts[0] + 1


@pytest.mark.parametrize("turns", [8, 64])
def test_conversation_costs_one_rendering_once_the_template_is_known(turns, tokenizer, monkeypatch):
    memory = TemplateMemory(tokenizer)
    messages = [{"role": ("user", "assistant")[n % 2], "content": f"This is {n}."} for n in range(turns)]
    renderings = []
    render = Conversation.render
    monkeypatch.setattr(Conversation, "render", lambda *args, **kw: renderings.append(1) or render(*args, **kw))
    template = CHATML + CHATML_PROMPT
    masks = []
    for _ in range(2):
        renderings.clear()
        conversation = Conversation(messages, tokenizer, template, {}, memory)
        masks.append(conversation.assistant_masks(conversation.tokenize()["input_ids"]))
    assert len(renderings) == 1
    alone = Conversation(messages, tokenizer, template, {})
    assert masks == [alone.assistant_masks(alone.tokenize()["input_ids"])] * 2


@pytest.mark.parametrize("name", ["data/new.py", "conversation/deeper/new.py", "weights.py", "data/collator.py"])
def test_key_of_the_cache_changes_with_every_module_that_decides_about_tokens(name, tmp_path, monkeypatch):
    package = tmp_path / "wit_trl"
    shutil.copytree(preparation._PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    key = preparation._versions.__wrapped__()
    monkeypatch.setattr(preparation, "_PACKAGE", package)
    assert preparation._versions.__wrapped__() == key
    (package / name).parent.mkdir(exist_ok=True)
    with (package / name).open("a") as module:
        module.write("NEW = 1\n")
    assert preparation._versions.__wrapped__() != key
