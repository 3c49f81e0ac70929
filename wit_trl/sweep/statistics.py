r"""
How sure a difference between two pairs of weights is.

A difference is paired by seed and by row. Let \( \ell_{asi} \) be the summed loss of row \( i \) in the trial of pair
\( a \) and seed \( s \), \( n_i \) the tokens of the row, and \( d_{ai} \) the mean over the seeds of \( \ell_{asi} -
\ell_{0si} \). The difference is \( D_a = \sum_i d_{ai} / \sum_i n_i \). Two things add to its variance:

- The rows are a sample. The variance is that of a ratio estimator: \( \frac{R}{R-1} \sum_i e_i^2 / (\sum_i n_i)^2 \)
  for \( R \) rows with the residuals \( e_i = d_{ai} - D_a n_i \).
- Runs differ by themselves, even with the same order and initial weights. The variance is \( 2 \sigma^2 / S \) for
  \( S \) seeds. \( \sigma^2 \) is the residual variance of the table of pairs and seeds, after the means of its rows
  and columns. A few runs tell little about it, so all pairs share one \( \sigma^2 \).

The interval is Student's, of 95%, with the degrees of freedom of Welch and Satterthwaite.

The best of several pairs looks better than it is. So it is chosen on one half of the rows, and measured on the other.
The noise of the runs is the same in both halves. Its part of the interval is therefore wider: it is Dunnett's, for the
best of as many pairs as there were to choose from.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from .arguments import Pair


@dataclass(frozen=True)
class Losses:
    """The losses of all trials of a sweep on the same rows. A metric that is no mean of rows has a single row."""

    totals: Mapping[tuple[Pair, int], np.ndarray]  # (rows,) for each pair and seed: summed loss of each row, in nats
    tokens: np.ndarray  # (rows,): number of tokens of each row; 1 for a metric that is no mean of rows

    def means(self) -> dict[tuple[Pair, int], float]:
        return {trial: float(totals.sum() / self.tokens.sum()) for trial, totals in self.totals.items()}

    def of_rows(self, rows: np.ndarray) -> "Losses":
        return Losses({trial: totals[rows] for trial, totals in self.totals.items()}, self.tokens[rows])


@dataclass(frozen=True)
class Difference:
    """How much a pair of weights differs from the baseline."""

    value: float  # the pair minus the baseline, per token
    half_width: float | None  # of the interval; `None` without one: a single seed tells nothing about the noise of runs
    seeds: int  # number of seeds that both were trained with

    @property
    def is_found(self) -> bool:
        """Whether 0 is outside of the interval."""
        return self.half_width is not None and abs(self.value) > self.half_width


def run_variance(means: Mapping[tuple[Pair, int], float]) -> tuple[float, int]:
    """
    Returns the variance of single runs, and its degrees of freedom. It is the residual variance of the table of pairs
    and seeds, after the means of both. Cells may be missing. Without degrees of freedom it is NaN.
    """
    pairs, seeds = (sorted({trial[axis] for trial in means}) for axis in (0, 1))
    design = np.array(
        [[pair == p for p in pairs] + [seed == s for s in seeds] for pair, seed in means], dtype=np.float64
    )
    values = np.fromiter(means.values(), np.float64)
    fitted, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    degrees = len(values) - int(rank)
    return (float(np.sum((values - design @ fitted) ** 2)) / degrees if degrees else float("nan")), degrees


def difference(losses: Losses, pair: Pair, baseline: Pair, choices: int = 1) -> Difference:
    """Returns a pair minus the baseline. If it is the best of several `choices`, other rows than these chose it."""
    seeds = [seed for (p, seed) in losses.totals if p == pair and (baseline, seed) in losses.totals]
    if not seeds:
        raise ValueError(f"The trials of {pair} have no seed in common with those of {baseline}.")
    by_row = np.mean([losses.totals[pair, seed] - losses.totals[baseline, seed] for seed in seeds], axis=0)
    tokens = losses.tokens.sum()
    value = float(by_row.sum() / tokens)
    of_a_run, degrees = run_variance(losses.means())
    if len(seeds) == 1 or not degrees:
        return Difference(value, None, len(seeds))
    runs, rows = 2 * of_a_run / len(seeds), 0.0
    weighted = runs**2 / degrees
    if (count := len(by_row)) > 1:
        residuals = by_row - value * losses.tokens
        rows = count / (count - 1) * float(np.sum(residuals**2)) / float(tokens) ** 2
        weighted += rows**2 / (count - 1)
    if not weighted:
        return Difference(value, 0.0, len(seeds))
    satterthwaite = (runs + rows) ** 2 / weighted
    of_rows = of_runs = float(student.ppf(0.975, satterthwaite))
    if choices > 1:
        of_runs = max(of_rows, _dunnett_quantile(choices, satterthwaite))
    return Difference(value, float(np.sqrt(of_rows**2 * rows + of_runs**2 * runs)), len(seeds))


def _dunnett_quantile(choices: int, degrees: float, draws: int = 50_000) -> float:
    """Returns the 0.95 quantile, by drawing, of how far the best of several equal pairs is from the baseline."""
    generator = np.random.default_rng(0)
    runs = generator.standard_normal((draws, 1 + choices))  # the first is the baseline's
    scale = np.sqrt(2 * generator.chisquare(degrees, draws) / degrees)
    return float(np.quantile((runs[:, 0] - runs[:, 1:].min(axis=1)) / scale, 0.95))


@dataclass(frozen=True)
class Choice:
    """The pair that does best, and how far it is from the baseline."""

    pair: Pair
    difference: Difference | None  # the pair minus the baseline; `None` if it is the baseline
    on_other_rows: bool  # whether other rows measured the difference than chose the pair: a single row does both


def choose(losses: Losses, baseline: Pair, greater_is_better: bool = False) -> Choice:
    """Returns the best pair. One half of the rows chooses it, and the other compares it with the baseline."""
    others = sorted({p for p, seed in losses.totals if p != baseline and (baseline, seed) in losses.totals})
    has_rows = len(losses.tokens) > 1
    order = np.random.default_rng(0).permutation(len(losses.tokens))
    first, second = (losses.of_rows(order[part::2]) for part in (0, 1)) if has_rows else (losses, losses)
    sign = -1 if greater_is_better else 1
    gains = {baseline: 0.0} | {pair: sign * difference(first, pair, baseline).value for pair in others}
    best = min(gains, key=gains.__getitem__)
    if best == baseline:
        return Choice(best, None, has_rows)
    return Choice(best, difference(second, best, baseline, choices=len(others)), has_rows)
