"""
Fine-tune a language model with Weighted Instruction Tuning, with the flags of TRL's own `sft.py`.

# The embedded default: offline, on any device, in minutes
python examples/sft_wit.py

# Full fine-tuning
accelerate launch --config_file accelerate_configs/single_device.yaml examples/sft_wit.py \
    --model_name_or_path Qwen/Qwen2.5-0.5B \
    --dataset_name trl-lib/Capybara \
    --prompt_loss_weight 0.2 \
    --completion_loss_weight 0.8 \
    --output_dir Qwen2.5-0.5B-WIT

# LoRA: add --use_peft --learning_rate 2e-4
# QLoRA: add --use_peft --load_in_4bit --learning_rate 2e-4

`--dataset_name` is a Hub name, a local folder or a local file (`.jsonl`, `.json`, `.csv`, `.parquet`).
`--resume_from_checkpoint True` goes on from the last complete checkpoint of `--output_dir`.
"""

import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from datasets import DatasetDict, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)

from wit_trl import WITSFTConfig, WITSFTTrainer
from wit_trl.stdlib_functions import load_stdlib_functions


# What the embedded default sets differently from TRL. Any of it can be changed on the command line.
EMBEDDED_DEFAULTS = {
    "output_dir": "runs/sft_wit",
    "dataset_test_split": "validation",
    "max_length": 256,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 32,
    "num_train_epochs": 1,
    "logging_steps": 10,
    "eval_strategy": "steps",
    "eval_steps": 91,
    "eval_on_start": True,
    "save_strategy": "no",
    "report_to": "none",
    "bf16": False,
    "gradient_checkpointing": False,
}


def build_embedded_model(dataset: DatasetDict, folder: Path) -> None:
    """Trains a tokenizer on the data set and saves it to `folder` with a small, randomly initialised Llama."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        (row["prompt"] + row["completion"] for row in dataset["train"]),
        trainers.BpeTrainer(vocab_size=2048, special_tokens=["<pad>", "<eos>"]),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def load_data(script_args: ScriptArguments, dataset_args: DatasetMixtureConfig) -> DatasetDict:
    if dataset_args.datasets:
        return get_dataset(dataset_args)
    path = Path(script_args.dataset_name)
    if path.is_file():
        loader = {"jsonl": "json", "txt": "text"}.get(path.suffix[1:], path.suffix[1:])
        return load_dataset(loader, data_files=str(path), streaming=script_args.dataset_streaming)
    return load_dataset(
        script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming
    )


def plot_losses(log_history: list[dict], path: Path) -> None:
    """Draws the loss of both regions, in training and in evaluation, over the steps."""
    _, axes = plt.subplots(figsize=(7, 4))
    for region, colour in (("prompt", "tab:blue"), ("completion", "tab:orange")):
        for prefix, style in (("", "-"), ("eval_", "o--")):
            points = [(log["step"], log[key]) for log in log_history if (key := f"{prefix}{region}_loss") in log]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=colour, label=f"{prefix}{region}_loss")
    axes.set(xlabel="step", ylabel="nats per token", title="Unweighted loss of each region")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    plt.savefig(path, dpi=120, bbox_inches="tight")


def main(
    script_args: ScriptArguments,
    training_args: WITSFTConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> None:
    output_dir = Path(training_args.output_dir)
    embedded = model_args.model_name_or_path is None
    if embedded:
        dataset = load_stdlib_functions()
        model_args.model_name_or_path = str(output_dir / "base")
        if training_args.process_index == 0:
            build_embedded_model(dataset, output_dir / "base")
        training_args.distributed_state.wait_for_everyone()
    else:
        dataset = load_data(script_args, dataset_args)
    evaluates = training_args.eval_strategy != "no" or training_args.eval_on_start
    for split in [script_args.dataset_train_split] + [script_args.dataset_test_split] * evaluates:
        if split not in dataset:
            raise ValueError(
                f"The data set has no split {split!r}, only {list(dataset)}. Choose with --dataset_train_split and "
                "--dataset_test_split, or turn evaluation off with --eval_strategy no."
            )

    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    trainer = WITSFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if evaluates else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )

    resume = training_args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint={"true": True, "false": False}.get(str(resume).lower(), resume))
    trainer.save_model()

    say = trainer.accelerator.print
    log_history = trainer.state.log_history
    for region in ("prompt", "completion"):
        if losses := [log[f"eval_{region}_loss"] for log in log_history if f"eval_{region}_loss" in log]:
            say(f"{script_args.dataset_test_split} {region} loss: {losses[0]:.3f} -> {losses[-1]:.3f} nats per token")
    if trainer.is_world_process_zero():
        plot_losses(log_history, output_dir / "losses.png")
    say(f"Model and loss curves (losses.png) saved to {output_dir}.")

    if embedded and not trainer.is_fsdp_enabled:  # the model is whole
        prompt = dataset["validation"][0]["prompt"]
        tokenizer = AutoTokenizer.from_pretrained(output_dir)
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(trainer.model.device)
        generated = trainer.model.generate(**inputs, max_new_tokens=80, do_sample=False)
        completion = tokenizer.decode(generated[0, inputs["input_ids"].size(1) :])
        say(f"\nA held-out prompt:\n\n{prompt}\nWhat the model writes:\n\n{completion}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()


def parse() -> tuple[ScriptArguments, WITSFTConfig, ModelConfig, DatasetMixtureConfig]:
    parser = TrlParser((ScriptArguments, WITSFTConfig, ModelConfig, DatasetMixtureConfig))
    try:
        arguments = script_args, _, model_args, dataset_args = parser.parse_args_and_config()
    except ValueError as error:
        sys.exit(f"error: {error}" if os.environ.get("RANK", "0") == "0" else 1)
    has_data = bool(script_args.dataset_name or dataset_args.datasets)
    if has_data != (model_args.model_name_or_path is not None):
        sys.exit("error: Pass both --model_name_or_path and --dataset_name, or neither for the embedded default.")
    if has_data:
        return arguments
    parser.set_defaults_with_config(**EMBEDDED_DEFAULTS)
    return parser.parse_args_and_config()


if __name__ == "__main__":
    main(*parse())
