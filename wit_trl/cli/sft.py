"""`wit-trl sft`: the training, in each of the processes that `launch.py` starts, or of `examples/sft_wit.py`."""

import importlib.util
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from datasets import DatasetDict, IterableDatasetDict
from transformers import AutoProcessor
from transformers.integrations import get_available_reporting_integrations
from trl import ModelConfig, get_peft_config, get_quantization_config

from ..config import WITSFTConfig
from ..embedded import load_stdlib_functions, save_embedded_model, train_embedded_tokenizer
from ..trainer import WITSFTTrainer
from ..training.checkpoints import checkpoint_to_resume
from . import end_with_launcher
from .arguments import (
    TRAINING_TYPES,
    Arguments,
    Flags,
    check_packages,
    errors_in_one_sentence,
    refusals_in_one_sentence,
    split_debug,
)
from .loading import TEST_SPLIT, TRAIN_SPLIT, errors_of_data, errors_of_model, load_data, select_splits


def check_output_dir(folder: Path) -> None:
    """Raises `ValueError` if nothing can be written to the output folder. It does not create it."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"Nothing can be written to the output folder {folder}. Choose another one with --output_dir.")


def plot_losses(log_history: list[dict], path: Path) -> None:
    """Draws the losses of both regions over the steps, in training and in evaluation."""
    from matplotlib.figure import Figure  # of the extra `plot`

    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for region, colour in (("prompt", "tab:blue"), ("completion", "tab:orange")):
        for prefix, style in (("", ".-"), ("eval_", "o--")):
            key = f"{prefix}{region}_loss"
            # The summary of the training repeats the losses of its last few steps
            points = [(log["step"], log[key]) for log in log_history if key in log and "train_loss" not in log]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=colour, label=key)
    axes.set(xlabel="step", ylabel="nats per token", title="Unweighted loss of each region")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def embedded_data(training_args: WITSFTConfig, model_args: ModelConfig) -> DatasetDict:
    """Returns the embedded data set, and sets the model's name. The first process saves this model."""
    dataset = load_stdlib_functions()
    folder = Path(training_args.output_dir) / "base"
    model_args.model_name_or_path = str(folder)
    if training_args.process_index == 0:
        save_embedded_model(train_embedded_tokenizer(dataset), folder)
    training_args.distributed_state.wait_for_everyone()
    return dataset


