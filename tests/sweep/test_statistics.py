"""What a sweep says of a difference: against plain formulas, and on simulated sweeps whose truth is known."""

import math
import statistics

import numpy as np
import pytest
from scipy.stats import t as student

from wit_trl.sweep.arguments import BASELINE, PAPER_PAIRS, name_of, ratio
from wit_trl.sweep.statistics import Losses, choose, difference, run_variance


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
    of_rows = 17 / 16 * sum((d - value * n) ** 2 for d, n in zip(by_row, tokens, strict=True)) / sum(tokens) ** 2
    table = [[losses.totals[p, seed].sum() / sum(tokens) for seed in SEEDS] for p in PAIRS]
    mean = statistics.fmean(map(statistics.fmean, table))
    left = [
        cell - statistics.fmean(row) - statistics.fmean(other[column] for other in table) + mean
        for row in table
        for column, cell in enumerate(row)
    ]
    of_runs = 2 / len(SEEDS) * sum(cell**2 for cell in left) / 8
    degrees = (of_rows + of_runs) ** 2 / (of_rows**2 / 16 + of_runs**2 / 8)
    assert found.value == pytest.approx(value)
    assert found.half_width == pytest.approx(student.ppf(0.975, degrees) * math.sqrt(of_rows + of_runs))
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


def test_one_seed_gives_no_interval():
    losses = simulate(np.random.default_rng(0), -5.0)
    single = Losses({trial: totals for trial, totals in losses.totals.items() if trial[1] == 2}, losses.tokens)
    assert difference(single, BETTER, BASELINE).half_width is None
    choice = choose(single, BASELINE)
    assert choice.pair == BETTER
    assert not choice.difference.is_found


def test_metric_without_rows_is_compared_over_the_seeds_with_a_wider_interval():
    generator = np.random.default_rng(0)
    accuracy = {(p, s): np.array([0.5 + 0.1 * p[0] + generator.normal(0, 0.01)]) for p in PAIRS for s in SEEDS}
    losses = Losses(accuracy, np.ones(1))
    choice = choose(losses, BASELINE, greater_is_better=True)
    assert choice.pair == PAIRS[4]
    assert choice.difference.is_found
    assert not choice.on_other_rows
    dunnett = 2.55 / student.ppf(0.975, 8)  # from his table of 1955: one-sided, 5%, four comparisons, 8 degrees
    unadjusted = difference(losses, PAIRS[4], BASELINE).half_width
    assert choice.difference.half_width == pytest.approx(dunnett * unadjusted, rel=0.01)


def test_pairs_without_a_common_seed_are_not_compared():
    losses = Losses({(BASELINE, 1): np.ones(3), (PAIRS[1], 2): np.ones(3)}, np.ones(3))
    with pytest.raises(ValueError, match=r"\(0.1, 1.0\) have no seed in common"):
        difference(losses, PAIRS[1], BASELINE)
    assert choose(losses, BASELINE).pair == BASELINE


@pytest.mark.parametrize(("run_noise", "row_noise"), [(0.11, 0.07), (0.004, 0.25), (0.02, 0.0)])
def test_simulated_sweeps_without_an_effect_find_nothing(run_noise, row_noise):
    generator = np.random.default_rng(0)
    found, held, held_by_choice = [], [], []
    for _ in range(200):
        losses = simulate(generator, 0.0, run_noise=run_noise, row_noise=row_noise)
        choice = choose(losses, BASELINE)
        found.append(choice.difference is not None and choice.difference.is_found)
        if choice.difference is not None:
            held_by_choice.append(abs(choice.difference.value) <= choice.difference.half_width)
        for pair in PAIRS[1:]:
            difference_ = difference(losses, pair, BASELINE)
            held.append(abs(difference_.value) <= difference_.half_width)
    assert np.mean(found) <= 0.1
    assert np.mean(held) >= 0.9
    assert np.mean(held_by_choice) >= 0.9


@pytest.mark.parametrize(("run_noise", "row_noise"), [(0.11, 0.07), (0.004, 0.25)])
def test_simulated_sweeps_with_an_effect_name_the_better_ratio(run_noise, row_noise):
    """The effect is four standard errors of the comparison, which stands on half of the rows."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(16, 162, 10**5)
    of_rows = row_noise**2 * np.mean(tokens**2.0) / np.mean(tokens) ** 2 / 161
    effect = -4 * math.sqrt(of_rows + 2 / 3 * run_noise**2)
    named, held = [], []
    for _ in range(200):
        losses = simulate(generator, effect, run_noise=run_noise, row_noise=row_noise)
        choice = choose(losses, BASELINE)
        truth = effect * (choice.pair == BETTER)
        named.append(choice.pair == BETTER and choice.difference.is_found and choice.difference.value < 0)
        if choice.difference is not None:
            held.append(abs(choice.difference.value - truth) <= choice.difference.half_width)
    assert np.mean(named) >= 0.85
    assert np.mean(held) >= 0.9


def test_best_of_the_rows_that_chose_it_looks_better_than_it_is():
    """Which is why the gain is measured on the others."""
    generator = np.random.default_rng(0)
    on_the_same, on_others = [], []
    for _ in range(200):
        losses = simulate(generator, 0.0, run_noise=0.0, row_noise=0.25)
        on_the_same.append(min(difference(losses, pair, BASELINE).value for pair in PAIRS[1:]))
        choice = choose(losses, BASELINE)
        on_others.append(0.0 if choice.difference is None else choice.difference.value)
    assert np.mean(on_the_same) < -0.01
    assert abs(np.mean(on_others)) < 0.3 * abs(np.mean(on_the_same))


def test_pairs_of_the_paper_are_35_of_21_ratios():
    assert len(PAPER_PAIRS) == 35
    assert len({ratio(pair) for pair in PAPER_PAIRS}) == 21
    assert ratio((0.6, 0.2)) == ratio((0.6, 0.2)) == 3
    assert ratio((0.2, 0.6)) == ratio((1 / 5, 3 / 5)) == 1 / 3
    assert [name_of(pair) for pair in ((0.25, 1.0), (0.2, 0.8))] == ["0.25", "(0.2, 0.8)"]
