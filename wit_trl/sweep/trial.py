"""A trial of `wit-trl sweep`, in each of its processes: it trains a model, measures it and writes the result."""

import importlib
import json
import math
import os
import runpy
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers.hf_argparser import HfArg
from trl import DatasetMixtureConfig

from ..cli.arguments import TRAINING_TYPES, Arguments, Flags, errors_in_one_sentence, split_debug
from ..cli.loading import load_data, select_splits
from ..cli.sft import prepare
from ..conversation.chat_template import tokenizer_of
from ..trainer import WITSFTTrainer
from .arguments import RETENTION_METRIC, SweepArguments
from .retention import answers, can_answer, general_prompts, prompts_of


SHOWN_PROMPTS = 3  # number of prompts whose answers the report shows


@dataclass
class TrialArguments(SweepArguments):
    """What `wit-trl sweep` tells a trial."""

    sweep_process: int = HfArg(default=0, help="The process whose end ends this one.")


TRIAL_TYPES = (TrialArguments, *TRAINING_TYPES)


def end_with(process: int) -> None:
    """
    Ends this process soon after its launcher or the given process has ended. Both may be killed before they can end it,
    and no signal of theirs reaches it, because each runs in a session of its own.
    """
    launcher, sweep = os.getppid(), psutil.Process(process)

    def watch() -> None:
        try:
            while os.getppid() == launcher and sweep.is_running() and sweep.status() != psutil.STATUS_ZOMBIE:
                time.sleep(1)
        finally:
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def metric_function(name: str) -> Callable[[WITSFTTrainer], float]:
    """Returns the function that `module:function` or `file.py:function` names. Raises `ValueError` if there is none."""
    module, _, function = name.rpartition(":")
    if not module.endswith(".py"):
        found = vars(importlib.import_module(module))
    elif Path(module).is_file():
        found = runpy.run_path(module)
    else:
        raise ValueError(f"--metric is {name}, but there is no file {module}.")
    if not callable(found.get(function)):
        raise ValueError(f"--metric is {name}, but {module} has no function {function}.")
    return found[function]


def evaluation_sets(trial: TrialArguments, arguments: Arguments, trainer: WITSFTTrainer) -> dict[str, Dataset]:
    """
    Returns the rows of all evaluation sets by prefix: none for the test split of the task, and `NAME_` for the test
    split of another set, or its only split.
    """
    # Streams are read as stored rows, which can be told apart
    script_args = replace(arguments.script, dataset_streaming=False)
    loaded = {"": load_data(script_args, replace(arguments.dataset, streaming=False))}
    for name, _, path in (other.partition("=") for other in trial.eval_dataset):
        loaded[f"{name}_"] = load_data(
            replace(script_args, dataset_name=path, dataset_config=None), DatasetMixtureConfig()
        )
    sets = {}
    for prefix, dataset in loaded.items():
        split = next(iter(dataset)) if prefix and len(dataset) == 1 else script_args.dataset_test_split
        sets[prefix] = select_splits(dataset, [split], trainer.processing_class, trainer.args)[split]
    return sets


def mean_losses(rows: Dataset | dict[str, list]) -> dict[str, float]:
    """Returns the mean loss of each region that has tokens."""
    tokens = {region: sum(rows[f"{region}_tokens"]) for region in ("prompt", "completion")}
    return {region: sum(rows[f"{region}_nll"]) / count for region, count in tokens.items() if count}


def answer_as_base(trial: TrialArguments, trainer: WITSFTTrainer) -> None:
    """Writes the answers of the base model to the prompts of the sweep, and the prompts that the report shows."""
    folder, count, shown = Path(trainer.args.output_dir), trial.retention_prompts, []
    if can_answer(trainer):
        general = general_prompts(tokenizer_of(trainer.processing_class))
        held_out = prompts_of(trainer.eval_dataset, max(count, SHOWN_PROMPTS))
        shown = (held_out or general)[:SHOWN_PROMPTS]
        prompts = held_out[:count] + general if count else []
        rows: dict[str, list] = {"input_ids": [], "completion_mask": []}
        for prompt, answer in zip(prompts, answers(trainer, prompts), strict=True):
            rows["input_ids"].append(prompt + answer)
            rows["completion_mask"].append([0] * len(prompt) + [1] * len(answer))
        if trainer.is_world_process_zero():
            Dataset.from_dict(rows).to_parquet(folder / "answers.parquet")
    if trainer.is_world_process_zero():
        (folder / "shown_prompts.json").write_text(json.dumps(shown))
    trainer.accelerator.wait_for_everyone()


