"""What a sweep says of a difference: against plain formulas, and on simulated sweeps whose truth is known."""

import math
import statistics

import numpy as np
import pytest
from scipy.stats import multivariate_t

from wit_trl.sweep.arguments import BASELINE, PAPER_PAIRS, name_of, ratio
from wit_trl.sweep.statistics import Difference, Losses, choose, difference, run_variance


RATIOS = (0, 0.1, 0.25, 0.5, 1)
PAIRS = [(float(ratio), 1.0) for ratio in RATIOS]
SEEDS = (1, 2, 3)
BETTER = PAIRS[2]


def simulate(generator, effect, rows=322, run_noise=0.11, row_noise=0.07):
    """
    A sweep of the embedded default. `effect` is what a ratio of 0.25 adds to the loss of a token, in nats. The noise is
    what was measured there (`wit-trl sweep --seeds 1 2`, 180 steps): standard deviation of what is left of the table of
    ratios and seeds, and over the rows of the difference between 0 and 1, both in nats per token.
    """
    tokens = generator.integers(16, 162, rows)
    base = generator.gamma(4, 1, rows)
    totals = {}
    of_seeds = generator.normal(0, 0.1, len(SEEDS))
    for pair in PAIRS:
        # What a ratio does to a row is the same for all seeds
        of_rows = generator.normal(0, row_noise, rows) * (pair != BASELINE) + effect * (pair == BETTER)
        for seed, of_seed in zip(SEEDS, of_seeds, strict=True):
            of_run = generator.normal(0, run_noise)
            totals[pair, seed] = tokens * (base + of_rows + of_seed + of_run)
    return Losses(totals, tokens)


def test_difference_and_interval_are_those_of_plain_loops():
    losses = simulate(np.random.default_rng(0), 0.1, rows=17)
    pair = PAIRS[2]
    found = difference(losses, pair, BASELINE)
    by_row = [
        statistics.fmean(losses.totals[pair, seed][row] - losses.totals[BASELINE, seed][row] for seed in SEEDS)
        for row in range(17)
    ]
    tokens = [int(count) for count in losses.tokens]
    value = sum(by_row) / sum(tokens)
    without = [
        sum(d for i, d in enumerate(by_row) if i != row) / sum(n for i, n in enumerate(tokens) if i != row)
        for row in range(17)
    ]
    # Leaving a row out moves the difference by e / (1 - h) / (the number of tokens)
    of_rows = sum((left_out - value) ** 2 for left_out in without)
    table = [[losses.totals[p, seed].sum() / sum(tokens) for seed in SEEDS] for p in PAIRS]
    mean = statistics.fmean(map(statistics.fmean, table))
    left = [
        cell - statistics.fmean(row) - statistics.fmean(other[column] for other in table) + mean
        for row in table
        for column, cell in enumerate(row)
    ]
    of_seeds = [(losses.totals[pair, seed].sum() - losses.totals[BASELINE, seed].sum()) / sum(tokens) for seed in SEEDS]
    of_table = 2 * sum(cell**2 for cell in left) / 8
    of_runs = max(of_table, (2 * of_table + statistics.variance(of_seeds)) / 3) / len(SEEDS)
    degrees = (of_rows + of_runs) ** 2 / (of_rows**2 / 16 + of_runs**2 / 8)
    assert found.value == pytest.approx(value)
    quantile = found.half_width / math.sqrt(of_rows + of_runs)
    dunnett = multivariate_t(shape=0.5 + 0.5 * np.eye(4), df=int(degrees), seed=0)
    assert dunnett.cdf([quantile] * 4) == pytest.approx(0.95, abs=0.003)
    assert found.seeds == 3


def test_noise_of_runs_is_found_whatever_trials_are_missing():
    generator = np.random.default_rng(0)
    found = []
    for _ in range(300):
        means = {(p, s): 3 * p[0] + s + generator.normal(0, 0.5) for p in PAIRS for s in SEEDS}
        del means[PAIRS[1], 1], means[PAIRS[4], 3]
        variance, degrees = run_variance(means)
        assert degrees == 6
        found.append(variance)
    assert statistics.fmean(found) == pytest.approx(0.25, rel=0.1)


def test_row_noise_alone_and_run_noise_alone_make_an_interval():
    for run_noise, row_noise in ((0.0, 0.25), (0.01, 0.0)):
        losses = simulate(np.random.default_rng(0), 0.0, run_noise=run_noise, row_noise=row_noise)
        assert difference(losses, PAIRS[4], BASELINE).half_width > 0.005


def test_zero_has_no_minus():
    assert str(Difference(-0.0001, 0.01, 3)) == "+0.000 ± 0.010"
    assert str(Difference(-0.0009, None, 1)) == "-0.001"


