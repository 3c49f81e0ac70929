"""`wit-trl inspect` as users run it, and its page in a real browser."""

import contextlib
import json
import os
import re
import signal
import sys
from pathlib import Path

import matplotlib.image
import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from wit_trl import cli
from wit_trl.cli import inspect  # noqa: F401
from wit_trl.report import rows as inspection

from .. import forks
from ..conftest import train_tokenizer


PROMPT_SHADES, COMPLETION_SHADES = (inspection._SHADES[region] for region in (0, 1))
TRANSPARENT = "rgba(0, 0, 0, 0)"


@pytest.fixture
def tokenizer():
    """A tokenizer that knows every byte."""
    tokenizer = train_tokenizer(["<pad>", "<eos>"], vocab_size=400)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture
def model_folder(make_model, tokenizer, tmp_path):
    """A model without its weights: nothing may read them."""
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """A function that runs the command and returns what it prints, or the error it ends in."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, fails=False):
        monkeypatch.setattr(sys, "argv", ["wit-trl", "inspect", *map(str, arguments)])
        if not fails:
            cli.main()
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as error:
            cli.main()
        return str(error.value)

    return run


def rgb(colour):
    return "rgb({}, {}, {})".format(*(int(colour[i : i + 2], 16) for i in (1, 3, 5)))


@pytest.fixture
def strange(tmp_path):
    """Rows with what a page or a terminal could take for its own."""
    rows = {
        "prompt": ["<b>&amp;</b> <script>document.title = 'taken over'</script>\n\nWhat?\n"] * 5,
        "completion": ["[red]An  answer[/red] ▌ 👧 {code} <eos>"] * 5,
    }
    Dataset.from_dict(rows).to_json(tmp_path / "strange.jsonl")
    return tmp_path / "strange.jsonl", rows["prompt"][0], rows["completion"][0]


def test_page_in_a_browser(run, probe, model_folder, strange, tmp_path):
    data, prompt, completion = strange
    output = run(
        *("--model_name_or_path", model_folder, "--dataset_name", data, "--prompt_loss_weight", 0.3, "--rows", 2),
        *("--html", tmp_path / "page.html"),
    )
    report = probe(tmp_path / "page.html")
    assert report["title"] == "wit-trl inspect"
    assert (report["naturalWidth"], report["naturalHeight"]) > (400, 200)
    pieces = report["pieces"]
    assert all(piece["right"] <= report["innerWidth"] for piece in pieces)
    assert [piece for piece in pieces if piece["width"] == 0 and piece["text"].strip()] == []
    assert "".join(piece["text"] for piece in pieces).split() == output[output.index("[prompt 0.3]") :].split()

    def text_on(*colours):
        text = "".join(piece["text"] for piece in pieces if piece["backgroundColor"] in colours)
        return text.replace("↵\n", "\n").replace("↵", "\n")

    # A word of the legend, then both rows, without their first token, which weighs nothing
    assert text_on(*map(rgb, PROMPT_SHADES)) == "tokens" + prompt[1:] * 2
    assert text_on(*map(rgb, COMPLETION_SHADES)) == "tokens" + f"{completion}" * 2
    marks = [i for i, piece in enumerate(pieces) if piece["text"] == "▌" and piece["backgroundColor"] == TRANSPARENT]
    starts = [pieces[mark + 1] for mark in marks]
    assert [start["text"].strip() for start in starts] == ["first token of a document", "<", "<"]
    assert {start["backgroundColor"] for start in starts} == {TRANSPARENT}
    special = {
        piece["text"] for piece in pieces if int(piece["fontWeight"]) > 400 and piece["backgroundColor"] != TRANSPARENT
    }
    assert special == {"<eos>"}


def test_colours_on_a_screenshot(run, browser, model_folder, jsonl, tmp_path):
    page, screenshot = tmp_path / "page.html", tmp_path / "screenshot.png"
    run("--model_name_or_path", model_folder, "--dataset_name", jsonl, "--html", page)
    browser(page, f"--screenshot={screenshot}", "--window-size=1000,1600")
    pixels = (matplotlib.image.imread(screenshot)[..., :3] * 255).round().astype(int)
    for shade in (*PROMPT_SHADES, *COMPLETION_SHADES):
        colour = [int(shade[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == colour).all(-1).sum() > 2000


def test_embedded_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, output = forks.run(forks.wit_trl, "inspect", "--html", "page.html")
    assert status == 0, output
    assert (
        "model: embedded, a Llama of 2 million parameters\n"
        "data set: embedded, functions of Python's standard library, split train\nmax_length: 256\n\n"
        "[region weight] holds for the tokens that follow it, up to the next one. ▌ begins a document.\n\n[prompt 0.2]"
    ) in output
    assert output.count("\n▌Write[prompt 0.2] the Python function") == 3
    assert re.search(r"What is weighted in [\d,]+ rows", output)
    assert {file.name for file in tmp_path.iterdir()} == {"page.html", "page.png"}  # and no output folder
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_weights_and_packing_of_a_configuration_file(run, model_folder, jsonl, tmp_path):
    config = {
        "model_name_or_path": str(model_folder),
        "dataset_name": str(jsonl),
        "prompt_loss_weight": 0.0,
        "completion_loss_weight": 0.5,
        "packing": True,
        "max_length": 512,
        # Of no account for the data, and not possible on this machine
        "bf16": True,
        "eval_strategy": "steps",
        "push_to_hub": True,
        "report_to": "wandb",
        "attn_implementation": "flash_attention_2",
        "use_peft": True,
        "load_in_4bit": True,
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    output = run("--config", tmp_path / "config.yaml", "--rows", 1)
    assert re.search(r"Row 0: [45]\d\d tokens, [2-9] documents", output)
    assert "[prompt 0]" in output
    assert "[completion 0.5]" in output
    assert output.count("▌") > 2  # one in the legend
    assert re.search(r"prompt +0 +[1-9].* 0.0%", output)
    assert re.search(r"conventional tuning \* +x 0.5\b", output)


def test_header_names_what_is_shown(run, model_folder, jsonl):
    data = ("--model_name_or_path", model_folder, "--dataset_name", jsonl)
    output = run(*data, "--rows", 0, "--max_length", 40)
    assert f"model: {model_folder}\ndata set: {jsonl}, split train\nmax_length: 40\n\n[region weight] holds" in output


def test_flags_of_the_launcher_say_nothing_about_the_data(run, model_folder, jsonl, tmp_path):
    (tmp_path / "config.yaml").write_text("accelerate_config: fsdp\nnum_processes: 8\n")
    data = ("--model_name_or_path", model_folder, "--dataset_name", jsonl, "--rows", 0)
    assert run(*data, "--config", "config.yaml", "--num_machines", 2) == run(*data)


def test_streaming_data(run, model_folder, jsonl):
    output = run("--model_name_or_path", model_folder, "--dataset_name", jsonl, "--dataset_streaming", "True")
    assert "Row 2:" in output
    assert re.search(r"What is weighted in the first \d+ rows", output)


def test_data_of_another_schema_with_weights(run, model_folder, tmp_path):
    rows = [{"instruction": "Add.", "input": "1, 2", "output": "It is 3.", "weight": weight} for weight in (0.5, 1)]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    output = run("--model_name_or_path", model_folder, "--dataset_name", tmp_path / "alpaca.json")
    assert "[completion 0.4]It is 3.<eos>" in output.replace("\n", "")
    assert "[completion 0.8]It is 3.<eos>" in output.replace("\n", "")


def test_arguments_of_the_training(run, model_folder, tokenizer, jsonl, tmp_path):
    tokenizer.add_tokens(["<|end|>"], special_tokens=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "chat")
    messages = [{"role": "user", "content": "1 + 1? "}, {"role": "assistant", "content": "It is 2."}]
    (tmp_path / "chat.json").write_text(json.dumps([{"messages": messages}] * 2))
    output = run(
        *("--model_name_or_path", model_folder, "--dataset_name", tmp_path / "chat.json"),
        *("--chat_template_path", tmp_path / "chat", "--lr_scheduler_type", "reduce_lr_on_plateau"),
        *("--eval_strategy", "steps", "--eval_steps", 1),
    )
    assert "[completion 0.8]It is 2.<|end|>" in output


SAID = [("user", "One? "), ("assistant", "First. "), ("user", "Two? "), ("assistant", "Second. ")]
TURNS = [{"role": role, "content": content} for role, content in SAID]
# Each with whether it is changed with no setting, and with `--completion_turns last`
CONVERSATIONS = [
    ({"messages": TURNS[:2]}, False, False),
    ({"messages": TURNS}, False, True),
    ({"messages": [*TURNS[:3], {**TURNS[3], "weight": 0.5}]}, True, True),
    ({"messages": [TURNS[0], {**TURNS[1], "completion": False}, *TURNS[2:]]}, True, True),
    ({"messages": TURNS, "completion_turns": "all"}, False, False),
    ({"messages": TURNS, "completion_turns": "last_round"}, True, True),
    ({"messages": TURNS[:2], "completion_turns": "last"}, False, False),
    ({"messages": TURNS[:2], "weight": 2}, True, True),
    ({"messages": [*TURNS[:3], {**TURNS[3], "loss": True}]}, False, True),
    ({"messages": [*TURNS[:3], {**TURNS[3], "loss": False}]}, True, True),
    ({"messages": TURNS, "weight": 1}, False, True),
]


@pytest.fixture
def conversations(model_folder, tokenizer, tmp_path):
    """The flags of a training on them."""
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token if m.role == 'assistant' else '' }}"
        "{% endfor %}"
    )
    tokenizer.save_pretrained(model_folder)
    lines = [json.dumps(row) for row, _, _ in CONVERSATIONS]
    (tmp_path / "conversations.jsonl").write_text("\n".join(lines))
    return "--model_name_or_path", model_folder, "--dataset_name", tmp_path / "conversations.jsonl"


def messages_of(number):
    return CONVERSATIONS[number][0]["messages"]


def shown_rows(output):
    return [*map(int, re.findall(r"^Row (\d+):", output, re.MULTILINE))]


@pytest.mark.parametrize("how", [(), ("--dataset_streaming", "True"), ("--packing", "True"), ("--max_length", 30)])
def test_changed_rows_alone(how, run, conversations):
    plain = [number for number, (_, is_changed, _) in enumerate(CONVERSATIONS) if is_changed]
    last = [number for number, (_, _, is_changed) in enumerate(CONVERSATIONS) if is_changed]
    flags = (*conversations, "--only", "changed", "--rows", 20, *how)
    if "--max_length" in how:  # which cuts the last answer off
        plain = [number for number in plain if all("weight" not in t and "loss" not in t for t in messages_of(number))]
    output = run(*flags)
    assert shown_rows(output) == plain
    assert f"changed rows: {len(plain)} of the {len(CONVERSATIONS)} searched" in output
    if "--max_length" not in how:
        output = run(*flags, "--completion_turns", "last")
        assert shown_rows(output) == last
        assert shown_rows(run(*flags, "--completion_turns", "last", "--rows", 2)) == last[:2]
        assert f"changed rows: {len(last)} of the {len(CONVERSATIONS)} searched" in output


@pytest.mark.parametrize(
    "setting",
    [
        ("--role_loss_weights", '{"user": 0}'),
        ("--regex_loss_weights", '{"Second": 2}'),
        ("--chat_template_loss_weight", "0"),
    ],
)
def test_a_setting_changes_the_rows_where_it_says_something(setting, run, conversations):
    """The pattern is in the rows of four turns."""
    output = run(*conversations, "--only", "changed", "--rows", 20, *setting)
    of_pattern = [n for n, (row, is_changed, _) in enumerate(CONVERSATIONS) if len(row["messages"]) == 4 or is_changed]
    assert shown_rows(output) == (of_pattern if "Second" in setting[1] else [*range(len(CONVERSATIONS))])


def test_no_changed_row(run, model_folder, jsonl):
    data = ("--model_name_or_path", model_folder, "--dataset_name", jsonl)
    lines = jsonl.read_text().count("\n")
    output = run(*data, "--only", "changed", "--prompt_loss_weight", 0.5)
    assert shown_rows(output) == []
    assert f"changed rows: 0 of the {lines} searched" in output
    (row, *rest) = jsonl.read_text().splitlines()
    jsonl.write_text("\n".join([row, *[json.dumps({**json.loads(line), "weight": 0.5}) for line in rest]]))
    assert shown_rows(run(*data, "--only", "changed", "--rows", 2)) == [1, 2]
    assert "invalid choice: 'others'" in run(*data, "--only", "others", fails=True)


def test_tokenized_rows_that_are_changed(run, model_folder, tmp_path):
    row = {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1], "token_weights": [1.0, 1.0, 1.0]}
    rows = [row, {**row, "token_weights": [1.0, 0.5, 1.0]}, {**row, "token_weights": [0.5, 1.0, 1.0]}] * 500
    (tmp_path / "tokens.jsonl").write_text("\n".join(map(json.dumps, rows)))
    output = run("--model_name_or_path", model_folder, "--dataset_name", "tokens.jsonl", "--only", "changed")
    assert shown_rows(output) == [1, 4, 7]  # nothing predicts the first token of a row
    assert "changed rows: 333 of the 1,000 searched" in output


def test_rows_that_cannot_be_compared_say_why(run, conversations, model_folder, tokenizer):
    """The template writes earlier answers in another way than the last, so only that can be found."""
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}{{ '' if loop.last or m.role == 'user' else ' old' }}>{{ m.content }}"
        "{% endfor %}"
    )
    tokenizer.save_pretrained(model_folder)
    flags = (*conversations, "--completion_turns", "last", "--only", "changed")
    Path(conversations[-1]).write_text(json.dumps({"messages": TURNS}))
    error = run(*flags, fails=True)
    assert error.startswith("error: --only changed compares rows with plain training, in which all answers are")
    assert "Leave the flag out. Row 0 of the train dataset: the chat template renders turn 1" in error


def test_histogram_alone(run, model_folder, jsonl, tmp_path):
    data = ("--model_name_or_path", model_folder, "--dataset_name", jsonl)
    assert "Row" not in run(*data, "--histogram", tmp_path / "lengths.png", "--rows", 0)
    assert matplotlib.image.imread(tmp_path / "lengths.png").shape[2] == 4
    assert not list(tmp_path.glob("*.html"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--html", "missing/page.html"], "Cannot write missing/page.html: there is no folder missing. Create it"),
        (["--html", "page.png"], "--html and --histogram are both page.png"),
        (["--rows", "-1"], "--rows is -1, but it must not be negative"),
        (["--model_name_or_path", "MODEL"], "Pass both --model_name_or_path and --dataset_name, or neither"),
        (["--model_name_or_path", "MODEL", "--dataset_name", "missing.jsonl"], "missing.jsonl"),
        (["--model_name_or_path", "missing", "--dataset_name", "DATA"], "We couldn't connect"),
        (["--model_name_or_path", "MODEL", "--dataset_name", "broken.jsonl"], "broken.jsonl, line 1: this is not JSON"),
        (["--model_name_or_path", "MODEL", "--dataset_name", "no.jsonl"], "There is no file no.jsonl, or it is empty"),
        (
            ["--model_name_or_path", "MODEL", "--dataset_name", "empty.csv"],
            "There is no file empty.csv, or it is empty",
        ),
        (
            ["--model_name_or_path", "MODEL", "--dataset_name", "columns.jsonl"],
            "The columns ['a'] are those of no known schema",
        ),
        (
            ["--model_name_or_path", "MODEL", "--dataset_name", "DATA", "--dataset_train_split", "test"],
            "The data set has no split 'test', only ['train']. Choose another one with --dataset_train_split.",
        ),
        (["--prompt_loss_weight", "-1"], "`prompt_loss_weight` is -1.0, but a weight must be"),
        (["--config", "missing.yaml"], "--config is missing.yaml, but there is no such file."),
        (["--config", "broken.jsonl"], "broken.jsonl"),
        (["--no_such_flag", "1"], "--no_such_flag"),
        (
            ["--model_name_or_path", "missing", "--dataset_name", "DATA"],
            "There is no folder missing, and the Hub gives",
        ),
        (
            ["--model_name_or_path", "MODEL", "--dataset_name", "preference.jsonl"],
            "are preference data, for TRL's `DPOTrainer`. To train on the chosen answers alone",
        ),
    ],
)
def test_errors_end_in_one_sentence(arguments, message, run, model_folder, jsonl, tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", ')
    (tmp_path / "empty.csv").touch()
    (tmp_path / "columns.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "preference.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    names = {"MODEL": model_folder, "DATA": jsonl}
    error = run(*(names.get(argument, argument) for argument in arguments), fails=True)
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error


def test_output_that_nothing_reads_any_more(run, model_folder, jsonl):
    """As with `| head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as broken, contextlib.redirect_stdout(broken):
        error = run("--model_name_or_path", model_folder, "--dataset_name", jsonl, fails=True)
    assert error == str(128 + signal.SIGPIPE)


def test_without_matplotlib(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "The histogram needs matplotlib" in run("--histogram", "lengths.png", fails=True)


@pytest.mark.parametrize("arguments", [[], ["inspekt"], ["--help"]])
def test_usage(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["wit-trl", *arguments])
    with pytest.raises(SystemExit):
        cli.main()
    assert "inspect" in "".join(capsys.readouterr())