def run_benchmarks(tasks: list[str], trainer: WITSFTTrainer) -> tuple[dict[str, float], dict[str, bool]]:
    """
    Returns what lm-evaluation-harness measures, as `eval_TASK_METRIC`, and for each metric whether more is better. Each
    process evaluates all rows.
    """
    import lm_eval  # of the extra `eval`
    from lm_eval.models.huggingface import HFLM

    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    model = HFLM(
        pretrained=model, tokenizer=tokenizer_of(trainer.processing_class), batch_size=trainer.args.eval_batch_size
    )
    given = [str(Path(task).absolute()) if task.endswith(".yaml") else task for task in tasks]
    # Only the first process of a machine has the results
    (found,) = broadcast_object_list(
        [lm_eval.simple_evaluate(model=model, tasks=given, bootstrap_iters=0, log_samples=False)]
    )
    metrics, greater_is_better = {}, {}
    for task, measured in found["results"].items():
        for name, value in measured.items():
            metric, _, variant = name.partition(",")
            if isinstance(value, int | float) and variant and not metric.endswith("_stderr"):
                full_name = f"eval_{task}_{metric}" if variant == "none" else f"eval_{task}_{metric}_{variant}"
                metrics[full_name] = float(value)
                greater_is_better[full_name] = bool(found["higher_is_better"][task].get(metric, True))
    return metrics, greater_is_better


def measure(trial: TrialArguments, trainer: WITSFTTrainer, sets: dict[str, Dataset]) -> dict[str, Any]:
    """Returns the metrics of a trained model and its answers to a few prompts. Writes the losses of all rows."""
    folder = Path(trainer.args.output_dir)
    base = folder.parent / "base"
    metrics = {
        name: value
        for log in trainer.state.log_history
        for name, value in log.items()
        if isinstance(value, int | float) and name not in ("step", "epoch")
    }
    if trial.retention_prompts:
        sets = sets | {"retention_": Dataset.from_dict(pq.read_table(base / "answers.parquet").to_pydict())}
    for prefix, dataset in sets.items():
        rows = trainer.evaluate_rows(dataset)
        if trainer.is_world_process_zero():
            rows.to_parquet(folder / f"{prefix}rows.parquet")
        trainer.accelerator.wait_for_everyone()
        losses = mean_losses(rows)
        if prefix == "retention_":
            before = mean_losses(pq.read_table(base / "retention_rows.parquet").to_pydict())
            metrics[RETENTION_METRIC] = losses["completion"] - before["completion"]
        else:
            metrics |= {f"eval_{prefix}{region}_loss": loss for region, loss in losses.items()}
    of_benchmarks, greater_is_better = run_benchmarks(trial.lm_eval_tasks, trainer) if trial.lm_eval_tasks else ({}, {})
    metrics |= of_benchmarks
    if ":" in trial.metric:
        metrics[trial.metric] = float(metric_function(trial.metric)(trainer))
    tokenizer = tokenizer_of(trainer.processing_class)
    shown = json.loads((base / "shown_prompts.json").read_text())
    return {
        "metrics": metrics,
        "greater_is_better": greater_is_better,  # of the benchmarks
        "prompts": tokenizer.batch_decode(shown),
        "answers": tokenizer.batch_decode(answers(trainer, shown)),
        "log_history": trainer.state.log_history,
    }


def main(args: Sequence[str] | None = None) -> None:
    """
    Runs a trial in this process. In the base folder, it measures the model as it is, and writes its answers. `args` are
    the flags of the trial, by default those of the process.
    """
    args, debug = split_debug(args)
    with errors_in_one_sentence(debug):
        flags = Flags(TRIAL_TYPES, args)
        trial, arguments = flags.make(TrialArguments), flags.check()
        end_with(trial.sweep_process)
        trainer, _ = prepare(arguments)
        sets = evaluation_sets(trial, arguments, trainer)
        if ":" in trial.metric:
            metric_function(trial.metric)
        if trial.retention_prompts and not can_answer(trainer):
            raise ValueError(
                "The model cannot answer prompts under FSDP1, where processes share a sequence, or with images. Set "
                "--retention_prompts 0, and name what should be kept with --eval_dataset."
            )

    trainer.train()
    folder = Path(arguments.training.output_dir)
    if folder.name == "base":
        answer_as_base(trial, trainer)
    elif trial.keep != "none":
        trainer.save_model(str(folder / "model"))
    result = measure(trial, trainer, sets)
    for name, value in result["metrics"].items():
        if not math.isfinite(value) and (name.startswith("eval_") or name == trial.metric):
            sys.exit(f"error: The training diverged: {name} is {value}.")
    if trainer.is_world_process_zero():
        (folder / "result.part").write_text(json.dumps(result))
        (folder / "result.part").rename(folder / "result.json")
    trainer.end()


if __name__ == "__main__":
    main()