def test_one_seed_gives_no_interval():
    losses = simulate(np.random.default_rng(0), -5.0)
    single = Losses({trial: totals for trial, totals in losses.totals.items() if trial[1] == 2}, losses.tokens)
    assert difference(single, BETTER, BASELINE).half_width is None
    best, found = choose(single, BASELINE)
    assert best == BETTER
    assert not found.is_found


def test_metric_without_rows_is_compared_over_the_seeds_with_a_wider_interval():
    generator = np.random.default_rng(0)
    accuracy = {(p, s): np.array([0.5 + 0.1 * p[0] + generator.normal(0, 0.01)]) for p in PAIRS for s in SEEDS}
    losses = Losses(accuracy, np.ones(1))
    best, found = choose(losses, BASELINE, greater_is_better=True)
    assert best == PAIRS[4]
    assert found.is_found
    own = statistics.variance(float((accuracy[best, s] - accuracy[BASELINE, s])[0]) for s in SEEDS)
    pooled, degrees = run_variance(losses.means())
    assert degrees == 8
    # From his table of 1955: one-sided, 5%, four comparisons, 8 degrees
    variance = max(2 * pooled, (4 * pooled + own) / 3)
    assert found.half_width == pytest.approx(2.55 * math.sqrt(variance / 3), rel=0.01)


def test_seeds_that_differ_by_more_than_the_table_says_widen_the_interval():
    generator = np.random.default_rng(0)
    noise = {pair: 0.5 if pair == PAIRS[4] else 0.01 for pair in PAIRS}
    losses = Losses({(p, s): np.array([generator.normal(0, noise[p])]) for p in PAIRS for s in SEEDS}, np.ones(1))
    of_seeds = [float((losses.totals[PAIRS[4], s] - losses.totals[BASELINE, s])[0]) for s in SEEDS]
    half_width = difference(losses, PAIRS[4], BASELINE).half_width
    mean_variance = (4 * run_variance(losses.means())[0] + statistics.variance(of_seeds)) / 3
    assert half_width == pytest.approx(2.55 * math.sqrt(mean_variance / 3), rel=0.01)


def test_pairs_without_a_common_seed_are_not_compared():
    losses = Losses({(BASELINE, 1): np.ones(3), (PAIRS[1], 2): np.ones(3)}, np.ones(3))
    with pytest.raises(ValueError, match=r"\(0.1, 1.0\) have no seed in common"):
        difference(losses, PAIRS[1], BASELINE)
    assert choose(losses, BASELINE) == (BASELINE, None)


@pytest.mark.parametrize(("run_noise", "row_noise"), [(0.11, 0.07), (0.004, 0.25), (0.02, 0.0)])
def test_simulated_sweeps_without_an_effect_find_nothing(run_noise, row_noise):
    generator = np.random.default_rng(0)
    gains, held = [], []
    for _ in range(200):
        losses = simulate(generator, 0.0, run_noise=run_noise, row_noise=row_noise)
        _, found = choose(losses, BASELINE)
        gains.append(found is not None and found.is_found)
        differences = [difference(losses, pair, BASELINE) for pair in PAIRS[1:]]
        held += [not found.is_found for found in differences]
    assert np.mean(gains) <= 0.1
    assert np.mean(held) >= 0.9


@pytest.mark.parametrize(("run_noise", "row_noise"), [(0.11, 0.07), (0.004, 0.25)])
def test_simulated_sweeps_with_an_effect_name_the_better_ratio(run_noise, row_noise):
    """The effect is four standard errors of the comparison."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(16, 162, 10**5)
    of_rows = row_noise**2 * np.mean(tokens**2.0) / np.mean(tokens) ** 2 / 322
    effect = -4 * math.sqrt(of_rows + 2 / 3 * run_noise**2)
    named, held = [], []
    for _ in range(1000):
        losses = simulate(generator, effect, run_noise=run_noise, row_noise=row_noise)
        best, found = choose(losses, BASELINE)
        named.append(best == BETTER and found.is_found)
        found = difference(losses, BETTER, BASELINE)
        held.append(abs(found.value - effect) <= found.half_width)
    assert np.mean(named) >= 0.85 - 2 * math.sqrt(0.85 * 0.15 / 1000)  # within the noise of 1,000 sweeps
    assert np.mean(held) >= 0.9


def test_pairs_of_the_paper_are_35_of_21_ratios():
    assert len(PAPER_PAIRS) == 35
    assert len({ratio(pair) for pair in PAPER_PAIRS}) == 21
    assert ratio((0.6, 0.2)) == ratio((0.6, 0.2)) == 3
    assert ratio((0.2, 0.6)) == ratio((1 / 5, 3 / 5)) == 1 / 3
    assert [name_of(pair) for pair in ((0.25, 1.0), (0.2, 0.8))] == ["0.25", "(0.2, 0.8)"]
