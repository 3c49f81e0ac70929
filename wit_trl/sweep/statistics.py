r"""
How sure a difference between two pairs of weights is.

A difference is paired by seed and by row. With \( \ell_{asi} \) the summed loss of row \( i \) in the trial of pair
\( a \) and seed \( s \), \( n_i \) its tokens, and \( d_{ai} \) the mean over the seeds of \( \ell_{asi} - \ell_{0si}
\), it is \( D_a = \sum_i d_{ai} / \sum_i n_i \). Two things make it uncertain, and their variances are added:

- the rows are a sample: with the residuals \( e_i = d_{ai} - D_a n_i \) of \( R \) rows, that of a ratio estimator, \(
  \frac{R}{R-1} \sum_i e_i^2 / (\sum_i n_i)^2 \);
- runs differ by themselves, also with the same order and initial weights: \( 2 \sigma^2 / S \) for \( S \) seeds, where
  \( \sigma^2 \) is what is left of the table of pairs and seeds after the means of its rows and columns, with as many
  degrees of freedom as it has cells beyond them. Few runs tell little of it, so all pairs share one \( \sigma^2 \).

The interval is Student's, of 95%, with the degrees of freedom of Welch and Satterthwaite.

The best of several pairs looks better than it is. So it is chosen on one half of the rows, and measured on the other.
Both halves have the noise of the runs in common, whose part of the interval is therefore wider, as Dunnett's for the
best of as many pairs as there were to choose from.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from .pairs import Pair


@dataclass(frozen=True)
class Losses:
    """
    What the trials of a sweep measured on the same rows.

    Args:
        totals (`dict[tuple[Pair, int], np.ndarray]`): Summed loss of each row, of shape `(rows,)`, for each pair of
            weights and seed. A metric that has no rows is one row.
        tokens (`np.ndarray` of shape `(rows,)`): What the sum of a row is divided by. 1 for a metric that has no rows.
    """

    totals: Mapping[tuple[Pair, int], np.ndarray]
    tokens: np.ndarray

    def means(self) -> dict[tuple[Pair, int], float]:
        """Returns the mean per token of each trial."""
        return {trial: float(totals.sum() / self.tokens.sum()) for trial, totals in self.totals.items()}

    def of_rows(self, rows: np.ndarray) -> "Losses":
        """Returns what was measured on some of the rows."""
        return Losses({trial: totals[rows] for trial, totals in self.totals.items()}, self.tokens[rows])


@dataclass(frozen=True)
class Difference:
    """
    A pair of weights minus the baseline.

    Args:
        value (`float`): The difference, per token.
        half_width (`float`, *optional*): The interval reaches from `value - half_width` to `value + half_width`. `None`
            if there is none, because all seeds of this pair or of the table are one.
        seeds (`int`): Number of seeds that both were trained with.
    """

    value: float
    half_width: float | None
    seeds: int

    @property
    def is_found(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.half_width is not None and abs(self.value) > self.half_width


def run_variance(means: Mapping[tuple[Pair, int], float]) -> tuple[float, int]:
    """
    Returns the variance of single runs, and its degrees of freedom: what is left of the table of pairs and seeds after
    the means of both. Cells may be missing. Without degrees of freedom the variance is NaN.
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
    """
    Returns how much more a pair loses than the baseline.

    Args:
        losses ([`Losses`]):
            What was measured. If the pair was chosen before, it was by other rows.
        pair (`Pair`):
            The pair.
        baseline (`Pair`):
            What it is compared with.
        choices (`int`, *optional*, defaults to `1`):
            Number of pairs that it is the best of.

    Raises:
        `ValueError`: they have no seed in common.
    """
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
    """Returns the 0.95 quantile of how far the best of several pairs is from the baseline by chance, by drawing it."""
    generator = np.random.default_rng(0)
    runs = generator.standard_normal((draws, 1 + choices))  # the first is the baseline's, which all share
    scale = np.sqrt(2 * generator.chisquare(degrees, draws) / degrees)
    return float(np.quantile((runs[:, 0] - runs[:, 1:].min(axis=1)) / scale, 0.95))


@dataclass(frozen=True)
class Choice:
    """
    The pair that does best, and how much better than the baseline it is, on rows that did not choose it.

    Args:
        pair (`Pair`): The pair.
        difference ([`Difference`], *optional*): To the baseline. `None` if it is the baseline.
        on_other_rows (`bool`): Whether the difference is on other rows than the choice, as it is if there are any.
    """

    pair: Pair
    difference: Difference | None
    on_other_rows: bool


def choose(losses: Losses, baseline: Pair, greater_is_better: bool = False) -> Choice:
    """Chooses a pair on one half of the rows, and compares it with the baseline on the other."""
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
