"""`examples/sft_wit.py` as users start it, with `accelerate launch`. `make train` starts it as a program."""

import functools
import importlib.util
import json
import math
import os
import re
import subprocess

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import ModelConfig, ScriptArguments, TrlParser
from trl.chat_template_utils import is_chat_template_stop_token_trained

from wit_trl import WITSFTConfig
from wit_trl.cli.arguments import TRAINING_TYPES, Flags, parse_launch_flags

from .forks import REPOSITORY, accelerate_launch, run


CONFIGS = REPOSITORY / "accelerate_configs"


def launch(*arguments, check=True, launch_arguments=("--config_file", CONFIGS / "single_device.yaml")):
    environment = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    example = REPOSITORY / "examples" / "sft_wit.py"
    status, output = run(accelerate_launch, *launch_arguments, example, *arguments, **environment)
    assert not check or status == 0, output
    return output


@pytest.fixture
def model_folder(make_model, tokenizer, tmp_path):
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def history(folder):
    (state,) = folder.glob("checkpoint-*/trainer_state.json")
    return json.loads(state.read_text())["log_history"]


def test_embedded_default_learns_and_shows_it(tmp_path):
    output = launch("--output_dir", tmp_path, "--max_steps", 12, "--max_length", 96, "--save_strategy", "steps")
    for region in ("prompt", "completion"):
        (line,) = (line for line in output.splitlines() if line.startswith(f"validation {region} loss:"))
        before, after = (float(word) for word in line.replace("->", " ").split() if word[0].isdigit())
        assert 7 < before < 8  # a uniform guess over 2048 tokens costs ln 2048 = 7.6
        assert after < before - 0.3
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert "A held-out prompt:\n\nWrite the Python function" in output
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.vocab_size == 2048


