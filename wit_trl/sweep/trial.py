"""A trial of `wit-trl sweep`, in each of its processes: it trains a model, measures it and writes the result."""

import hashlib
import importlib
import itertools
import json
import math
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from huggingface_hub import snapshot_download
from trl import DatasetMixtureConfig, ModelConfig

from ..cli import end_with_launcher
from ..cli.arguments import (
    TRAINING_TYPES,
    Arguments,
    Flags,
    errors_in_one_sentence,
    refusals_in_one_sentence,
    split_debug,
)
from ..cli.loading import TEST_SPLIT, load_data, select_splits
from ..cli.sft import prepare
from ..conversation.chat_template import tokenizer_of
from ..trainer import WITSFTTrainer
from .arguments import RETENTION_METRIC, SweepArguments
from .retention import answers, can_answer, general_prompts, prompts_of


TRIAL_TYPES = (SweepArguments, *TRAINING_TYPES)
SHOWN_PROMPTS = 3  # number of prompts whose answers the report shows
_MODEL_FILES = (".bin", ".jinja", ".json", ".model", ".safetensors", ".txt")  # and not a README, or logs
_POSITIONS = ("step", "epoch")  # in a log, besides what was measured
STEP = "step: "  # begins the lines of the log that say what a trial is at
REFUSAL = "refusal.txt"  # why a trial, and with it the sweep, does not go on


def _tell(step: str) -> None:
    print(f"{STEP}{step}", flush=True)


def metric_function(name: str) -> Callable[[WITSFTTrainer], float]:
    """
    Returns the function that `file.py:function` names, or `module:function` of an installed module. Raises `ValueError`
    if there is none.
    """
    module, _, function = name.rpartition(":")
    if module.endswith(".py") and not Path(module).is_file():
        raise ValueError(f"--metric is {name}, but there is no file {module}.")
    found = runpy.run_path(module) if module.endswith(".py") else vars(importlib.import_module(module))
    if not callable(found.get(function)):
        raise ValueError(f"--metric is {name}, but {module} has no function {function}.")
    return found[function]


def evaluation_sets(trial: SweepArguments, arguments: Arguments, trainer: WITSFTTrainer) -> dict[str, Dataset]:
    """Returns the rows of the task's test split, without a prefix, and of other sets, by their metrics' prefix."""
    # Streams are read as stored rows, which can be told apart
    script_args = replace(arguments.script, dataset_streaming=False)
    loaded = {"": load_data(script_args, replace(arguments.dataset, streaming=False))}
    for name, _, path in (other.partition("=") for other in trial.eval_dataset):
        other_args = replace(script_args, dataset_name=path, dataset_config=None)
        loaded[f"{name}_"] = load_data(other_args, DatasetMixtureConfig())
    sets = {}
    for prefix, dataset in loaded.items():
        split = next(iter(dataset)) if prefix and len(dataset) == 1 else script_args.dataset_test_split
        (sets[prefix],) = select_splits(dataset, {TEST_SPLIT: split}, trainer.processing_class, trainer.args)
    return sets


def digest_of_rows(rows: Dataset | IterableDataset) -> str:
    """Returns a hash of all rows, or of the first 1,000 of a stream: the same, in whatever pieces they are stored."""
    digest = hashlib.sha256()
    for table in itertools.islice(rows.with_format("arrow").iter(1000), None if isinstance(rows, Dataset) else 1):
        # To take them writes them anew, without what a slice or a null may hide
        table, sink = table.combine_chunks().take(np.arange(len(table))), pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema.remove_metadata()) as stream:
            stream.write_table(table.replace_schema_metadata())
        digest.update(sink.getvalue())
    return digest.hexdigest()


def digest_of_model(model: ModelConfig) -> str:
    """Returns a hash of the files of a model and its tokenizer, or of the commit of a repository of the Hub."""
    digest, folder = hashlib.sha256(), Path(model.model_name_or_path)
    if not folder.is_dir():  # it is in the cache, in a folder that its commit names
        commit = Path(snapshot_download(str(folder), revision=model.model_revision, local_files_only=True)).name
        digest.update(commit.encode())
    for path in sorted(folder.glob("*")):
        if path.suffix in _MODEL_FILES:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def check_fingerprints(found: dict[str, str], folder: Path) -> None:
    """Raises `ValueError` if the base was measured with something else, and writes it for the worker to read."""
    known = json.loads((folder.parent / "base" / "result.json").read_text()).get("fingerprints", found)
    if changed := [name for name in found if found[name] != known.get(name)]:
        refusal = (
            f"The {' and the '.join(changed)} changed since the sweep in {folder.parent} began: its trials would not "
            "compare. Put back what there was, or start a new sweep in another --output_dir."
        )
        (folder / REFUSAL).write_text(refusal, encoding="utf-8")
        raise ValueError(refusal)


def mean_losses(rows: Dataset) -> dict[str, float]:
    """Returns the mean loss of each region that has tokens."""
    tokens = {region: sum(rows[f"{region}_tokens"]) for region in ("prompt", "completion")}
    return {region: sum(rows[f"{region}_nll"]) / count for region, count in tokens.items() if count}


