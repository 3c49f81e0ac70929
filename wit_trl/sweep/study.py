"""
The trials of a sweep. Optuna holds them, and each is done once, by the worker that takes it.

All workers of a study share its folder. Each trial has a folder there with a lock, which its worker holds until it
ends, in whatever way. So a trial is orphaned if Optuna calls it running and its lock is free.
"""

import contextlib
import json
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from .arguments import Pair, name_of


_MAX_WEIGHT = 1e6  # Optuna needs one


@dataclass(frozen=True, order=True)
class TrialSettings:
    """The pair of weights (prompt, completion) and the seed of a trial."""

    pair: Pair
    seed: int

    @classmethod
    def of(cls, trial: optuna.Trial | FrozenTrial) -> "TrialSettings":
        attributes = trial.user_attrs
        return cls((attributes["prompt_loss_weight"], attributes["completion_loss_weight"]), attributes["seed"])

    def __str__(self) -> str:
        return f"ratio {name_of(self.pair)}, seed {self.seed}"

    def as_config(self) -> dict[str, Any]:
        prompt, completion = self.pair
        return {"prompt_loss_weight": prompt, "completion_loss_weight": completion, "seed": self.seed}


def lost_file(folder: Path) -> Path | None:
    """Returns a file of a trial that is done, or of the base, which is missing or cut off."""
    of_rows = (folder / file.name for file in (folder.parent / "base").glob("*rows.parquet"))
    files = [folder / "result.json", *of_rows]
    if folder.name == "base":  # which the trials read
        files.append(folder / "shown_prompts.json")
        if (folder / "retention_rows.parquet").exists():
            files.append(folder / "answers.parquet")
    for file in files:
        try:
            json.loads(file.read_text()) if file.suffix == ".json" else pq.read_metadata(file)
        except (OSError, ValueError):
            return file
    return None


class SweepStudy:
    """
    The trials of a sweep, in the database of a URL, or else in a journal in its folder. Raises `ValueError` if there
    are trials with other settings.
    """

    def __init__(self, folder: Path, storage: str | None, settings: dict[str, Any]):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder = folder
        self._lock_of_trial: FileLock | None = None
        with self._lock():
            # The name of the folder would not do: it may change, and a database may have several of one name
            name = folder / "study_name.txt"
            if not name.exists():
                name.write_text(uuid.uuid4().hex)
            journal = JournalStorage(JournalFileBackend(str(folder / "study.log"))) if storage is None else storage
            self._study = optuna.create_study(storage=journal, study_name=name.read_text(), load_if_exists=True)
            known = self._study.user_attrs.get("settings", settings)
            changed = sorted(n for n in {*known, *settings} if known.get(n) != settings.get(n))
            if changed and self.trials:
                raise ValueError(
                    f"The study in {folder} has trials with another {', '.join(changed)}. Choose another folder with "
                    "--output_dir, or repeat the flags that it was started with."
                )
            if changed:  # an earlier start measured the base, and came to no trial
                try:
                    with FileLock(folder / "base.lock", timeout=0):
                        shutil.rmtree(folder / "base", ignore_errors=True)
                except Timeout as error:
                    raise ValueError(
                        f"Another worker measures the model in {folder}, with another {', '.join(changed)}. Choose "
                        "another folder with --output_dir, or repeat its flags."
                    ) from error
            self._study.set_user_attr("settings", settings)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """All that writes to the study holds it."""
        with FileLock(self.folder / "study.lock"):
            journal = self.folder / "study.log"
            if journal.exists():
                with journal.open("rb+") as file:
                    # A full disk or a killed worker has cut the last line off. What follows it could not be read
                    file.truncate(file.read().rfind(b"\n") + 1)
            yield

    @property
    def trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def add(self, wanted: Iterable[TrialSettings]) -> dict[TrialSettings, Path]:
        """
        Adds the wanted trials, except those that are done, running or waiting. So a failed one is tried again. One that
        is done but lost a file is repeated: returns these files.
        """
        with self._lock():
            self._free_orphans()
            known, lost = set(), {}
            for trial in self.trials:
                if trial.state == TrialState.COMPLETE and (file := lost_file(self.folder_of(trial))):
                    lost[TrialSettings.of(trial)] = file
                elif trial.state != TrialState.FAIL:
                    known.add(TrialSettings.of(trial))
            new = [settings for settings in dict.fromkeys(wanted) if settings not in known]
            for settings in new:
                self._enqueue(settings)
            return {settings: lost[settings] for settings in new if settings in lost}

    def take(self) -> optuna.Trial | None:
        """Returns a trial, or `None` if none waits. No other worker takes it until `tell` is called."""
        with self._lock():
            self._free_orphans()
            if all(trial.state != TrialState.WAITING for trial in self.trials):
                return None
            trial = self._study.ask()
            self.folder_of(trial).mkdir(exist_ok=True)
            self._lock_of_trial = self._lock_in(trial)
            self._lock_of_trial.acquire(timeout=0)
            for name in ("prompt_loss_weight", "completion_loss_weight"):  # for Optuna's own views
                trial.suggest_float(name, 0, _MAX_WEIGHT)
            trial.suggest_int("seed", 0, 2**32 - 1)
            return trial

    def tell(self, trial: optuna.Trial, loss: float | None, **attributes: Any) -> None:
        """Ends the trial that `take` returned. Without a loss it failed. The study keeps the attributes."""
        assert self._lock_of_trial is not None
        with self._lock():  # else another worker may take it for an orphan
            for name, value in attributes.items():
                trial.set_user_attr(name, value)
            self._study.tell(trial, loss, TrialState.FAIL if loss is None else TrialState.COMPLETE)
            self._lock_of_trial.release()

    def folder_of(self, trial: optuna.Trial | FrozenTrial) -> Path:
        return self.folder / f"trial_{trial.number}"

    def _lock_in(self, trial: optuna.Trial | FrozenTrial) -> FileLock:
        return FileLock(self.folder_of(trial) / "worker.lock")

    def _enqueue(self, settings: TrialSettings) -> None:
        self._study.enqueue_trial(settings.as_config(), user_attrs=settings.as_config())

    def _free_orphans(self) -> None:
        """Marks the trials of dead workers as failed, and adds them again."""
        for trial in self.trials:
            if trial.state != TrialState.RUNNING:
                continue
            self.folder_of(trial).mkdir(exist_ok=True)  # its worker may have died before
            with contextlib.suppress(Timeout), self._lock_in(trial).acquire(timeout=0):
                self._study.tell(trial.number, state=TrialState.FAIL)
                self._enqueue(TrialSettings.of(trial))
