"""The pairs of weights that a sweep compares."""

import itertools
from fractions import Fraction
from typing import TypeAlias


Pair: TypeAlias = tuple[float, float]  # λp and λr

BASELINE: Pair = (0.0, 1.0)  # conventional tuning
PAPER_PAIRS: list[Pair] = [pair for pair in itertools.product((0.0, 0.2, 0.4, 0.6, 0.8, 1.0), repeat=2) if any(pair)]


def ratio(pair: Pair) -> float | None:
    """Returns the weight of the prompt divided by that of the completion, or `None` if the latter is 0."""
    prompt, completion = (Fraction(str(weight)) for weight in pair)  # 0.6 / 0.2 is exactly 3
    return float(prompt / completion) if completion else None


def name_of(pair: Pair) -> str:
    """Returns the name of a pair: its ratio if the completion weighs 1, else both weights."""
    return f"{pair[0]:g}" if pair[1] == 1 else f"({pair[0]:g}, {pair[1]:g})"
