"""What the trials of a sweep measured, and what can be said of it."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from .metrics import RETENTION_METRIC, TASK_METRIC, read_rows
from .pairs import BASELINE, Pair, name_of, ratio
from .statistics import Choice, Difference, Losses, choose, difference
from .study import SweepStudy, TrialSettings


@dataclass(frozen=True)
class TrialResult:
    """
    A trial that has ended.

    Args:
        settings ([`TrialSettings`]): Its weights and its seed.
        number (`int`): Its number in the study.
        folder (`Path`): Where its files are.
        metrics (`dict[str, float]`): What it measured, in nats per token where it is a loss. Empty if it failed.
        answers (`list[str]`): What its model answers to the prompts of the report.
        error (`str`, *optional*): The end of its log, if it failed.
        seconds (`float`): How long it took.
    """

    settings: TrialSettings
    number: int
    folder: Path
    metrics: dict[str, float]
    answers: list[str]
    error: str | None
    seconds: float

    @classmethod
    def read(cls, trial: FrozenTrial, folder: Path) -> "TrialResult":
        """Returns the result of a trial. Raises `ValueError` if its files are gone."""
        measured: dict[str, Any] = {"metrics": {}, "answers": []}
        if trial.state == TrialState.COMPLETE:
            try:
                measured = json.loads((folder / "result.json").read_text())
            except FileNotFoundError as error:
                raise ValueError(
                    f"Trial {trial.number} is done, but there is no {error.filename}. Start a new sweep in another "
                    "--output_dir."
                ) from error
        attributes = trial.user_attrs
        return cls(
            TrialSettings.of(trial),
            trial.number,
            folder,
            measured["metrics"],
            measured["answers"],
            attributes.get("error"),
            attributes["seconds"],
        )

    def as_json(self) -> dict[str, Any]:
        """Returns what `sweep.jsonl` holds of it."""
        return {
            **self.settings.as_config(),
            "ratio": ratio(self.settings.pair),
            "trial": self.number,
            "folder": self.folder.name,
            "seconds": self.seconds,
            "error": self.error,
            "metrics": self.metrics,
            "answers": self.answers,
        }


class SweepResults:
    """
    What the trials of a study measured.

    Args:
        study ([`SweepStudy`]):
            The study.
        metric (`str`):
            What the best pair is chosen by.
        greater_is_better (`bool`, *optional*):
            Whether more of it is better. By default what the benchmark says, or whether its name ends with `"loss"`.
        clips (`bool`):
            Whether the trials clip gradients, so that pairs of one ratio may differ.

    Raises:
        `ValueError`: no trial is done, or not all of them have the metric.
    """

    def __init__(self, study: SweepStudy, metric: str, greater_is_better: bool | None, clips: bool):
        self.metric, self.clips = metric, clips
        self.folder = study.folder
        self._losses: dict[str, Losses] = {}
        base = json.loads((self.folder / "base" / "result.json").read_text())
        self.base_metrics, self.prompts, self.base_answers = base["metrics"], base["prompts"], base["answers"]
        self.benchmarks: dict[str, bool] = base["greater_is_better"]
        if greater_is_better is None:
            greater_is_better = self.benchmarks.get(metric, not metric.endswith("loss"))
        self.greater_is_better = greater_is_better
        ended = {}
        for trial in study.trials:
            # Neither those that wait or run, nor those whose worker died
            if trial.state == TrialState.COMPLETE or "error" in trial.user_attrs:
                result = TrialResult.read(trial, study.folder_of(trial))
                ended[result.settings] = result  # what failed may have been tried again
        self.trials = sorted(ended.values(), key=lambda trial: (_order(trial.settings.pair), trial.settings.seed))
        self.done = [trial for trial in self.trials if trial.error is None]
        if not self.done:
            raise ValueError(f"All {len(self.trials)} trials failed. The last one says:\n{self.trials[-1].error}")
        measured = set.intersection(*(set(trial.metrics) for trial in self.done))
        if metric not in measured:
            raise ValueError(f"--metric is {metric}, which the trials do not have. They have: {', '.join(measured)}.")

    @cached_property
    def pairs(self) -> list[Pair]:
        """The pairs with a trial that is done, by their ratio."""
        return sorted({trial.settings.pair for trial in self.done}, key=_order)

    @cached_property
    def kept_metrics(self) -> list[str]:
        """What is kept elsewhere: the completion losses of other evaluation sets, and the retention."""
        of_sets = (name for name in self.base_metrics if name != TASK_METRIC and name.endswith("_completion_loss"))
        return [*of_sets, *(name for name in self.base_metrics if name == RETENTION_METRIC)]

    @cached_property
    def replicates(self) -> dict[Pair, Pair]:
        """For each pair whose ratio another one has already: that one. Without clipping they are one training."""
        first: dict[float | None, Pair] = {}
        return {pair: one for pair in self.pairs if (one := first.setdefault(ratio(pair), pair)) != pair}

    def of(self, pair: Pair) -> list[TrialResult]:
        """Returns the trials of a pair that are done."""
        return [trial for trial in self.done if trial.settings.pair == pair]

    def mean(self, pair: Pair, metric: str) -> float:
        """Returns the mean of a metric over the seeds of a pair."""
        return float(np.mean([trial.metrics[metric] for trial in self.of(pair)]))

    def losses(self, metric: str) -> Losses:
        """Returns a metric of all trials, by row if it has rows."""
        if metric in self._losses:
            return self._losses[metric]
        by_trial, tokens = {}, np.ones(1)
        for trial in self.done:
            if (rows := read_rows(trial.folder, metric)) is None:
                by_trial[trial.settings.pair, trial.settings.seed] = np.array([trial.metrics[metric]])
            else:
                by_trial[trial.settings.pair, trial.settings.seed], tokens = rows
        self._losses[metric] = Losses(by_trial, tokens)
        return self._losses[metric]

    def difference(self, pair: Pair, metric: str) -> Difference | None:
        """Returns a pair minus conventional tuning, on all rows. `None` for that itself, or without a common seed."""
        seeds = {trial.settings.seed for trial in self.of(BASELINE)}
        if pair == BASELINE or not any(trial.settings.seed in seeds for trial in self.of(pair)):
            return None
        return difference(self.losses(metric), pair, BASELINE)

    @cached_property
    def choice(self) -> Choice:
        """The best pair."""
        if not self.of(BASELINE):
            sign = -1 if self.greater_is_better else 1
            return Choice(min(self.pairs, key=lambda pair: sign * self.mean(pair, self.metric)), None, False)
        return choose(self.losses(self.metric), BASELINE, self.greater_is_better)

    def best_of(self, pair: Pair) -> TrialResult:
        """Returns the best trial of a pair."""
        sign = -1 if self.greater_is_better else 1
        return min(self.of(pair), key=lambda trial: sign * trial.metrics[self.metric])

    @cached_property
    def best(self) -> TrialResult:
        """The best trial of the best pair."""
        return self.best_of(self.choice.pair)

    def is_frontier(self, pair: Pair, kept_metric: str) -> bool:
        """Whether no other pair is better at the task and keeps as much, or keeps more and is as good at the task."""
        mine = (self.mean(pair, TASK_METRIC), self.mean(pair, kept_metric))
        others = [(self.mean(other, TASK_METRIC), self.mean(other, kept_metric)) for other in self.pairs]
        return not any(task <= mine[0] and kept <= mine[1] and (task, kept) != mine for task, kept in others)

    def sentences(self) -> list[str]:
        """Returns what can be said: of the best pair, of what each pair costs and keeps, and what to mind."""
        said = [self._conclusion()]
        for pair in self.pairs:
            parts = [self._effect(pair, metric) for metric in (TASK_METRIC, *self.kept_metrics)]
            if any(parts):
                said.append(f"{name_of(pair)} against 0: {'; '.join(parts)}.")
        if self.metric == TASK_METRIC:
            said.append(
                "Held-out rows of the task itself tend to prefer the ratio 0. Look at what is kept elsewhere too, and "
                "choose by that with --metric if it is what matters."
            )
        if self.clips:
            said.append(
                "The trials clip gradients, so that the scale of the weights matters too, not their ratio alone: "
                "compare --pairs, or leave out --max_grad_norm."
            )
        elif self.replicates:
            same = ", ".join(f"{name_of(pair)} = {name_of(one)}" for pair, one in self.replicates.items())
            said.append(f"Without clipping, pairs of one ratio are replicates of one training: {same}.")
        if failed := len(self.trials) - len(self.done):
            said.append(f"{failed} of {len(self.trials)} trials failed; sweep.jsonl has the ends of their logs.")
        return said

    def _conclusion(self) -> str:
        among = f"Among {', '.join(map(name_of, self.pairs))}, for this model, data, budget and metric: "
        if not self.of(BASELINE):
            return f"{among}nothing can be compared, because no trial of the ratio 0 is done."
        pair, found = self.choice.pair, self.choice.difference
        if found is None:
            others = [self.difference(pair, self.metric) for pair in self.pairs]
            if any(other is not None and other.is_found for other in others):
                return f"{among}0 does best on {self.metric}."
            return f"{among}no difference found."
        rows = "on the half of the rows that did not choose it" if self.choice.on_other_rows else "on what chose it"
        change = f"{signed(found)} on {self.metric} against 0, {rows} ({found.seeds} seeds)"
        if found.half_width is None:
            return f"{among}{name_of(pair)} did best, {signed(found)} on {self.metric}. One seed gives no interval."
        if not found.is_found:
            return f"{among}no difference found. {name_of(pair)} did best: {change}."
        if (found.value > 0) == self.greater_is_better:
            return f"{among}{name_of(pair)} does best, {change}."
        return f"{among}no gain found. {name_of(pair)} did best on the rows that chose it, but {change}."

    def _effect(self, pair: Pair, metric: str) -> str:
        if (of_pair := self.difference(pair, metric)) is None:
            return ""
        if of_pair.half_width is None:
            return f"{signed(of_pair)} on {metric}, without an interval"
        verb = "no difference found," if not of_pair.is_found else "costs" if of_pair.value > 0 else "gains"
        return f"{verb} {signed(of_pair)} on {metric}"


def _order(pair: Pair) -> tuple[float, bool, Pair]:
    of_pair = ratio(pair)
    return (float("inf") if of_pair is None else of_pair), pair != BASELINE, pair


def signed(found: Difference) -> str:
    """Returns a difference with its interval as text."""
    return f"{found.value:+.3f}" + ("" if found.half_width is None else f" ± {found.half_width:.3f}")
