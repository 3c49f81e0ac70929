"""What the trials of a sweep measured, and the sentences that follow from it."""

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from optuna.trial import FrozenTrial, TrialState

from .arguments import BASELINE, RETENTION_METRIC, TASK_METRIC, Pair, name_of, ratio
from .statistics import Difference, Losses, choose, difference
from .study import SweepStudy, TrialSettings, lost_file


@dataclass(frozen=True)
class TrialResult:
    """A trial that has ended."""

    settings: TrialSettings  # the weights and the seed
    trial: int  # its number in the study
    folder: Path  # of its files
    metrics: dict[str, float]  # losses in nats per token; empty if the trial failed
    answers: list[str]  # of its model, to the prompts of the report
    error: str | None  # the end of the log, if the trial failed
    seconds: float

    @classmethod
    def read(cls, trial: FrozenTrial, folder: Path) -> "TrialResult":
        settings, error, seconds = TrialSettings.of(trial), trial.user_attrs.get("error"), trial.user_attrs["seconds"]
        measured = json.loads((folder / "result.json").read_text()) if error is None else {"metrics": {}, "answers": []}
        return cls(settings, trial.number, folder, measured["metrics"], measured["answers"], error, seconds)

    def rows(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the summed loss and the number of tokens of each row. A metric that is no mean of rows has one."""
        loss = re.fullmatch(r"eval_((?:\w+_)?)(prompt|completion)_loss", metric)
        if loss is None and metric != RETENTION_METRIC:
            return np.array([self.metrics[metric]]), np.ones(1)
        prefix, region = loss.groups() if loss else ("retention_", "completion")
        rows = pq.read_table(self.folder / f"{prefix}rows.parquet", columns=[f"{region}_nll", f"{region}_tokens"])
        totals, tokens = (column.to_numpy() for column in rows.columns)
        return totals[tokens > 0], tokens[tokens > 0]

    def as_json(self) -> dict[str, Any]:
        """Returns the line of `sweep.jsonl`."""
        settings = self.settings.as_config() | {"ratio": ratio(self.settings.pair)}
        line = settings | asdict(self) | {"folder": self.folder.name}
        del line["settings"]
        return line


def check_metric(metric: str, measured: Collection[str]) -> None:
    """Raises `ValueError` for the `--metric` that trials, or the base, do not have."""
    if metric not in measured:
        names = ", ".join(sorted(name for name in measured if name.startswith("eval_")))
        raise ValueError(f"--metric is {metric}, which the trials do not have. They have: {names}.")


class SweepResults:
    """What the trials of a study measured. `metric` chooses the best pair, and trials that `clips` clip gradients."""

    def __init__(self, study: SweepStudy, metric: str, greater_is_better: bool | None, clips: bool):
        self.metric, self.clips = metric, clips
        base = json.loads((study.folder / "base" / "result.json").read_text())
        self.base_metrics, self.prompts, self.base_answers = base["metrics"], base["prompts"], base["answers"]
        self.benchmarks: dict[str, bool] = base["greater_is_better"]
        by_name = self.benchmarks.get(metric, not metric.endswith("loss"))
        self.greater_is_better = by_name if greater_is_better is None else greater_is_better
        self._best = max if self.greater_is_better else min
        ended = {}
        for trial in study.trials:  # those that have ended: the last one, if a trial failed and was tried again
            folder = study.folder_of(trial)
            if "error" in trial.user_attrs or (trial.state == TrialState.COMPLETE and not lost_file(folder)):
                ended[TrialSettings.of(trial)] = TrialResult.read(trial, folder)
        self.trials = sorted(ended.values(), key=lambda trial: (_order(trial.settings.pair), trial.settings.seed))
        self.done = [trial for trial in self.trials if trial.error is None]
        if not self.done:
            raise ValueError(f"All {len(self.trials)} trials failed. The last one says:\n{self.trials[-1].error}")
        check_metric(metric, set.intersection(*(set(trial.metrics) for trial in self.done)))

    @cached_property
    def pairs(self) -> list[Pair]:
        """The pairs that have a trial that is done, in the order of their ratios."""
        return sorted({trial.settings.pair for trial in self.done}, key=_order)

    @cached_property
    def kept_metrics(self) -> list[str]:
        """The metrics of what should be kept: the completion losses of other evaluation sets, and the retention."""
        kept = [name for name in self.base_metrics if name != TASK_METRIC and name.endswith("_completion_loss")]
        return [*kept, RETENTION_METRIC] if RETENTION_METRIC in self.base_metrics else kept

    @cached_property
    def replicates(self) -> dict[Pair, Pair]:
        """For each pair whose ratio an earlier pair has: that pair. Without clipping both are the same training."""
        first: dict[float | None, Pair] = {}
        return {pair: one for pair in self.pairs if (one := first.setdefault(ratio(pair), pair)) != pair}

    def of(self, pair: Pair) -> list[TrialResult]:
        return [trial for trial in self.done if trial.settings.pair == pair]

    def mean(self, pair: Pair, metric: str) -> float:
        return float(np.mean([trial.metrics[metric] for trial in self.of(pair)]))

    @cache  # noqa: B019
    def losses(self, metric: str) -> Losses:
        rows = {(trial.settings.pair, trial.settings.seed): trial.rows(metric) for trial in self.done}
        return Losses({trial: totals for trial, (totals, _) in rows.items()}, next(iter(rows.values()))[1])

    def difference(self, pair: Pair, metric: str) -> Difference | None:
        """Returns a pair minus conventional tuning, on all rows. `None` for that itself, or without a common seed."""
        seeds = {trial.settings.seed for trial in self.of(BASELINE)}
        is_paired = any(trial.settings.seed in seeds for trial in self.of(pair))
        return difference(self.losses(metric), pair, BASELINE) if pair != BASELINE and is_paired else None

    @cached_property
    def choice(self) -> tuple[Pair, Difference | None]:
        if self.of(BASELINE):
            return choose(self.losses(self.metric), BASELINE, self.greater_is_better)
        return self._best(self.pairs, key=lambda pair: self.mean(pair, self.metric)), None

    def best_of(self, pair: Pair) -> TrialResult:
        return self._best(self.of(pair), key=lambda trial: trial.metrics[self.metric])

    def _is_gain(self, found: Difference) -> bool:
        return found.is_found and (found.value > 0) == self.greater_is_better

    @cached_property
    def best(self) -> TrialResult:
        """The best trial of the best pair. Where intervals tell of no gain, it is one of conventional tuning."""
        pair, found = self.choice
        is_unsure = found is not None and found.half_width is not None and not self._is_gain(found)
        return self.best_of(BASELINE if is_unsure else pair)

    def is_frontier(self, pair: Pair, kept_metric: str) -> bool:
        """Whether no other pair has both losses as low, and one of them lower: the task's, and that of what is kept."""
        means = {p: (self.mean(p, TASK_METRIC), self.mean(p, kept_metric)) for p in self.pairs}
        task, kept = means[pair]
        return not any(other[0] <= task and other[1] <= kept and other != (task, kept) for other in means.values())

    def sentences(self) -> list[str]:
        """Returns the sentences of the report: the best pair, what each pair costs and gains, and what to mind."""
        said = [self._conclusion()]
        for pair in self.pairs:
            found = {metric: self.difference(pair, metric) for metric in (TASK_METRIC, *self.kept_metrics)}
            effects = [_effect(difference, metric) for metric, difference in found.items() if difference is not None]
            if effects:
                said.append(f"{name_of(pair)} against 0: {'; '.join(effects)}.")
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
        among = f"Among {_names(self.pairs)}, for this model, data, budget and metric: "
        if not self.of(BASELINE):
            return f"{among}nothing can be compared, because no trial of the ratio 0 is done."
        others = {pair: found for pair in self.pairs if (found := self.difference(pair, self.metric))}
        worse = {pair for pair, found in others.items() if found.is_found and not self._is_gain(found)}
        best, found = name_of(self.choice[0]), self.choice[1]
        change = f", {found} on {self.metric} against 0" if found else ""
        of_choice = [found] if found else [*others.values()]
        if of_choice and all(each.half_width is None for each in of_choice):
            return f"{among}{best} did best{change}. One seed gives no interval."
        if found is not None and self._is_gain(found):
            return f"{among}{best} does best{change} ({found.seeds} seeds)."
        if others and len(worse) == len(others):
            return f"{among}0 does best on {self.metric}."
        said = "no difference found"
        if worse:
            rest = _names(others.keys() - worse)
            said = f"none is found better than 0. Worse: {_names(worse)}; not told apart: {rest}"
        return f"{among}{said}. {best} did best{change}. So best.yaml has the ratio 0."


def _names(pairs: Iterable[Pair]) -> str:
    return ", ".join(map(name_of, sorted(pairs, key=_order)))


def _effect(found: Difference, metric: str) -> str:
    if found.half_width is None:
        return f"{found} on {metric}, without an interval"
    verb = "no difference found," if not found.is_found else "costs" if found.value > 0 else "gains"
    return f"{verb} {found} on {metric}"


def _order(pair: Pair) -> tuple[float, bool, Pair]:
    prompt_to_completion = ratio(pair)
    return float("inf") if prompt_to_completion is None else prompt_to_completion, pair != BASELINE, pair
