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

`--dataset_name` is a Hub name, a local folder or a local file (`.jsonl`, `.json`, `.csv`, `.parquet`), in a format of
TRL or in that of Alpaca, Dolly, ShareGPT or the original WIT scripts.
`--resume_from_checkpoint True` goes on from the last complete checkpoint of `--output_dir`.
"""

from pathlib import Path

import matplotlib.pyplot as plt
from transformers import AutoProcessor
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from wit_trl import WITSFTConfig, WITSFTTrainer
from wit_trl.cli.arguments import errors_in_one_sentence, parse_arguments
from wit_trl.cli.data import load_data, select_splits
from wit_trl.embedded import load_stdlib_functions, save_embedded_model, train_embedded_tokenizer


def plot_losses(log_history: list[dict], path: Path) -> None:
    """Draws the loss of both regions, in training and in evaluation, over the steps."""
    _, axes = plt.subplots(figsize=(7, 4))
    for region, colour in (("prompt", "tab:blue"), ("completion", "tab:orange")):
        for prefix, style in (("", ".-"), ("eval_", "o--")):
            key = f"{prefix}{region}_loss"
            # Without the summary, whose losses are those of the few steps since the last log
            points = [(log["step"], log[key]) for log in log_history if key in log and "train_loss" not in log]
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
            save_embedded_model(train_embedded_tokenizer(dataset), output_dir / "base")
        training_args.distributed_state.wait_for_everyone()
    with errors_in_one_sentence():
        if not embedded:
            dataset = load_data(script_args, dataset_args)
        processing_class = AutoProcessor.from_pretrained(
            model_args.model_name_or_path,
            revision=model_args.model_revision,
            trust_remote_code=training_args.trust_remote_code,
        )
        evaluates = training_args.eval_strategy != "no" or training_args.eval_on_start
        splits = [script_args.dataset_train_split] + [script_args.dataset_test_split] * evaluates
        datasets = select_splits(dataset, splits, processing_class, training_args)

        training_args.model_init_kwargs = {
            "revision": model_args.model_revision,
            "attn_implementation": model_args.attn_implementation,
            "dtype": model_args.dtype,
            **(training_args.model_init_kwargs or {}),
        }
        trainer = WITSFTTrainer(
            model=model_args.model_name_or_path,
            args=training_args,
            train_dataset=datasets[script_args.dataset_train_split],
            eval_dataset=datasets[script_args.dataset_test_split] if evaluates else None,
            processing_class=processing_class,
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
        inputs = processing_class(prompt, return_tensors="pt", return_token_type_ids=False).to(trainer.model.device)
        generated = trainer.model.generate(**inputs, max_new_tokens=80, do_sample=False)
        completion = processing_class.decode(generated[0, inputs["input_ids"].size(1) :])
        say(f"\nA held-out prompt:\n\n{prompt}\nWhat the model writes:\n\n{completion}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()


if __name__ == "__main__":
    main(*parse_arguments((ScriptArguments, WITSFTConfig, ModelConfig, DatasetMixtureConfig)))
