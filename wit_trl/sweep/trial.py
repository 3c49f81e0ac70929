"""A trial of `wit-trl sweep`, in each of its processes: it trains a model, measures it and writes the result."""

import importlib
import importlib.util
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow.compute as pc
import pyarrow.parquet as pq
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from trl import DatasetMixtureConfig

from ..cli.arguments import TRAINING_TYPES, Arguments, Flags, errors_in_one_sentence, split_debug
from ..cli.loading import load_data, select_splits
from ..cli.sft import prepare
from ..conversation.chat_template import tokenizer_of
from ..trainer import WITSFTTrainer
from .metrics import RETENTION_METRIC, loss_metric, rows_file
from .retention import answers, can_answer, general_prompts, prompts_of, retention_rows


SHOWN_PROMPTS = 3  # number of prompts whose answers the report shows


@dataclass
class TrialArguments:
    """
    What `wit-trl sweep` tells a trial. A trial measures its model on the test split, on all other sets, and on what the
    base model answered.
    """

    base_folder: str = field(default="", metadata={"help": "Folder of what was measured before any training."})
    sweep_process: int = field(default=0, metadata={"help": "The process whose end ends this one."})
    other_sets: list[str] = field(default_factory=list, metadata={"help": "Evaluation sets, as name=data set."})
    retention_prompts: int = field(default=16, metadata={"help": "Number of held-out prompts; 0 for no retention."})
    lm_eval_tasks: list[str] = field(default_factory=list, metadata={"help": "Benchmarks: names, or YAML files."})
    metric_function: str | None = field(default=None, metadata={"help": "Metric, as module:function."})
    save_model: bool = field(default=True, metadata={"help": "Whether the model is saved."})


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
    module_name, _, function_name = name.rpartition(":")
    if Path(module_name).suffix == ".py":
        spec = importlib.util.spec_from_file_location(Path(module_name).stem, module_name)
        if spec is None or spec.loader is None or not Path(module_name).is_file():
            raise ValueError(f"--metric is {name}, but there is no file {module_name}.")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(module_name)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"--metric is {name}, but {module_name} has no function {function_name}.")
    return function


def evaluation_sets(trial: TrialArguments, arguments: Arguments, trainer: WITSFTTrainer) -> dict[str, Dataset]:
    """
    Returns the rows of all evaluation sets by name. The set of the task has an empty name. Each is the test split of
    its data. Other sets than the task's may have a single split of any name instead.
    """
    # Streams are read as stored rows, which can be told apart
    script_args = replace(arguments.script, dataset_streaming=False)
    loaded = {"": load_data(script_args, replace(arguments.dataset, streaming=False))}
    for name, _, path in (other.partition("=") for other in trial.other_sets):
        loaded[name] = load_data(replace(script_args, dataset_name=path, dataset_config=None), DatasetMixtureConfig())
    sets = {}
    for name, dataset in loaded.items():
        split = next(iter(dataset)) if name and len(dataset) == 1 else script_args.dataset_test_split
        sets[name] = select_splits(dataset, [split], trainer.processing_class, trainer.args)[split]
    return sets


def means(name: str, rows: Dataset) -> dict[str, float]:
    """Returns the mean loss of each region of an evaluation set, by the names that the Trainer gives them."""
    metrics = {}
    for region in ("completion", "prompt"):
        if tokens := sum(rows[f"{region}_tokens"]):
            metrics[loss_metric(name, region)] = sum(rows[f"{region}_nll"]) / tokens
    return metrics


def write_rows(rows: Dataset, file: Path, trainer: WITSFTTrainer) -> None:
    """Writes the losses of rows. All processes have them, and the first one writes."""
    if trainer.is_world_process_zero():
        rows.to_parquet(file)
    trainer.accelerator.wait_for_everyone()


def answer_as_base(trial: TrialArguments, trainer: WITSFTTrainer) -> None:
    """Writes the answers of the base model to the prompts of the sweep, and the prompts that the report shows."""
    folder, count, shown = Path(trial.base_folder), trial.retention_prompts, []
    if can_answer(trainer):
        general = general_prompts(tokenizer_of(trainer.processing_class))
        held_out = prompts_of(trainer.eval_dataset, max(count, SHOWN_PROMPTS))
        shown = (held_out or general)[:SHOWN_PROMPTS]
        if count:
            prompts = held_out[:count] + general
            rows = retention_rows(prompts, answers(trainer, prompts))
            if trainer.is_world_process_zero():
                rows.to_parquet(folder / "answers.parquet")
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
    base, folder = Path(trial.base_folder), Path(trainer.args.output_dir)
    metrics = {
        name: value
        for log in trainer.state.log_history
        for name, value in log.items()
        if isinstance(value, int | float) and name not in ("step", "epoch")
    }
    for name, dataset in sets.items():
        rows = trainer.evaluate_rows(dataset)
        metrics |= means(name, rows)
        write_rows(rows, folder / rows_file(name), trainer)
    if trial.retention_prompts:
        rows = trainer.evaluate_rows(Dataset.from_parquet(str(base / "answers.parquet")))
        write_rows(rows, folder / rows_file("retention"), trainer)
        before = pq.read_table(base / rows_file("retention"))
        lost = sum(rows["completion_nll"]) - pc.sum(before["completion_nll"]).as_py()
        metrics[RETENTION_METRIC] = lost / sum(rows["completion_tokens"])
    greater_is_better: dict[str, bool] = {}
    if trial.lm_eval_tasks:
        of_benchmarks, greater_is_better = run_benchmarks(trial.lm_eval_tasks, trainer)
        metrics |= of_benchmarks
    if trial.metric_function is not None:
        metrics[trial.metric_function] = float(metric_function(trial.metric_function)(trainer))
    tokenizer = tokenizer_of(trainer.processing_class)
    shown = json.loads((base / "shown_prompts.json").read_text())
    written = answers(trainer, shown)
    return {
        "metrics": metrics,
        "greater_is_better": greater_is_better,  # of the benchmarks
        "prompts": tokenizer.batch_decode(shown),
        "answers": tokenizer.batch_decode(written),
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
        if trial.metric_function is not None:
            metric_function(trial.metric_function)
        if trial.retention_prompts and not can_answer(trainer):
            raise ValueError(
                "The model cannot answer prompts under FSDP1, where processes share a sequence, or with images. Set "
                "--retention_prompts 0, and name what should be kept with --eval_dataset."
            )

    trainer.train()
    folder = Path(arguments.training.output_dir)
    if folder == Path(trial.base_folder):
        answer_as_base(trial, trainer)
    elif trial.save_model:
        trainer.save_model(str(folder / "model"))
    result = measure(trial, trainer, sets)
    for name, value in result["metrics"].items():
        if not math.isfinite(value) and (name.startswith("eval_") or name == trial.metric_function):
            sys.exit(f"error: The training diverged: {name} is {value}.")
    if trainer.is_world_process_zero():
        (folder / "result.part").write_text(json.dumps(result))
        (folder / "result.part").rename(folder / "result.json")
    trainer.end()


if __name__ == "__main__":
    main()
