"""Tiny models, a tokenizer trained on the spot and real text for all tests, which run without a network."""

import os


os.environ["OMP_NUM_THREADS"] = "1"  # two processes run the tests
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub; inherited by the processes tests start

import functools
import gc
import html
import inspect
import json
import re
import shutil
import socket
import statistics
import subprocess
import textwrap
from pathlib import Path

import pytest
import torch
import trl
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ParallelismConfig
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTTrainer

from .reference import tokenize


CHAT_TEMPLATES = Path(trl.__file__).parent / "chat_templates"
SPECIAL_TOKENS = ["<pad>", "<eos>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
DOCUMENTED = [
    (name, inspect.getdoc(function))
    for module in (statistics, textwrap)
    for name, function in inspect.getmembers(module, inspect.isfunction)
    if inspect.getdoc(function)
]


# Single tests of these take up to a minute, so they come first, after the groups, which pytest-xdist takes first: no
# process is left alone with one of them at the end
LONG = ("tests/test_examples.py", "tests/sweep/test_command.py", "tests/loss/test_triton.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


def pytest_collection_finish():
    """Has the garbage collector pass over all that was imported, which every training else looks through."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test reached for the network: {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


def train_tokenizer(special_tokens, vocab_size=500, every_byte=True):
    """Returns a tokenizer trained on the spot, which knows every byte, or only those that it has read."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if every_byte else []
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=alphabet)
    tokenizer.train_from_iterator((doc for _, doc in DOCUMENTED), trainer)
    return tokenizer


@pytest.fixture(scope="session")
def trained_tokenizer():
    return train_tokenizer(SPECIAL_TOKENS, every_byte=False)


@pytest.fixture
def tokenizer(trained_tokenizer):
    return PreTrainedTokenizerFast(
        tokenizer_object=trained_tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<|begin_of_text|>",
        additional_special_tokens=SPECIAL_TOKENS[3:],
        chat_template=(CHAT_TEMPLATES / "llama3.jinja").read_text(encoding="utf-8"),
    )


@pytest.fixture
def make_model():
    """A function that returns the same tiny Llama at every call."""

    def make(**config):
        torch.manual_seed(0)
        config = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, **config}
        return LlamaForCausalLM(LlamaConfig(vocab_size=500, num_hidden_layers=2, pad_token_id=0, **config))

    return make


@pytest.fixture(params=["one_pass", "trl_kernel"])
def head(request, monkeypatch):
    """The head that computes the loss: the one-pass head, or TRL's kernel as on devices where that is not used."""
    if request.param == "trl_kernel":
        monkeypatch.setattr("wit_trl.loss.functions._ONE_PASS_DEVICES", ())
    return request.param


@pytest.fixture
def config_kwargs(tmp_path):
    """Arguments of a short, deterministic training in float32 on CPU, for `SFTConfig` and `WITSFTConfig` alike."""
    return {
        "output_dir": str(tmp_path),
        "max_length": 64,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "disable_tqdm": True,
    }


@pytest.fixture
def in_parallel(monkeypatch):
    """A function after which trainers are made as if launched with a `ParallelismConfig` and a `DeepSpeedPlugin`."""

    def launch(deepspeed_plugin=None, **sizes):
        initialise = SFTTrainer.__init__

        @functools.wraps(initialise)
        def initialise_in_parallel(self, *args, **kwargs):
            initialise(self, *args, **kwargs)
            monkeypatch.setattr(Accelerator, "parallelism_config", ParallelismConfig(**sizes))
            monkeypatch.setattr(AcceleratorState, "deepspeed_plugin", deepspeed_plugin)

        monkeypatch.setattr(SFTTrainer, "__init__", initialise_in_parallel)

    return launch


@pytest.fixture(scope="session")
def prompt_completion():
    return Dataset.from_dict(
        {
            "prompt": [f"What does {name} do?\n" for name, _ in DOCUMENTED],
            # From a few tokens to more than `max_length`
            "completion": [doc[: 20 + 37 * i % 300] for i, (_, doc) in enumerate(DOCUMENTED)],
        }
    )


@pytest.fixture
def rows(prompt_completion, tokenizer):
    """Eleven rows of uneven lengths and uneven shares of completion, cut at 64 tokens."""
    rows = [tokenize(tokenizer, row) for row in prompt_completion.select(range(11))]
    rows = [{key: value[:64] for key, value in row.items()} for row in rows]
    assert len({len(row["input_ids"]) for row in rows}) > 5
    return rows


