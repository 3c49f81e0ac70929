"""One trial of a sweep: what it measures, against plain loops."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from datasets import Dataset, concatenate_datasets, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DatasetMixtureConfig, ScriptArguments
from trl.scripts.utils import DatasetConfig

from wit_trl.cli.loading import load_data
from wit_trl.sweep import trial, worker
from wit_trl.sweep.retention import GENERAL_PROMPTS, answers, general_prompts, prompts_of
from wit_trl.sweep.trial import digest_of_rows

from ..helpers import make_trainer
from ..reference import region_sums


@pytest.fixture
def run(make_model, tokenizer, prompt_completion, tmp_path):
    """A function that runs a trial in this process and returns what it wrote."""
    make_model(tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    prompt_completion.select(range(8)).to_json(tmp_path / "data" / "train.jsonl")
    prompt_completion.select(range(8, 14)).to_json(tmp_path / "data" / "test.jsonl")
    prompt_completion.select(range(4)).to_json(tmp_path / "other.jsonl")

    def run(name, **flags):
        flags = {
            "model_name_or_path": tmp_path / "model",
            "dataset_name": tmp_path / "data",
            "output_dir": tmp_path / name,
            "eval_dataset": f"other={tmp_path / 'other.jsonl'}",
            "retention_prompts": 2,
            "max_steps": 1 if name.endswith("base") else 3,
            "learning_rate": 0 if name.endswith("base") else 1e-2,
            "max_length": 64,
            "eval_strategy": "epoch",
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "disable_tqdm": True,
            **flags,
        }
        trial.main([word for flag, value in flags.items() for word in (f"--{flag}", str(value))])
        return json.loads((tmp_path / name / "result.json").read_text())

    return run


def greedy(model, tokenizer, prompt, count):
    """A prompt with the most likely token after it, again and again, until the text ends."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count and tokens[len(prompt) :][-1:] != [tokenizer.eos_token_id]:
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_base_model_is_measured_as_it_is_and_its_answers_are_greedy(run, make_model, tokenizer, tmp_path):
    result = run("base")
    model = make_model(tie_word_embeddings=True).eval()
    assert result["metrics"]["eval_retention_loss"] == 0
    rows = Dataset.from_parquet(str(tmp_path / "base" / "answers.parquet"))
    assert len(rows) == 2 + len(GENERAL_PROMPTS)
    for row in rows.select([0, 1, 2, 17]):
        length = row["completion_mask"].index(1)
        assert row["completion_mask"] == [0] * length + [1] * (len(row["input_ids"]) - length)
        assert row["input_ids"][length:] == greedy(model, tokenizer, row["input_ids"][:length], 64)
    data = Dataset.from_json(str(tmp_path / "data" / "test.jsonl"))
    assert tokenizer.decode(rows[0]["input_ids"][: rows[0]["completion_mask"].index(1)]) == data[0]["prompt"]
    assert result["prompts"] == data["prompt"][:3]
    assert not (tmp_path / "base" / "model").exists()


def test_what_a_trial_measures_is_what_plain_loops_find_in_its_model(run, make_model, tmp_path):
    run("base")
    (tmp_path / "length.py").write_text("def steps(trainer):\n    return 2 * trainer.state.global_step\n")
    function = f"{tmp_path / 'length.py'}:steps"
    questions = [("What is a mean?", [" a number", " data"], 0), ("What is data?", [" a", " text of"], 1)]
    rows = [dict(zip(("question", "choices", "label"), row, strict=True)) for row in questions]
    Dataset.from_list(rows).to_json(tmp_path / "questions.jsonl")
    task = {
        "task": "questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task))
    measured = {"metric": function, "lm_eval_tasks": tmp_path / "task.yaml"}
    result = run("trial_0", prompt_loss_weight=0.25, completion_loss_weight=1, **measured)
    metrics = result["metrics"]
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "trial_0" / "model").double()
    base = make_model(tie_word_embeddings=True).double()
    rows = Dataset.from_parquet(str(tmp_path / "base" / "answers.parquet")).to_list()
    (_, lost), (_, count) = region_sums(tuned, rows)
    (_, before), _ = region_sums(base, rows)
    assert metrics["eval_retention_loss"] == pytest.approx((lost - before).item() / count, rel=1e-4)
    assert abs(metrics["eval_retention_loss"]) > 0.01
    assert metrics[function] == 6
    # The last evaluation of the training and the sums over rows are the same
    logged = [log for log in result["log_history"] if "eval_loss" in log][-1]
    assert metrics["eval_completion_loss"] == pytest.approx(logged["eval_completion_loss"], rel=1e-6)
    assert metrics["eval_prompt_loss"] == pytest.approx(logged["eval_prompt_loss"], rel=1e-6)
    of_rows = Dataset.from_parquet(str(tmp_path / "trial_0" / "other_rows.parquet"))
    assert len(of_rows) == 4
    assert metrics["eval_other_completion_loss"] == sum(of_rows["completion_nll"]) / sum(of_rows["completion_tokens"])
    assert len(result["answers"]) == 3
    # The benchmark: which continuation is likelier
    tokenizer, right = AutoTokenizer.from_pretrained(tmp_path / "model"), 0
    for question, choices, label in questions:
        likelihoods = []
        for choice in choices:
            prompt, whole = tokenizer(question)["input_ids"], tokenizer(question + choice)["input_ids"]
            mask = [0] * len(prompt) + [1] * (len(whole) - len(prompt))
            (_, nll), _ = region_sums(tuned, [{"input_ids": whole, "completion_mask": mask}])
            likelihoods.append(-nll.item())
        right += likelihoods[label] > likelihoods[1 - label]
    assert metrics["eval_questions_acc"] == right / 2


