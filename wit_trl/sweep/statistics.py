r"""
How sure a difference between two pairs of weights is.

A difference is paired by seed and by row. Let \( \ell_{asi} \) be the summed loss of row \( i \) in the trial of pair
\( a \) and seed \( s \), \( n_i \) the tokens of the row, and \( d_{ai} \) the mean over the seeds of \( \ell_{asi} -
\ell_{0si} \). The difference is \( D_a = \sum_i d_{ai} / \sum_i n_i \). Two things add to its variance:

- The rows are a sample. The variance is that of a ratio estimator, by leaving one row out: \( \sum_i (e_i / (1 -
  h_i))^2 / (\sum_i n_i)^2 \) with the residuals \( e_i = d_{ai} - D_a n_i \) and \( h_i = n_i / \sum_j n_j \).
- Runs differ by themselves, even with the same order and initial weights. The variance is \( 2 \sigma^2 / S \) for
  \( S \) seeds. \( \sigma^2 \) is the residual variance of the table of pairs and seeds, after the means of its rows
  and columns. A few runs tell little about it, so all pairs share it. If the differences of the \( S \) seeds have a
  larger variance than \( 2 \sigma^2 \), it counts for a third.

The best of several pairs looks better than it is. So the interval is Dunnett's, for the best of as many pairs as there
are to choose from, and at least Student's of 95%. The degrees of freedom are those of Welch and Satterthwaite.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

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

    def choices(self, baseline: Pair) -> list[Pair]:
        """Returns the pairs that have a seed in common with the baseline, without that itself."""
        return sorted({pair for pair, seed in self.totals if pair != baseline and (baseline, seed) in self.totals})


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

    def __str__(self) -> str:
        return f"{self.value:+z.3f}" + ("" if self.half_width is None else f" ± {self.half_width:.3f}")


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


def difference(losses: Losses, pair: Pair, baseline: Pair) -> Difference:
    """Returns a pair minus the baseline. Raises `ValueError` if they have no seed in common."""
    seeds = [seed for (p, seed) in losses.totals if p == pair and (baseline, seed) in losses.totals]
    if not seeds:
        raise ValueError(f"The trials of {pair} have no seed in common with those of {baseline}.")
    by_seed = np.array([losses.totals[pair, seed] - losses.totals[baseline, seed] for seed in seeds])
    by_row, tokens = by_seed.mean(axis=0), float(losses.tokens.sum())
    value = float(by_row.sum() / tokens)
    of_a_run, degrees = run_variance(losses.means())
    if len(seeds) == 1 or not degrees:
        return Difference(value, None, len(seeds))
    own = float(np.var(by_seed.sum(axis=1) / tokens, ddof=1))
    runs, rows = max(2 * of_a_run, (4 * of_a_run + own) / 3) / len(seeds), 0.0
    weighted = runs**2 / degrees
    if (count := len(by_row)) > 1:
        residuals = (by_row - value * losses.tokens) / (1 - losses.tokens / tokens)
        rows = float(np.sum(residuals**2)) / tokens**2
        weighted += rows**2 / (count - 1)
    satterthwaite = (runs + rows) ** 2 / weighted if weighted else 1.0
    quantile = _dunnett_quantile(len(losses.choices(baseline)), max(int(satterthwaite), 1))
    return Difference(value, quantile * float(np.sqrt(rows + runs)), len(seeds))


@cache
def _dunnett_quantile(choices: int, degrees: int, draws: int = 50_000) -> float:
    """Returns the 0.95 quantile, by drawing, of how far the best of equal pairs is from the baseline."""
    generator = np.random.default_rng(0)
    runs = generator.standard_normal((draws, 1 + choices))  # the first is the baseline's
    scale = np.sqrt(2 * generator.chisquare(degrees, draws) / degrees)
    drawn = float(np.quantile((runs[:, 0] - runs[:, 1:].min(axis=1)) / scale, 0.95))
    return max(drawn, float(student.ppf(0.975, degrees)))


def choose(losses: Losses, baseline: Pair, greater_is_better: bool = False) -> tuple[Pair, Difference | None]:
    """Returns the pair that does best, with its difference from the baseline: `None` for the baseline itself."""
    found = {pair: difference(losses, pair, baseline) for pair in losses.choices(baseline)}
    sign = -1 if greater_is_better else 1
    best = min([baseline, *found], key=lambda pair: sign * found[pair].value if pair in found else 0.0)
    return best, found.get(best)
