"""A worker of `wit-trl sweep`: it measures the base model, runs trials until none is left, and reports."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock
from optuna import Trial
from optuna.trial import TrialState
from rich.console import Console
from rich.progress import Progress

from ..embedded import load_stdlib_functions, save_embedded_model, train_embedded_tokenizer
from .arguments import BASELINE, TASK_METRIC, SweepArguments, name_of
from .report import html_page, plot, show
from .results import SweepResults
from .study import SweepStudy, TrialSettings


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


def train(config: dict[str, Any], folder: Path) -> str | None:
    """Trains in other processes. Returns `None` if there is a result, and else the end of the log."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)
    config = config | {"output_dir": str(folder), "sweep_process": os.getpid()}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    command = [sys.executable, "-m", "wit_trl.sweep.trial_launcher", "--config", str(folder / "config.yaml")]
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        # In a session of its own, which Ctrl-C does not reach
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait()
        except BaseException:
            process.kill()  # the training ends with its launcher
            raise
    if status == 0 and (folder / "result.json").exists():
        return None
    lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([*lines[-_LOG_LINES:], f"It ended with the status {status}."])


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
        self._config_of_trials = {
            "print_weight_report": False,
            "main_process_port": 0,  # any free one, since several workers may share a machine
            **config,
            **measured,
            "keep": sweep.keep,
            "metric": sweep.metric,
        }

    def prepare(self) -> None:
        """
        Measures the model before training, writes its answers, and prepares the data for all trials. The first worker
        does it, while the others wait. Raises `ValueError` if it fails, as every trial would.
        """
        base = self.folder / "base"
        with FileLock(self.folder / "base.lock"):
            if (base / "result.json").exists():
                return
            if self.is_embedded:
                self._save_embedded()
            self.console.print("Measuring the model before any training ...")
            config = self._config_of_trials | TrialSettings(BASELINE, self.sweep.seeds[0]).as_config() | _ONE_IDLE_STEP
            config.pop("lr_scheduler_kwargs", None)
            if error := train(config, base):
                raise ValueError(f"The model cannot be measured. The end of {base / 'log.txt'}:\n{error}")

    def _save_embedded(self) -> None:
        dataset = load_stdlib_functions()
        for split, rows in dataset.items():
            rows.to_parquet(self.folder / "embedded" / "data" / f"{split}.parquet")
        save_embedded_model(train_embedded_tokenizer(dataset), self.folder / "embedded" / "model")

    def work(self) -> None:
        """Runs trials until none is left, in this worker and in all others."""
        self.study.add(TrialSettings(pair, seed) for seed in self.sweep.seeds for pair in self.sweep.all_pairs())
        with Progress(console=self.console, disable=not self.console.is_terminal) as progress:
            bar = progress.add_task("")
            while True:
                trial = self.study.take()
                states = Counter(trial.state for trial in self.study.trials)
                done, running, left = (states[s] for s in (TrialState.COMPLETE, TrialState.RUNNING, TrialState.WAITING))
                counts = f"{done} done, {running} running, {left} left"
                progress.update(bar, description=counts, completed=done, total=done + running + left)
                if trial is not None:
                    self._run(trial, counts)
                elif running or left:
                    time.sleep(_POLL_SECONDS)
                else:
                    return

    def _run(self, trial: Trial, counts: str) -> None:
        settings, folder, start = TrialSettings.of(trial), self.study.folder_of(trial), time.monotonic()
        name = f"ratio {name_of(settings.pair)}, seed {settings.seed}"
        self.console.print(f"{counts}: {name} ...")
        error = train(self._config_of_trials | settings.as_config(), folder)
        seconds = round(time.monotonic() - start, 1)
        if self.sweep.keep != "all":
            for checkpoint in folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
        if error is not None:
            self.study.tell(trial, None, seconds=seconds, error=error)
            self.console.print(f"{name} failed. The end of {folder / 'log.txt'}:\n{error}", markup=False)
            return
        loss = json.loads((folder / "result.json").read_text(encoding="utf-8"))["metrics"][TASK_METRIC]
        self.study.tell(trial, loss, seconds=seconds)
        self.console.print(f"{name}: {TASK_METRIC} {loss:.4f}, {seconds:.0f} s")
        results = self.results()
        self._drop_models(results, {results.best_of(pair).number for pair in results.pairs})

    def results(self) -> SweepResults:
        clips = self.config.get("max_grad_norm", 1.0) > 0
        return SweepResults(self.study, self.sweep.metric, self.config.get("greater_is_better"), clips)

    def _drop_models(self, results: SweepResults, kept: Collection[int]) -> None:
        """Removes the models of all trials except those with these numbers. `--keep all` keeps them all."""
        for trial in results.done:
            if self.sweep.keep != "all" and trial.number not in kept:
                shutil.rmtree(trial.folder / "model", ignore_errors=True)

    def report(self) -> None:
        """Prints the results, and writes them to files in the folder."""
        results = self.results()
        chosen = results.best_of(results.choice.pair)
        self._drop_models(results, {chosen.number})
        show(self.console, results)
        best = self.config | chosen.settings.as_config() | {"output_dir": str(self.folder / "best")}
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
        self.console.print(f"Written to {self.folder}: {', '.join(contents)}", soft_wrap=True)
        model = chosen.folder / "model"
        to_train = f"To train the best model: wit-trl sft --config {self.folder / 'best.yaml'}"
        self.console.print(f"The best model: {model}" if model.exists() else to_train, soft_wrap=True)