def test_training_that_diverges_has_no_result(run, tmp_path):
    run("base")
    with pytest.raises(SystemExit, match=r"error: The training diverged: eval_\w*loss is nan"):
        run("trial_0", learning_rate=1e30)
    assert not (tmp_path / "trial_0" / "result.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"metric": "missing.py:f"}, r"--metric is missing.py:f, but there is no file missing.py"),
        ({"metric": "math:missing"}, r"--metric is math:missing, but math has no function missing"),
        ({"eval_dataset": "other=missing.jsonl"}, r"There is no file missing.jsonl, or it is empty"),
        ({"dataset_test_split": "validation"}, r"The data set has no split 'validation'"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_training(flags, message, run, monkeypatch):
    monkeypatch.setattr("wit_trl.WITSFTTrainer.train", None)
    with pytest.raises(SystemExit, match=f"error: {message}"):
        run("base", **flags)


def test_what_only_the_training_can_refuse_is_one_sentence(run, tmp_path):
    rows = [{"input_ids": [5, 900, 6], "completion_mask": [0, 1, 1]}] * 2
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(
        SystemExit, match=r"^error: The batch has the token 900, but `LlamaForCausalLM` has 500 tokens\."
    ):
        run("base", retention_prompts=0)


def test_answers_are_greedy_whatever_the_batch(make_model, tokenizer, prompt_completion, config_kwargs):
    prompts = [tokenizer(text)["input_ids"] for text in ("What", "What does it do?", "mean of data")]
    for size in (1, 2, 3):
        config = config_kwargs | {"per_device_eval_batch_size": size}
        trainer = make_trainer(make_model, tokenizer, None, config, train_dataset=prompt_completion.select(range(4)))
        trainer.model.train()
        written = answers(trainer, prompts)
        assert written == [greedy(make_model(), tokenizer, prompt, 64) for prompt in prompts]
        assert trainer.model.training


def test_prompts_are_what_comes_before_the_completion(tokenizer):
    rows = [
        {"input_ids": [1, 2, 3], "completion_mask": [0, 0, 1]},
        {"input_ids": [4, 5], "completion_mask": [0, 0]},  # no completion
        {"input_ids": [6, 7], "completion_mask": [1, 1]},  # no prompt
        {"input_ids": [0] * 600, "completion_mask": [0] * 599 + [1]},  # too long
        {"input_ids": [8, 9], "completion_mask": [0, 1]},
    ]
    assert prompts_of(rows, 5) == [[1, 2], [8]]
    assert prompts_of(rows, 1) == [[1, 2]]
    (first, *_) = general_prompts(tokenizer)
    assert tokenizer.decode(first).endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    tokenizer.chat_template = None
    assert tokenizer.decode(general_prompts(tokenizer)[0]) == f"{GENERAL_PROMPTS[0]}\n"


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("data/train.jsonl", "training rows"),
        ("data/test.jsonl", "test rows"),
        ("other.jsonl", "test rows other"),
        ("model/model.safetensors", "model"),
        ("model/tokenizer.json", "model"),
    ],
)
def test_trial_on_other_data_or_model_than_the_base_is_refused(file, changed, run, make_model, tmp_path, monkeypatch):
    monkeypatch.setattr("wit_trl.WITSFTTrainer.train", lambda self: None)
    monkeypatch.setattr(trial, "answer_as_base", lambda *args: None)
    monkeypatch.setattr(trial, "measure", lambda *args: {"metrics": {}})
    run("base")
    run("trial_0")
    path = tmp_path / file
    if path.suffix == ".jsonl":  # as many rows, of the same columns
        path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    elif path.suffix == ".json":
        path.write_text(path.read_text() + " ")
    else:
        model = make_model(tie_word_embeddings=True)
        with torch.no_grad():
            model.model.norm.weight[0] += 1
        model.save_pretrained(tmp_path / "model")
    message = (
        f"The {changed} changed since the sweep in {tmp_path} began: its trials would not compare. Put back what there "
        "was, or start a new sweep in another --output_dir."
    )
    with pytest.raises(SystemExit, match=re.escape(message)):
        run("trial_1")
    assert (tmp_path / "trial_1" / trial.REFUSAL).read_text() == message