def answer_as_base(trial: SweepArguments, trainer: WITSFTTrainer) -> None:
    """Writes the answers of the base model to the prompts of the sweep, and the prompts that the report shows."""
    folder, count, shown = Path(trainer.args.output_dir), trial.retention_prompts, []
    if can_answer(trainer):
        general = general_prompts(tokenizer_of(trainer.processing_class))
        held_out = prompts_of(trainer.eval_dataset, max(count, SHOWN_PROMPTS))
        shown = (held_out or general)[:SHOWN_PROMPTS]
        prompts = held_out[:count] + general if count else []
        rows = [
            {"input_ids": prompt + answer, "completion_mask": [0] * len(prompt) + [1] * len(answer)}
            for prompt, answer in zip(prompts, answers(trainer, prompts), strict=True)
        ]
        if trainer.is_world_process_zero():
            Dataset.from_list(rows).to_parquet(folder / "answers.parquet")
    if trainer.is_world_process_zero():
        (folder / "shown_prompts.json").write_text(json.dumps(shown))
    trainer.accelerator.wait_for_everyone()


def run_benchmarks(tasks: list[str], trainer: WITSFTTrainer) -> tuple[dict[str, float], dict[str, bool]]:
    """Returns what lm-evaluation-harness measures, as `eval_TASK_METRIC`, and whether more is better."""
    import lm_eval  # of the extra `eval`
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = trainer.accelerator.unwrap_model(trainer.model).eval(), tokenizer_of(trainer.processing_class)
    model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=trainer.args.eval_batch_size)
    given = [str(Path(task).absolute()) if task.endswith(".yaml") else task for task in tasks]
    # Only the first process of a machine has the results
    measured = lm_eval.simple_evaluate(model=model, tasks=given, bootstrap_iters=0, log_samples=False)
    (found,) = broadcast_object_list([measured])
    metrics, greater_is_better = {}, {}
    for task, measured in found["results"].items():
        for name, value in measured.items():
            metric, _, variant = name.partition(",")
            if isinstance(value, int | float) and variant and not metric.endswith("_stderr"):
                full_name = f"eval_{task}_{metric}" if variant == "none" else f"eval_{task}_{metric}_{variant}"
                metrics[full_name] = float(value)
                greater_is_better[full_name] = bool(found["higher_is_better"][task].get(metric, True))
    return metrics, greater_is_better


def measure(trial: SweepArguments, trainer: WITSFTTrainer, sets: dict[str, Dataset]) -> dict[str, Any]:
    """Returns the metrics of a trained model and its answers to a few prompts. Writes the losses of all rows."""
    folder = Path(trainer.args.output_dir)
    base = folder.parent / "base"
    logged = (item for log in trainer.state.log_history for item in log.items())
    metrics = {name: value for name, value in logged if isinstance(value, int | float) and name not in _POSITIONS}
    if trial.retention_prompts:
        sets = sets | {"retention_": Dataset(pq.read_table(base / "answers.parquet"))}
    for prefix, dataset in sets.items():
        rows = trainer.evaluate_rows(dataset)
        if trainer.is_world_process_zero():
            rows.to_parquet(folder / f"{prefix}rows.parquet")
        trainer.accelerator.wait_for_everyone()
        losses = mean_losses(rows)
        if prefix == "retention_":
            before = mean_losses(Dataset(pq.read_table(base / "retention_rows.parquet")))
            metrics[RETENTION_METRIC] = losses["completion"] - before["completion"]
        else:
            metrics |= {f"eval_{prefix}{region}_loss": loss for region, loss in losses.items()}
    greater_is_better: dict[str, bool] = {}
    if trial.lm_eval_tasks:
        of_benchmarks, greater_is_better = run_benchmarks(trial.lm_eval_tasks, trainer)
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
    """Runs a trial in this process. In the folder `base`, it measures the model as it is, and writes its answers."""
    args, debug = split_debug(args)
    end_with_launcher()
    with errors_in_one_sentence(debug):
        flags = Flags(TRIAL_TYPES, args)
        trial, arguments = flags.make(SweepArguments), flags.check()
        folder = Path(arguments.training.output_dir)
        _tell("loading the model and preparing the rows")
        trainer, dataset = prepare(arguments)
        sets = evaluation_sets(trial, arguments, trainer)
        known = {}
        if trainer.is_world_process_zero():
            rows = {"training rows": dataset[arguments.script.dataset_train_split]}
            rows |= {f"test rows {prefix[:-1]}".strip(): tests for prefix, tests in sets.items()}
            known = {name: digest_of_rows(part) for name, part in rows.items()}
            known["model"] = digest_of_model(arguments.model)
            known["chat template"] = str(tokenizer_of(trainer.processing_class).chat_template)
            if folder.name != "base":
                check_fingerprints(known, folder)
        if ":" in trial.metric:
            metric_function(trial.metric)
        if trial.retention_prompts and not can_answer(trainer):
            raise ValueError(
                "The model cannot answer prompts under FSDP1, where processes share a sequence, or with images. Set "
                "--retention_prompts 0, and name what should be kept with --eval_dataset."
            )

    with refusals_in_one_sentence(debug):
        _tell("training")
        trainer.train()
        _tell("measuring")
        if folder.name == "base":
            answer_as_base(trial, trainer)
        elif trial.keep != "none":
            trainer.save_model(str(folder / "model"))
        result = measure(trial, trainer, sets) | {"fingerprints": known}
    for name, value in result["metrics"].items():
        if not math.isfinite(value) and (name.startswith("eval_") or name == trial.metric):
            sys.exit(f"error: The training diverged: {name} is {value}.")
    if trainer.is_world_process_zero():
        (folder / "result.part").write_text(json.dumps(result))
        (folder / "result.part").rename(folder / "result.json")
    trainer.end()


if __name__ == "__main__":
    main()