@pytest.fixture
def jsonl(prompt_completion, tmp_path):
    prompt_completion.to_json(tmp_path / "data.jsonl")
    return tmp_path / "data.jsonl"


@pytest.fixture(scope="session")
def messages(prompt_completion):
    """Conversations of one and of two turns."""

    def turns(row):
        first = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"][:40]}]
        more = [{"role": "user", "content": "More?"}, {"role": "assistant", "content": row["completion"][40:80]}]
        return {"messages": first + (more if len(row["completion"]) > 80 else [])}

    return prompt_completion.map(turns, remove_columns=["prompt", "completion"])


@pytest.fixture
def datasets_by_type(prompt_completion, messages, tokenizer):
    """For each type of data set: what `WITSFTTrainer` gets, what TRL gets for the same tokens, and TRL's arguments for
    training on the completion alone and on the full sequence."""
    conversational = prompt_completion.map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
    )
    names = {"user": "human", "assistant": "gpt"}
    sharegpt = messages.map(
        lambda row: {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in row["messages"]]},
        remove_columns="messages",
    )
    text = prompt_completion.map(lambda row: {"text": row["prompt"] + row["completion"]}).select_columns("text")
    masked = prompt_completion.map(lambda row: tokenize(tokenizer, row), remove_columns=["prompt", "completion"])
    assistant = masked.rename_column("completion_mask", "assistant_masks")
    labelled = masked.map(
        lambda row: {
            "labels": [t if c else -100 for t, c in zip(row["input_ids"], row["completion_mask"], strict=True)]
        },
        remove_columns="completion_mask",
    )
    tokens = masked.select_columns("input_ids")
    full = {"completion_only_loss": False}
    return {
        "prompt_completion": (prompt_completion, prompt_completion, {}, full),
        "conversational": (conversational, conversational, {}, full),
        "messages": (messages, messages, {"assistant_only_loss": True}, {}),
        "sharegpt": (sharegpt, messages, {"assistant_only_loss": True}, {}),
        "text": (text, text, {}, {}),
        "completion_mask": (masked, masked, {"completion_only_loss": True}, {}),
        "assistant_masks": (assistant, assistant, {}, (tokens, {})),
        "labels": (labelled, labelled, {}, (tokens, {})),
        "input_ids": (tokens, tokens, {}, {}),
    }


@pytest.fixture(scope="session")
def browser():
    """A function that runs a headless browser on a file and returns what it prints."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None and not os.environ.get("REQUIRE_BROWSER"):
        pytest.skip("needs Chromium: apt-get install chromium")
    assert program, "REQUIRE_BROWSER is set, but there is no Chromium"

    def browse(page, *arguments):
        flags = ("no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking")
        flags = [f"--{flag}" for flag in (*flags, "disable-component-update", "disable-sync", "hide-scrollbars")]
        profile = page.with_suffix(".profile")
        command = [program, "--headless", *flags, f"--user-data-dir={profile}", *arguments, page.as_uri()]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        finally:
            shutil.rmtree(profile, ignore_errors=True)

    return browse


# What the browser computed for each piece of text, and whether it is drawn
PROBE = """
<script>
addEventListener("load", () => {
    const walker = document.createTreeWalker(document.querySelector("pre"), NodeFilter.SHOW_TEXT);
    const pieces = [];
    while (walker.nextNode()) {
        const style = getComputedStyle(walker.currentNode.parentElement);
        const range = document.createRange();
        range.selectNodeContents(walker.currentNode);
        const {width, right} = range.getBoundingClientRect();
        const {color, backgroundColor, fontWeight} = style;
        pieces.push({text: walker.currentNode.data, color, backgroundColor, fontWeight, width, right});
    }
    const {naturalWidth, naturalHeight} = document.querySelector("img");
    const report = document.createElement("div");
    report.id = "report";
    report.textContent = JSON.stringify({pieces, naturalWidth, naturalHeight, title: document.title, innerWidth});
    document.body.replaceChildren(report);
});
</script>
"""


@pytest.fixture
def probe(browser, tmp_path):
    def probe(page):
        copy = tmp_path / "probe.html"
        copy.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
        (report,) = re.findall(r'<div id="report">(.*?)</div>', browser(copy, "--dump-dom"), flags=re.DOTALL)
        return json.loads(html.unescape(report))

    return probe
