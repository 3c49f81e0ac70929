"""`examples/sft_wit.py` as users start it, in processes of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM


REPOSITORY = Path(__file__).parent.parent
CONFIGS = REPOSITORY / "accelerate_configs"


def launch(*arguments, check=True):
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", CONFIGS / "single_device.yaml", "examples/sft_wit.py", *arguments]
    environment = os.environ | {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    process = subprocess.run(
        list(map(str, command)), cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=280
    )
    assert not check or process.returncode == 0, process.stdout + process.stderr
    return process.stdout if check else process.stderr


@pytest.fixture
def model_folder(make_model, tokenizer, tmp_path):
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def jsonl(prompt_completion, tmp_path):
    prompt_completion.to_json(tmp_path / "data.jsonl")
    return tmp_path / "data.jsonl"


def history(folder):
    (state,) = folder.glob("checkpoint-*/trainer_state.json")
    return json.loads(state.read_text())["log_history"]


def test_embedded_default_learns_and_shows_it(tmp_path):
    output = launch("--output_dir", tmp_path, "--max_steps", 12, "--save_strategy", "steps")
    for region in ("prompt", "completion"):
        (line,) = (line for line in output.splitlines() if line.startswith(f"validation {region} loss:"))
        before, after = (float(word) for word in line.replace("->", " ").split() if word[0].isdigit())
        assert 7 < before < 8  # a uniform guess over 2048 tokens costs ln 2048 = 7.6
        assert after < before - 0.3
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert "A held-out prompt:\n\nWrite the Python function" in output
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.vocab_size == 2048


def test_full_fine_tuning_on_a_local_file(model_folder, jsonl, tmp_path):
    launch(
        *("--model_name_or_path", model_folder, "--dataset_name", jsonl, "--output_dir", tmp_path / "out"),
        *("--max_steps", 2, "--logging_steps", 1, "--report_to", "none"),
        *("--prompt_loss_weight", 0, "--completion_loss_weight", 1),
    )
    step = history(tmp_path / "out")[0]
    assert step["loss"] == pytest.approx(step["completion_loss"], rel=1e-6)
    assert "prompt_loss" not in step
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_lora_on_a_local_folder_from_a_yaml_file(model_folder, prompt_completion, tmp_path):
    (tmp_path / "data").mkdir()
    prompt_completion.to_json(tmp_path / "data" / "train.jsonl")
    prompt_completion.select(range(5)).to_json(tmp_path / "data" / "test.jsonl")
    config = {
        "model_name_or_path": str(model_folder),
        "dataset_name": str(tmp_path / "data"),
        "output_dir": str(tmp_path / "out"),
        "use_peft": True,
        "prompt_loss_weight": 0.4,
        "max_steps": 2,
        "eval_strategy": "steps",
        "report_to": "none",
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    output = launch("--config", tmp_path / "config.yaml")
    assert "test prompt loss:" in output
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    assert PeftModel.from_pretrained(base, tmp_path / "out").active_peft_config.r == 16


def test_qlora(model_folder, jsonl, tmp_path):
    launch(
        *("--model_name_or_path", model_folder, "--dataset_name", jsonl, "--output_dir", tmp_path / "out"),
        *("--use_peft", "--load_in_4bit", "--max_steps", 2, "--logging_steps", 1, "--report_to", "none"),
    )
    assert {"loss", "prompt_loss", "completion_loss"} <= set(history(tmp_path / "out")[0])
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_model_without_data_is_refused(model_folder):
    error = launch("--model_name_or_path", model_folder, check=False)
    assert "Pass both --model_name_or_path and --dataset_name, or neither" in error


def test_missing_split_is_named(model_folder, jsonl, tmp_path):
    error = launch(
        *("--model_name_or_path", model_folder, "--dataset_name", jsonl, "--output_dir", tmp_path / "out"),
        *("--eval_strategy", "steps"),
        check=False,
    )
    assert "The data set has no split 'test', only ['train']. Choose with --dataset_train_split" in error