def test_losses_that_depend_on_the_prediction(tmp_path):
    spec = importlib.util.spec_from_file_location("token_factors", REPOSITORY / "examples" / "token_factors.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.load_stdlib_functions = functools.cache(example.load_stdlib_functions)
    arguments = {"output_dir": str(tmp_path), "max_steps": 2, "logging_steps": 1, "report_to": "none", "use_cpu": True}
    trainer = example.main("EntropyTrainer", **arguments, bf16=False)
    vocab_size = trainer.model.config.vocab_size
    first = trainer.state.log_history[0]
    nll = torch.tensor([0.1, 3.0])
    weights = trainer.weight_report().loss_weights
    # An untrained model is as unsure as can be: the factors are about 1
    assert first["entropy"] == pytest.approx(math.log(vocab_size), rel=0.02)
    assert first["loss"] < max(weights) * math.log(vocab_size)
    assert trainer.token_factors(nll, torch.tensor([0.0, math.log(vocab_size)])).tolist() == pytest.approx([0, 1])
    trainer = example.main("ProFitTrainer", **arguments, bf16=False)
    assert trainer.token_factors(nll, nll).tolist() == [1, 1]
    assert trainer.token_factors(nll + 7, nll).tolist() == [1, 0]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(first["loss"], rel=0.02)


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


def test_qlora_on_data_of_another_schema(model_folder, prompt_completion, tmp_path):
    alpaca = prompt_completion.rename_columns({"prompt": "instruction", "completion": "output"})
    alpaca.to_json(tmp_path / "alpaca.jsonl")
    launch(
        *("--model_name_or_path", model_folder, "--dataset_name", tmp_path / "alpaca.jsonl"),
        *("--output_dir", tmp_path / "out"),
        *("--use_peft", "--load_in_4bit", "--max_steps", 2, "--logging_steps", 1, "--report_to", "none"),
    )
    assert {"loss", "prompt_loss", "completion_loss"} <= set(history(tmp_path / "out")[0])
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_resumes_from_the_last_checkpoint(model_folder, jsonl, tmp_path):
    arguments = [
        *("--model_name_or_path", model_folder, "--dataset_name", jsonl, "--output_dir", tmp_path / "out"),
        *("--save_steps", 1, "--logging_steps", 1, "--report_to", "none"),
    ]
    launch(*arguments, "--max_steps", 1)
    launch(*arguments, "--max_steps", 2, "--resume_from_checkpoint", "True")
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert [log["step"] for log in state["log_history"]] == [1, 2]


@pytest.mark.parametrize(
    ("launch_arguments", "arguments", "message"),
    [
        (
            ["--config_file", CONFIGS / "multi_gpu.yaml", "--num_processes", "2"],
            [],
            "error: 2 processes were launched, but there is no GPU for them",
        ),
        (
            ["--config_file", CONFIGS / "single_device.yaml"],
            ["--bf16", "True"],
            "error: Your setup doesn't support bf16/gpu.",
        ),
    ],
)
def test_wrong_launch_ends_in_one_sentence(launch_arguments, arguments, message, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert launch(*arguments, check=False, launch_arguments=launch_arguments).count(message) == 1


@pytest.fixture
def run_script(tmp_path):
    """A function that runs a launch script with the programs of a cluster replaced, and returns the arguments of the
    launcher and of the example."""
    (tmp_path / "bin").mkdir()
    programs = {
        "accelerate": f'printf "%s\\n" "$@" > {tmp_path}/arguments',
        "srun": 'shift 2; SLURM_PROCID=1 exec "$@"',
        "scontrol": "echo node1; echo node2",
    }
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    def run(name, *arguments, **variables):
        environment = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", **variables}
        command = ["bash", str(REPOSITORY / "examples" / name), *arguments]
        subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, timeout=60)
        given = (tmp_path / "arguments").read_text().splitlines()
        assert given.pop(0) == "launch"
        launched = launch_command_parser().parse_args(given)
        parser = TrlParser((ScriptArguments, WITSFTConfig, ModelConfig))
        return launched, parser.parse_args_and_config(launched.training_script_args)

    return run


@pytest.mark.parametrize(("name", "config"), [("train_small.sh", "multi_gpu"), ("train_large.sh", "fsdp1")])
@pytest.mark.parametrize("processes", [2, 8])
def test_recipes_of_the_paper(name, config, processes, run_script):
    launched, (script_args, args, model_args) = run_script(
        name, "--use_cpu", "--bf16", "False", DATA="data.jsonl", NUM_PROCESSES=str(processes), PROMPT_LOSS_WEIGHT="0.4"
    )
    assert launched.config_file == f"accelerate_configs/{config}.yaml"
    assert launched.training_script == "examples/sft_wit.py"
    assert launched.num_processes == processes
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * processes == 64
    assert (args.prompt_loss_weight, args.completion_loss_weight) == (0.4, 0.8)
    assert (args.max_grad_norm, args.weight_decay, args.learning_rate, args.seed) == (0.0, 0.1, 2e-5, 23)
    assert args.get_warmup_steps(1000) == 10
    assert script_args.dataset_name == "data.jsonl"
    assert model_args.model_name_or_path.startswith("meta-llama/")


def test_settings_of_the_paper(tmp_path):
    """Each as one line, with the weights of the table in docs/choosing-weights.md."""
    (tmp_path / "wit-trl").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/arguments')
    (tmp_path / "wit-trl").chmod(0o755)
    table = (REPOSITORY / "docs" / "choosing-weights.md").read_text(encoding="utf-8")
    names = ("Llama-3.2-1B", "Gemma-2-2B", "Llama-3.2-3B", "Mistral-7B", "Llama-3-8B")
    rows = [next(line for line in table.splitlines() if line.startswith(f"| {name} |")) for name in names]
    pairs = [tuple(map(float, pair)) for row in rows for pair in re.findall(r"\(([\d.]+), ([\d.]+)\)", row)]
    assert len(pairs) == 15
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = ["bash", "examples/recipes/paper.sh"]
    listed = subprocess.run(script, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(listed) == 15
    for number, (pair, line) in enumerate(zip(pairs, listed, strict=True), 1):
        command = [*script, str(number), "--use_cpu", "--bf16", "False"]
        subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, timeout=60)
        command, *arguments = (tmp_path / "arguments").read_text().splitlines()
        assert command == "sft"
        flags = Flags(TRAINING_TYPES, arguments)
        launched = parse_launch_flags(flags.launch_flags, "module")
        checked = flags.check()
        args, model_args = checked.training, checked.model
        assert args.per_device_train_batch_size * args.gradient_accumulation_steps * launched.num_processes == 64
        assert (args.prompt_loss_weight, args.completion_loss_weight) == pair
        assert (args.max_grad_norm, args.weight_decay, args.seed, args.max_length) == (0, 0.1, 23, 4096)
        assert args.learning_rate == (5e-6 if "Mistral" in line else 2e-5)
        assert args.num_train_epochs == {"tulu": 1, "alpaca": 2, "lima": 5}[line.split()[2]]
        assert args.get_warmup_steps(1000) == 10
        assert model_args.model_name_or_path == line.split()[1]
        assert (launched.accelerate_config == "fsdp1") == ("7B" in line or "8B" in line)


def test_data_and_template_of_the_paper(tokenizer):
    spec = importlib.util.spec_from_file_location("data", REPOSITORY / "examples" / "recipes" / "data.py")
    data = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(data)
    messages = [{"role": "user", "content": "Sum?"}, {"role": "assistant", "content": "Three."}]
    rows = Dataset.from_list([{"id": str(number), "messages": messages} for number in range(5)])
    assert data.tulu(rows, 3).to_list() == [{"messages": messages}] * 3
    rows = Dataset.from_list([{"conversations": ["Sum?", "Three."], "source": "x"}])
    assert data.lima(rows).to_list() == [{"messages": messages}]
    tokenizer.chat_template = (REPOSITORY / "examples" / "recipes" / "chat_template.jinja").read_text(encoding="utf-8")
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|user|>\nSum?\n<|assistant|>\nThree.<eos>\n"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    assert is_chat_template_stop_token_trained(tokenizer)


@pytest.mark.parametrize("resumes", [False, True])
def test_slurm_script_starts_and_resumes_on_every_node(resumes, run_script, tmp_path):
    if resumes:
        (tmp_path / "out" / "checkpoint-10").mkdir(parents=True)
        (tmp_path / "out" / "checkpoint-10" / "trainer_state.json").touch()
    launched, (_, args, _) = run_script(
        *("slurm.sh", "--use_cpu", "--bf16", "False"),
        DATA="data.jsonl",
        OUTPUT_DIR=str(tmp_path / "out"),
        SLURM_JOB_NODELIST="node[1-2]",
        SLURM_NNODES="2",
        SLURM_CPUS_PER_TASK="64",
    )
    assert launched.config_file == "accelerate_configs/fsdp_multi_node.yaml"
    assert (launched.num_machines, launched.num_processes, launched.machine_rank) == (2, 16, 1)
    assert launched.main_process_ip == "node1"
    assert args.resume_from_checkpoint == ("True" if resumes else None)
