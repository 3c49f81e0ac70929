"""A worker of `wit-trl sweep`: it measures the base model, runs trials until none is left, and reports."""

import json
import math
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock
from optuna import Trial
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from ..cli import LAUNCHER, end_with_launcher, launch
from ..embedded import load_stdlib_functions, save_embedded_model, train_embedded_tokenizer
from .arguments import BASELINE, TASK_METRIC, SweepArguments
from .report import html_page, plot, show
from .results import SweepResults, check_metric
from .study import SweepStudy, TrialSettings, lost_file
from .trial import REFUSAL, STEP, TRIAL_TYPES


# The base model takes a step: some engines evaluate only after one, and the step tells whether the memory suffices
_ONE_IDLE_STEP = {
    "learning_rate": 0.0,
    "max_steps": 1,
    "lr_scheduler_type": "constant",
    "eval_strategy": "epoch",
    "save_strategy": "no",
    "load_best_model_at_end": False,
}
_LOG_LINES = 25  # of a trial that failed
_POLL_SECONDS = 2


def _launch(folder: Path, worker: int) -> None:
    """Launches a trial, in a fork of the worker, which has imported what a launcher needs."""
    os.setsid()  # Ctrl-C does not reach it
    os.environ[LAUNCHER] = str(worker)
    end_with_launcher()
    sys.stdout = sys.stderr = (folder / "log.txt").open("a", encoding="utf-8", buffering=1)
    for stream in (1, 2):
        os.dup2(sys.stdout.fileno(), stream)
    launch.main(["--config", str(folder / "config.yaml")], "wit_trl.sweep.trial", TRIAL_TYPES)