def test_refusal_of_a_trial_ends_the_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(
        worker, "_launch", lambda folder, worker: (folder / trial.REFUSAL).write_text("The rows changed.")
    )
    with pytest.raises(ValueError, match=r"^The rows changed\.$"):
        worker.train({}, tmp_path / "t[v1]")


def test_files_of_a_sweep_are_those_of_its_folder(run, tmp_path, monkeypatch):
    """Not those of a folder that its name matches as a pattern."""
    run("t1/base", dataset_test_split="train")
    run("t[1]/base")
    result = run("t[1]/trial_0")
    answered = pq.read_table(tmp_path / "t[1]" / "base" / "answers.parquet")["completion_mask"].to_pylist()
    rows = pq.read_table(tmp_path / "t[1]" / "trial_0" / "retention_rows.parquet")
    assert rows["prompt_tokens"].to_pylist() == [mask.count(0) - 1 for mask in answered]
    assert result["metrics"]["eval_retention_loss"]


def test_model_of_a_trial_can_be_loaded(run, tmp_path):
    run("base")
    run("trial_0", keep="all")
    assert AutoTokenizer.from_pretrained(tmp_path / "trial_0" / "model").chat_template
    run("trial_1", keep="none")
    assert not (tmp_path / "trial_1" / "model").exists()


def test_trial_of_a_stream_and_of_a_mixture_measures_stored_rows(run, tmp_path):
    run("base", dataset_streaming=True)
    of_stream, of_rows = run("trial_0", dataset_streaming=True)["metrics"], run("trial_1")["metrics"]
    assert of_stream["eval_completion_loss"] == pytest.approx(of_rows["eval_completion_loss"], rel=1e-6)
    assert len(Dataset.from_parquet(str(tmp_path / "base" / "answers.parquet"))) == 2 + len(GENERAL_PROMPTS)


def test_mixture_is_split_in_the_same_way_in_every_process(tmp_path, prompt_completion):
    prompt_completion.to_json(tmp_path / "data.jsonl")
    part = DatasetConfig(path="json", data_files=str(tmp_path / "data.jsonl"), split="train")
    tests = []
    for seed in (1, 2):
        np.random.seed(seed)
        state = np.random.get_state()[1].tolist()
        splits = load_data(ScriptArguments(), DatasetMixtureConfig(datasets=[part], test_split_size=0.2))
        assert np.random.get_state()[1].tolist() == state
        tests.append(splits["test"]["prompt"][:])
    assert tests[0] == tests[1]


@pytest.mark.parametrize("adapter", [{}, {"use_peft": True, "lora_target_modules": "all-linear"}], ids=["full", "lora"])
def test_trials_of_a_seed_see_the_same_order_and_initial_weights(adapter, run):
    run("base")

    def losses(name, ratio, seed):
        settings = {"prompt_loss_weight": ratio, "completion_loss_weight": 1, "seed": seed}
        logs = run(name, per_device_train_batch_size=2, logging_steps=1, **settings, **adapter)["log_history"]
        return [log["completion_loss"] for log in logs if "loss" in log]

    first, same, other_ratio, other_seed = (
        losses(f"trial_{number}", *settings)
        for number, settings in enumerate([(0.25, 1), (0.25, 1), (1, 1), (0.25, 2)])
    )
    assert first == same
    assert first[0] == other_ratio[0]  # before the first step, it depends on the rows of the batch alone
    assert first[1] != other_ratio[1]
    assert first[0] != other_seed[0]


NESTED = [
    {
        "messages": [
            {"role": "user", "content": f"question {number}"},
            {"role": "assistant", "content": None if number % 3 else "", "calls": [{"x": number}] * (number % 2)},
        ],
        "weight": None if number % 7 == 0 else number / 3,
    }
    for number in range(2500)
]


def test_digest_of_rows_is_that_of_what_they_hold(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in NESTED))
    rows = load_dataset("json", data_files="rows.jsonl", split="train", cache_dir="cache")
    digest = digest_of_rows(rows)
    # Loaded anew, and in other pieces
    assert digest_of_rows(load_dataset("json", data_files="rows.jsonl", split="train", cache_dir="other")) == digest
    pieces = concatenate_datasets([rows.select(range(start, start + 500)) for start in range(0, 2500, 500)])
    assert digest_of_rows(pieces) == digest
    shuffled = rows.shuffle(seed=0)
    assert digest_of_rows(shuffled) == digest_of_rows(shuffled.flatten_indices()) != digest
    assert digest_of_rows(rows.to_iterable_dataset()) == digest_of_rows(rows.select(range(1000)))
    # What differs in one place
    others = [rows.select(range(2499)), rows.rename_column("weight", "weights"), rows.select([1, 0, *range(2, 2500)])]
    for row in (rows[2233] | {"weight": 0.0}, rows[2233] | {"messages": rows[2232]["messages"]}):
        middle = Dataset.from_list([row], features=rows.features)
        others.append(concatenate_datasets([rows.select(range(2233)), middle, rows.select(range(2234, 2500))]))
    assert len({digest, *map(digest_of_rows, others)}) == 1 + len(others)