def prepare(arguments: Arguments) -> tuple[WITSFTTrainer, DatasetDict | IterableDatasetDict]:
    """
    Returns the trainer, and the data set that its splits are from. Without the name of a model, both are embedded.
    Raises `ValueError` if a package, the output folder, the model or a split of the data is missing.
    """
    script_args, training_args, model_args = arguments.script, arguments.training, arguments.model
    for flag, package in (("use_peft", "peft"), ("load_in_4bit", "bitsandbytes"), ("load_in_8bit", "bitsandbytes")):
        if getattr(model_args, flag):
            check_packages(f"--{flag}", package)
    # transformers does not list flyte
    for name in {*training_args.report_to} - {*get_available_reporting_integrations(), "flyte"}:
        raise ValueError(f"--report_to {name} needs a package that is not here. Install it, or pass --report_to none.")
    check_output_dir(Path(training_args.output_dir))
    if model_args.model_name_or_path is None:
        dataset = embedded_data(training_args, model_args)
    else:
        dataset = load_data(script_args, arguments.dataset)
    name = model_args.model_name_or_path
    with errors_of_model(name):
        processing_class = AutoProcessor.from_pretrained(
            name, revision=model_args.model_revision, trust_remote_code=training_args.trust_remote_code
        )
    splits = {TRAIN_SPLIT: script_args.dataset_train_split}
    if training_args.eval_strategy != "no" or training_args.eval_on_start:
        splits[TEST_SPLIT] = script_args.dataset_test_split
    train_dataset, *eval_dataset = select_splits(dataset, splits, processing_class, training_args)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    with errors_of_data(script_args, arguments.dataset):
        trainer = WITSFTTrainer(
            model=name,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset[0] if eval_dataset else None,
            processing_class=processing_class,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
    return trainer, dataset


def hints(flags: Flags, arguments: Arguments, has_test_split: bool) -> Iterator[str]:
    """Yields what to add to the flags of a training, as far as they may not mean what they say."""
    training, split = arguments.training, arguments.script.dataset_test_split
    if has_test_split and training.eval_strategy == "no" and not training.eval_on_start:
        yield f"The split {split} is not used. To see its losses, add --eval_strategy epoch --eval_on_start True."
    if flags.given.get("prompt_loss_weight") == 0 and "completion_loss_weight" not in flags.given:
        yield (
            f"The weights are (0, {training.completion_loss_weight:g}). For conventional tuning, (0, 1), add "
            "--completion_loss_weight 1."
        )


def report(trainer: WITSFTTrainer, split: str) -> None:
    """Prints the losses on this split and the folder of the model. Draws the curves if matplotlib is installed."""
    output_dir, log_history = Path(trainer.args.output_dir), trainer.state.log_history
    say = trainer.accelerator.print
    for region in ("prompt", "completion"):
        key = f"eval_{region}_loss"
        if losses := [f"{log[key]:.3f}" for log in log_history if key in log]:
            first_and_last = losses[:1] + losses[1:][-1:]
            say(f"{split} {region} loss: {' -> '.join(first_and_last)} nats per token")
    if importlib.util.find_spec("matplotlib") is None:
        say(f"Model saved to {output_dir}. For a picture of the losses, install matplotlib: `pip install matplotlib`.")
        return
    if trainer.is_world_process_zero():
        plot_losses(log_history, output_dir / "losses.png")
    say(f"Model and loss curves (losses.png) saved to {output_dir}.")


def show_sample(trainer: WITSFTTrainer, prompt: str) -> None:
    """Prints what the model writes after a prompt."""
    tokenizer = trainer.processing_class
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(trainer.model.device)
    generated = trainer.model.generate(**inputs, max_new_tokens=80, do_sample=False)
    completion = tokenizer.decode(generated[0, inputs["input_ids"].size(1) :])
    trainer.accelerator.print(f"\nA held-out prompt:\n\n{prompt}\nWhat the model writes:\n\n{completion}")


def main(args: Sequence[str] | None = None) -> None:
    """Trains in this process, saves the model and reports. `args` are the flags, by default those of the process."""
    args, debug = split_debug(args)
    end_with_launcher()
    with errors_in_one_sentence(debug):
        flags = Flags(TRAINING_TYPES, args)
        if flags.launch_on_line:
            raise ValueError(
                f"{flags.launch_on_line[0]} is a flag of the launcher. Give it to `wit-trl sft`, or to "
                "`accelerate launch` before the name of the script."
            )
        arguments = flags.check()
        trainer, dataset = prepare(arguments)
        resume = arguments.training.resume_from_checkpoint
        resume = {"true": True, "false": False}.get(str(resume).lower(), resume)
        if isinstance(resume, str) and not Path(resume).is_dir():
            raise ValueError(
                f"--resume_from_checkpoint is {resume}, but there is no such folder. True takes the last one."
            )
        resume = checkpoint_to_resume(resume, arguments.training)

    for hint in hints(flags, arguments, arguments.script.dataset_test_split in dataset):
        trainer.accelerator.print(hint)
    try:
        with refusals_in_one_sentence(debug):
            trainer.train(resume_from_checkpoint=resume)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    trainer.save_model()
    report(trainer, arguments.script.dataset_test_split)
    if flags.is_embedded and not trainer.is_fsdp_enabled:  # the model is whole
        show_sample(trainer, dataset["validation"][0]["prompt"])
    if arguments.training.push_to_hub:
        trainer.push_to_hub(dataset_name=arguments.script.dataset_name)
    trainer.end()


if __name__ == "__main__":
    main()
