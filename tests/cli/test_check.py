"""`wit-trl check`: what is right gets a ✓, and what is broken on purpose a ✗ with what to do."""

import json
import math
import os
import sys

import pytest
from datasets import Dataset, DatasetDict

from wit_trl import cli
from wit_trl.check import checks, trainers
from wit_trl.cli import checking
from wit_trl.loss import one_pass


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """A function that runs the command on a CPU, with small sizes. It returns what it prints, and its exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(checking, "_DEFAULT_SIZES", (32, 500))
    monkeypatch.setattr(checks, "LAYOUTS", {"packed": checks.LAYOUTS["packed"]})
    monkeypatch.setattr(checks, "SPLITS", checks.SPLITS[::2])
    pairs = [{"prompt": f"Add 1 to {i}. ", "completion": f"{i} + 1 = {i + 1}"} for i in range(trainers.ROWS)]
    monkeypatch.setattr(trainers, "load_stdlib_functions", lambda: DatasetDict(train=Dataset.from_list(pairs)))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["wit-trl", "check", "--use_cpu", "True", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return capsys.readouterr().out, end.value.code

    return run


def test_all_is_right_and_written_to_the_file_alone(run, tmp_path):
    output, status = run("--json", "check.json")
    assert status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["check.json"]
    assert output.startswith("wit_trl: ")
    assert output.count("✓") == 6 + 2 + 1
    assert "✗" not in output
    assert output.endswith("\nAll is right.\n")
    values = json.loads((tmp_path / "check.json").read_text())
    assert all(result["is_right"] and result["figure"] <= result["limit"] for result in values["results"])
    assert {*values["seconds"]} == {"products", "one_pass", "trl"}
    assert values["advice"] in output
    assert values["versions"] in output


def test_the_loss_of_a_model_and_its_data(run, make_model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(checking, "check_trainers", lambda device: [])
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"The sum of {i} and 1 is", "completion": f" {i + 1}."} for i in range(4)]
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    before = {*tmp_path.rglob("*")}
    flags = ("--loss_divisor", "weights", "--use_peft", "True", "--per_device_train_batch_size", 2)
    output, status = run("--model_name_or_path", "model", "--dataset_name", "rows.jsonl", "--bf16", "False", *flags)
    assert status == 0
    assert "Row 0: " in output
    assert "hidden size 32, vocabulary 500" in output
    names = [line.split("   ")[1].strip() for line in output.splitlines() if "tokens of the data" in line]
    of_trl = [f"({prompt}, 1) as SFTTrainer, {what}" for prompt in (0, 1) for what in ("loss", "gradient")]
    assert [name.split(" of ")[0] for name in names] == ["loss", *of_trl]
    assert {*tmp_path.rglob("*")} == before


def test_a_wrong_kernel_is_named_with_the_setting_that_avoids_it(run, monkeypatch):
    score = one_pass.score

    def wrong(logits, *args):
        score(logits, *args)
        logits *= 1.1

    monkeypatch.setattr(one_pass, "score", wrong)
    output, status = run()
    assert status == 1
    assert 'The kernel `one_pass` of the LM head is wrong in bfloat16. Set `fused_head="trl"`.' in output
    assert 'Set `fused_head="trl"`: "auto" is "one_pass" here, which is wrong or fails.' in output
    assert output.count("✗") == 3 + 2  # the kernel in each data type, and trainings with it; splits are all as wrong
    assert output.endswith("Something is wrong. A bug report needs all that is printed here.\n")


def test_a_kernel_that_fails_ends_in_a_table_and_a_file(run, monkeypatch, tmp_path):
    def fails(*args):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr("wit_trl.loss.functions.trl_weighted_nll", fails)
    monkeypatch.setattr(checks, "KERNELS", {"one_pass": one_pass.weighted_nll, "trl": fails})
    output, status = run("--json", "check.json")
    assert status == 1
    assert output.count("✗") == 3
    assert "RuntimeError: no kernel image is available" in output
    assert json.loads((tmp_path / "check.json").read_text())["seconds"]["trl"] is None


def test_a_kernel_that_fails_or_returns_nan_is_wrong(monkeypatch):
    def fails(*args):
        raise RuntimeError("no kernel image is available")

    def nan(*args):
        loss, scores = one_pass.weighted_nll(*args)
        return loss * float("nan"), scores

    monkeypatch.setattr(checks, "KERNELS", {"one_pass": fails, "trl": nan})
    found = list(checks.check_kernels("cpu"))
    assert [result.is_right for result in found] == [False] * 6
    assert found[0].error == "RuntimeError: no kernel image is available"


@pytest.mark.parametrize(
    ("device", "one_pass_seconds", "wrong", "expected"),
    [
        ("cpu", 1.0, set(), 'Leave `fused_head="auto"`: it is "one_pass" here.'),
        ("cuda", 3.0, set(), 'Leave `fused_head="auto"`: it is "trl" here.'),
        ("cuda", 1.5, set(), 'Set `fused_head="one_pass"`: it takes 25% less time than "trl", which "auto" is here.'),
        ("cuda", 1.5, {"one_pass"}, 'Leave `fused_head="auto"`: it is "trl" here.'),
        ("cuda", 3.0, {"trl"}, 'Set `fused_head="one_pass"`: "auto" is "trl" here, which is wrong or fails.'),
        ("cuda", math.inf, set(), 'Leave `fused_head="auto"`: it is "trl" here.'),
        ("cuda", 1.95, set(), 'Leave `fused_head="auto"`: it is "trl" here.'),
        ("cpu", 1.0, {"trl", "one_pass"}, "No head is right here. Do not train on this device, and report it."),
    ],
)
def test_advice(device, one_pass_seconds, wrong, expected):
    assert checking.advice({"products": 1.0, "one_pass": one_pass_seconds, "trl": 2.0}, device, wrong) == expected


def test_a_file_that_cannot_be_written_is_refused_first(run):
    _, message = run("--json", "missing/check.json")
    assert message == "error: Cannot write missing/check.json: there is no folder missing. Create it first."


@pytest.mark.parametrize(
    ("flags", "devices", "launched"),
    [
        ((), 0, []),
        ((), 2, ["--multi_gpu", "--num_processes", "2"]),
        (("--use_cpu", "True"), 2, []),
        (("--accelerate_config", "multi_gpu"), 2, ["--accelerate_config", "multi_gpu"]),
    ],
)
def test_ranks_are_launched_with_a_flag_or_several_devices(flags, devices, launched, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    monkeypatch.setattr("torch.accelerator.device_count", lambda: devices)
    found = []
    monkeypatch.setattr(checking, "check", lambda *args: found.append((*args, os.environ["CUDA_VISIBLE_DEVICES"])))
    with pytest.raises(SystemExit):
        cli.main(["check", *flags])
    ((_, _, launch_flags, environment, visible),) = found
    assert launch_flags == launched
    assert environment["CUDA_VISIBLE_DEVICES"] == "5,6"  # of the ranks
    assert visible == "5"


def test_an_unknown_configuration_is_refused_first(run):
    _, message = run("--accelerate_config", "fsdb")
    assert message.startswith("error: --accelerate_config is fsdb, but there is no such file. Shipped are ")