def train(config: dict[str, Any], folder: Path, say: Callable[[str], None] | None = None) -> str | None:
    """Trains in other processes. Returns the end of the log if they fail. Raises `ValueError` if no trial may go on."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("result.json", REFUSAL):
        (folder / name).unlink(missing_ok=True)
    config = config | {"output_dir": str(folder)}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    (folder / "log.txt").write_text("")
    process = multiprocessing.get_context("fork").Process(target=_launch, args=(folder, os.getpid()))
    process.start()
    lines = []
    try:
        with (folder / "log.txt").open(encoding="utf-8", errors="replace") as log:
            while process.is_alive():
                process.join(_POLL_SECONDS)
                lines += (new := log.readlines())
                for line in new:
                    if say is not None and line.startswith(STEP):
                        say(line.removeprefix(STEP).rstrip())
    except BaseException:
        process.kill()  # the training ends with its launcher
        raise
    if (folder / REFUSAL).exists():
        raise ValueError((folder / REFUSAL).read_text(encoding="utf-8"))
    if process.exitcode == 0 and (folder / "result.json").exists():
        return None
    return "".join([*lines[-_LOG_LINES:], f"It ended with the status {process.exitcode}."])


def time_left(trials: Collection[FrozenTrial]) -> timedelta:
    """Returns how long the trials take that run or wait, if as many as now go on running side by side."""
    seconds = [trial.user_attrs["seconds"] for trial in trials if trial.state == TrialState.COMPLETE]
    running, waiting = (sum(trial.state == s for trial in trials) for s in (TrialState.RUNNING, TrialState.WAITING))
    return timedelta(seconds=round(statistics.mean(seconds) * math.ceil((running + waiting) / running)))


class SweepWorker:
    """A worker of a sweep. Several may work in one folder. `config` has the flags that all trials share."""

    def __init__(self, sweep: SweepArguments, config: dict[str, Any], is_embedded: bool):
        self.sweep, self.config, self.is_embedded = sweep, config, is_embedded
        self.folder, self.console = Path(config["output_dir"]), Console()
        self.folder.mkdir(parents=True, exist_ok=True)
        measured = {name: getattr(sweep, name) for name in ("eval_dataset", "retention_prompts", "lm_eval_tasks")}
        # The place of a sweep may change while it is under way, and so may the reading of its metric
        may_change = {"output_dir", "greater_is_better"}
        if is_embedded:
            may_change |= {"model_name_or_path", "dataset_name"}
        settings = {name: value for name, value in (config | measured).items() if name not in may_change}
        self.study = SweepStudy(self.folder, sweep.storage, settings)
        # Any free port, since several workers may share a machine
        defaults = {"print_weight_report": False, "main_process_port": 0}
        self._config_of_trials = defaults | config | measured | {"keep": sweep.keep, "metric": sweep.metric}

    def prepare(self) -> None:
        """Measures the model before training. The first worker does it, while the others wait."""
        base = self.folder / "base"
        with FileLock(self.folder / "base.lock"):
            if lost_file(base):
                self._measure(base)
        check_metric(self.sweep.metric, json.loads((base / "result.json").read_text())["metrics"])

    def _measure(self, base: Path) -> None:
        start = time.monotonic()
        if self.is_embedded:
            self._say("Writing the embedded data and model ...")
            dataset = load_stdlib_functions()
            for split, rows in dataset.items():
                rows.to_parquet(self.folder / "embedded" / "data" / f"{split}.parquet")
            save_embedded_model(train_embedded_tokenizer(dataset), self.folder / "embedded" / "model")
        self._say(f"Measuring the model before any training, with the log {base / 'log.txt'} ...")
        config = self._config_of_trials | TrialSettings(BASELINE, self.sweep.seeds[0]).as_config() | _ONE_IDLE_STEP
        config.pop("lr_scheduler_kwargs", None)
        if error := train(config, base, self._say):
            raise ValueError(f"The model cannot be measured. The end of {base / 'log.txt'}:\n{error}")
        result = json.loads((base / "result.json").read_text())
        metrics, steps = result["metrics"], self.config.get("max_steps", -1)
        if steps <= 0:  # the idle step was that part of an epoch
            steps = self.config.get("num_train_epochs", 3) / result["log_history"][-1]["epoch"]
        of_a_step = metrics["train_runtime"] - metrics.get("eval_runtime", 0)
        seconds = time.monotonic() - start + steps * of_a_step
        count = len(self.sweep.all_pairs()) * len(self.sweep.seeds)
        trial, together = (timedelta(seconds=round(n * seconds)) for n in (1, count))
        self._say(
            f"A trial of {steps:.0f} steps takes about {trial}, and all {count} together {together}. Fewer --ratios or "
            "--seeds, or a smaller --max_steps, make it shorter."
        )

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False, highlight=False)

    def work(self) -> None:
        """Runs trials until none is left, in this worker and in all others."""
        wanted = [TrialSettings(pair, seed) for seed in self.sweep.seeds for pair in self.sweep.all_pairs()]
        for settings, file in self.study.add(wanted).items():
            self._say(f"{file} is missing or cut off. The trial is repeated: {settings}.")
        while True:
            trial = self.study.take()
            states = Counter(trial.state for trial in self.study.trials)
            done, running, left = (states[s] for s in (TrialState.COMPLETE, TrialState.RUNNING, TrialState.WAITING))
            if trial is not None:
                counts = f"{done} done, {running} running, {left} left"
                self._run(trial, f"{counts}, {time_left(self.study.trials)} to go" if done else counts)
            elif running or left:
                time.sleep(_POLL_SECONDS)
            else:
                return

    def _run(self, trial: Trial, counts: str) -> None:
        settings, folder, start = TrialSettings.of(trial), self.study.folder_of(trial), time.monotonic()
        self._say(f"{counts}: {settings} ...")
        error = train(self._config_of_trials | settings.as_config(), folder)
        seconds = round(time.monotonic() - start, 1)
        if self.sweep.keep != "all":
            for checkpoint in folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
        if error is not None:
            self.study.tell(trial, None, seconds=seconds, error=error)
            self._say(f"{settings} failed. The end of {folder / 'log.txt'}:\n{error}")
            return
        loss = json.loads((folder / "result.json").read_text(encoding="utf-8"))["metrics"][TASK_METRIC]
        self.study.tell(trial, loss, seconds=seconds)
        self._say(f"{settings}: {TASK_METRIC} {loss:.4f}, {seconds:.0f} s")
        results = self.results()
        self._drop_models(results, {results.best_of(pair).trial for pair in results.pairs})

    def results(self) -> SweepResults:
        clips = self.config.get("max_grad_norm", 1.0) > 0
        return SweepResults(self.study, self.sweep.metric, self.config.get("greater_is_better"), clips)

    def _drop_models(self, results: SweepResults, kept: Collection[int]) -> None:
        """Removes the models of all trials except those with these numbers. `--keep all` keeps them all."""
        for trial in results.done:
            if self.sweep.keep != "all" and trial.trial not in kept:
                shutil.rmtree(trial.folder / "model", ignore_errors=True)

    def report(self) -> None:
        """Prints the results, and writes them to files in the folder."""
        results = self.results()
        self._drop_models(results, {results.best.trial})
        show(self.console, results)
        best = self.config | results.best.settings.as_config() | {"output_dir": str(self.folder / "best")}
        if not best.get("load_best_model_at_end"):
            best["eval_strategy"] = "epoch"  # it evaluates after the last step too
        image, conclusion = plot(results), results.sentences()[0]
        heading = f"model: {best['model_name_or_path']}\ndata set: {best.get('dataset_name', 'a mixture')}"
        lines = [json.dumps(trial.as_json(), ensure_ascii=False) + "\n" for trial in results.trials]
        contents = {
            "sweep.jsonl": "".join(lines).encode(),
            "best.yaml": f"# {conclusion}\n{yaml.safe_dump(best, sort_keys=False, allow_unicode=True)}".encode(),
            "sweep.png": image,
            "sweep.html": html_page(results, heading, image).encode(),
        }
        for name, content in contents.items():  # another worker may write the same file: each is replaced as a whole
            part = self.folder / f"{name}.{os.getpid()}.part"
            part.write_bytes(content)
            part.replace(self.folder / name)
        model = results.best.folder / "model"
        to_train = f"To train the best model: wit-trl sft --config {self.folder / 'best.yaml'}"
        self._say(f"Written to {self.folder}: {', '.join(contents)}")
        self._say(f"The best model: {model}" if model.exists() else to_train)
