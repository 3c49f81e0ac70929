"""`wit-trl sft` as users run it: what it refuses before the training, and the training in processes of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from wit_trl.cli import sft

from .. import forks


@pytest.fixture
def model_folder(make_model, tokenizer, tmp_path):
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def error(monkeypatch, tmp_path):
    """A function that starts a training in this process and returns the one sentence it ends in."""
    monkeypatch.chdir(tmp_path)

    def error(*args):
        with pytest.raises(SystemExit) as ended:
            sft.main([*map(str, args), "--bf16", "False", "--use_cpu"])
        assert ended.value.code.startswith("error: ")
        return ended.value.code

    return error


@pytest.mark.parametrize("name", ["missing", "./missing", "/no/such/folder", "organisation/missing"])
def test_missing_model_is_named_with_what_to_check(name, error, jsonl):
    message = error("--model_name_or_path", name, "--dataset_name", jsonl)
    assert f"There is no folder {name}, and the Hub gives no model of this name: " in message
    assert message.endswith(
        "Check --model_name_or_path and the connection; a private or gated model needs `hf auth login`."
    )


def test_model_without_data_is_refused(error, model_folder):
    message = error("--model_name_or_path", model_folder)
    assert message.startswith("error: Pass both --model_name_or_path and --dataset_name, or neither")


def test_missing_split_is_named(error, model_folder, jsonl):
    message = error("--model_name_or_path", model_folder, "--dataset_name", jsonl, "--eval_strategy", "steps")
    assert message.startswith(
        "error: The data set has no split 'test', only ['train']. Choose another one with --dataset_test_split, hold"
    )
    message = error("--model_name_or_path", model_folder, "--dataset_name", jsonl, "--dataset_train_split", "tarin")
    assert message.endswith("no split 'tarin', only ['train']. Choose another one with --dataset_train_split.")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "The split test is not used. To see its losses, add --eval_strategy epoch --eval_on_start True.\n"),
        (["--eval_strategy", "epoch"], ""),
        (["--eval_on_start", "True"], ""),
        (["--dataset_test_split", "validation"], ""),
        (
            ["--eval_on_start", "True", "--prompt_loss_weight", 0],
            "The weights are (0, 0.8). For conventional tuning, (0, 1), add --completion_loss_weight 1.\n",
        ),
        (["--eval_on_start", "True", "--prompt_loss_weight", 0, "--completion_loss_weight", 0.8], ""),
        (["--eval_on_start", "True", "--prompt_loss_weight", 0.1], ""),
    ],
)
def test_flags_that_may_mean_something_else_are_told_before_the_training(
    args, said, model_folder, jsonl, capsys, monkeypatch
):
    def train(*_, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(sft.WITSFTTrainer, "train", train)
    given = ("--model_name_or_path", model_folder, "--dataset_name", jsonl, "--test_split_size", 0.5, *args)
    with pytest.raises(SystemExit):
        sft.main([*map(str, given), "--bf16", "False", "--use_cpu", "--report_to", "none", "--output_dir", "out"])
    assert capsys.readouterr().out == said


def test_what_only_the_training_can_refuse_is_one_sentence(error, model_folder, jsonl):
    rows = [{"input_ids": [5, 900, 6], "completion_mask": [0, 1, 1]}] * 2
    jsonl.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    message = error(
        "--model_name_or_path", model_folder, "--dataset_name", jsonl, "--max_steps", 1, "--report_to", "none"
    )
    assert message.startswith("error: The batch has the token 900, but `LlamaForCausalLM` has 500 tokens. Tokenize")


def test_folder_without_a_model_keeps_its_error(error, jsonl, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "Unrecognized" in error("--model_name_or_path", "empty", "--dataset_name", jsonl)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--model_name_or_path", "missing", "--dataset_name", "DATA"],
            "There is no folder missing, and the Hub gives",
        ),
        (["--model_name_or_path", "MODEL", "--dataset_name", "missing.jsonl"], "There is no file missing.jsonl, or it"),
        (
            ["--model_name_or_path", "adapter", "--dataset_name", "DATA"],
            "adapter holds an adapter without its model. M",
        ),
        (
            ["--model_name_or_path", "MODEL", "--dataset_name", "DATA", "--report_to", "tensorbored"],
            "--report_to tensorbored needs a package that is not here. Install it, or pass --report_to none.",
        ),
    ],
)
def test_what_is_missing_leaves_no_output_folder(args, message, error, model_folder, jsonl, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    names = {"MODEL": model_folder, "DATA": jsonl}
    assert message in error(*(names.get(arg, arg) for arg in args), "--output_dir", "out")
    assert not (tmp_path / "out").exists()


def test_checkpoint_that_is_none(error, model_folder, jsonl, tmp_path):
    args = ("--model_name_or_path", model_folder, "--dataset_name", jsonl, "--output_dir", "out", "--report_to", "none")
    assert error(*args, "--resume_from_checkpoint", "/nosuch").startswith(
        "error: --resume_from_checkpoint is /nosuch, but there is no such folder. True takes the last one."
    )
    for state in ("[]", "3", '{"other": 1}'):
        (tmp_path / "out" / "checkpoint-1").mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / "checkpoint-1" / "trainer_state.json").write_text(state)
        message = error(*args, "--resume_from_checkpoint", "True")
        assert message.startswith("error: There is no complete checkpoint in `out` to resume from.")


@pytest.mark.parametrize("folder", ["file", "file/deeper", "locked"])
def test_output_folder_that_cannot_be_written_is_found_before_anything_is_loaded(folder, error, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(sft, "load_data", None)
    access = os.access
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "locked" and access(path, mode))
    message = error("--model_name_or_path", "model", "--dataset_name", "data", "--output_dir", folder)
    assert message == (
        f"error: Nothing can be written to the output folder {folder}. Choose another one with --output_dir."
    )


@pytest.mark.parametrize(
    ("flag", "package"),
    [("--use_peft", "peft"), ("--load_in_4bit", "bitsandbytes"), ("--load_in_8bit", "bitsandbytes")],
)
def test_package_that_a_flag_needs_is_named(flag, package, error, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert error(flag) == f"error: {flag} needs {package}. Install it with `pip install {package}`."


def test_flag_of_the_launcher_is_refused_where_there_is_none(error, tmp_path, jsonl):
    assert error("--num_processes", 2).startswith(
        "error: --num_processes is a flag of the launcher. Give it to `wit-trl"
    )
    # In the YAML file it was for the launcher
    (tmp_path / "config.yaml").write_text("num_processes: 2\naccelerate_config: fsdp\noutput_dir: data.jsonl\n")
    assert "Nothing can be written to the output folder data.jsonl" in error("--config", "config.yaml")


def test_embedded_default_needs_no_extra(tmp_path):
    """As in an environment where none of them is installed."""
    (tmp_path / "none").mkdir()
    hidden = dict.fromkeys(("matplotlib", "peft", "bitsandbytes", "deepspeed"))
    (tmp_path / "none" / "sitecustomize.py").write_text(f"import sys; sys.modules.update({hidden})")
    command = [sys.executable, "-m", "wit_trl", "sft", "--max_steps", "1", "--max_length", "24"]
    command += ["--eval_strategy", "no", "--output_dir", "out"]
    path = f"{tmp_path / 'none'}{os.pathsep}{forks.REPOSITORY}"
    environment = os.environ | {"PYTHONPATH": path, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert process.returncode == 0, process.stdout + process.stderr
    # One evaluation has one value
    lines = [line for line in process.stdout.splitlines() if line.startswith("validation")]
    assert [line.split(":")[0] for line in lines] == ["validation prompt loss", "validation completion loss"]
    assert all("->" not in line and 7 < float(line.split()[3]) < 8 for line in lines)
    assert (
        "Model saved to out. For a picture of the losses, install matplotlib: `pip install matplotlib`."
        in process.stdout
    )
    assert "A held-out prompt:" in process.stdout
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert not (tmp_path / "out" / "losses.png").exists()
    assert "The following values were not passed to `accelerate launch`" not in process.stdout + process.stderr


TWO_PROCESSES = (
    "--accelerate_config",
    "multi_gpu",
    "--num_processes",
    2,
    "--use_cpu",
    "True",
    "--main_process_port",
    0,
)


def test_two_processes_on_a_cpu_from_a_yaml_file(model_folder, jsonl, tmp_path, monkeypatch):
    config = {"model_name_or_path": "model", "dataset_name": str(jsonl), "output_dir": "out", "bf16": False}
    config |= {"max_steps": 1, "per_device_train_batch_size": 3, "report_to": "none", "accelerate_config": "fsdp"}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    status, output = forks.run(forks.wit_trl, "sft", "--config", "config.yaml", *TWO_PROCESSES, "--loss_type", "dft")
    assert status == 0, output
    assert output.count("What is weighted in") == 1
    assert "factor of each token in training" in output
    assert "Model and loss curves (losses.png) saved to out." in output
    state = json.loads((tmp_path / "out" / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["train_batch_size"] == 3
    assert state["epoch"] == pytest.approx(1 / -(-len(jsonl.read_text().splitlines()) // 6))


def test_error_of_two_processes_is_one_sentence_and_no_traceback(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    status, output = forks.run(forks.wit_trl, "sft", *TWO_PROCESSES, "--output_dir", "file")
    assert status == 1
    assert output.count("error: Nothing can be written to the output folder file.") == 1
    assert output.count("error:") == 1
    assert "Traceback" not in output
    assert "elastic" not in output
