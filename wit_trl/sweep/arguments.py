"""The arguments of `wit-trl sweep`: which pairs and seeds it trains, what it measures and what it keeps."""

# ruff: noqa: RUF009  (`HfArg` makes a field)

import itertools
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

from transformers.hf_argparser import HfArg


Pair: TypeAlias = tuple[float, float]  # λp and λr

BASELINE: Pair = (0.0, 1.0)  # conventional tuning
PAPER_PAIRS: list[Pair] = [pair for pair in itertools.product((0.0, 0.2, 0.4, 0.6, 0.8, 1.0), repeat=2) if any(pair)]
TASK_METRIC, RETENTION_METRIC = "eval_completion_loss", "eval_retention_loss"
# They depend on the weights, so that one model has several values: they are weighted, or of the weighted tokens alone
_WEIGHTED_METRICS = ("eval_loss", "eval_entropy", "eval_mean_token_accuracy")


@dataclass
class SweepArguments:
    """Arguments of `wit-trl sweep` besides those of the training."""

    ratios: list[float] = HfArg(
        default_factory=lambda: [0.0, 0.1, 0.25, 0.5, 1.0],
        help="Weights of a prompt token, where a completion token weighs 1.",
    )
    seeds: list[int] = HfArg(default_factory=lambda: [1, 2, 3], help="Seeds that each pair is trained with.")
    pairs: list[str] = HfArg(default_factory=list, help="Pairs of weights instead of the ratios, as 0.2,0.8.")
    grid: str | None = HfArg(
        default=None, help="The 35 pairs of the paper instead of the ratios.", metadata={"choices": ["paper"]}
    )
    eval_dataset: list[str] = HfArg(
        default_factory=list, help="Other evaluation sets, as name=data set: what should be kept."
    )
    retention_prompts: int = HfArg(
        default=16, help="Number of held-out prompts whose answers by the base model should be kept. 0: no retention."
    )
    metric: str = HfArg(
        default=TASK_METRIC,
        help="What the best pair is chosen by: a logged metric, or a function as file.py:function.",
    )
    lm_eval_tasks: list[str] = HfArg(
        default_factory=list, help="Benchmarks of lm-evaluation-harness that each trial runs: names, or YAML files."
    )
    storage: str | None = HfArg(
        default=None, help="URL of a database for the trials, instead of a file in the output folder."
    )
    keep: str = HfArg(default="best", help="Which models are kept.", metadata={"choices": ["best", "all", "none"]})

    def __post_init__(self):
        if self.pairs and self.grid is not None:
            raise ValueError("--pairs and --grid both name the pairs. Leave out one of them.")
        for flag, values in (("ratios", self.ratios), ("seeds", self.seeds)):
            if not values:
                raise ValueError(f"--{flag} has no value. Give at least one.")
        if ":" not in self.metric and not self.metric.startswith("eval_"):
            raise ValueError(
                f"--metric is {self.metric}, but must be of an evaluation, such as {TASK_METRIC}, or a function, as "
                "file.py:function."
            )
        if self.metric in _WEIGHTED_METRICS:
            raise ValueError(
                f"--metric is {self.metric}, which depends on the weights: it is another number for the same model. "
                "Take that of a region, such as eval_completion_loss or eval_completion_mean_token_accuracy."
            )
        if self.retention_prompts < 0:
            raise ValueError(f"--retention_prompts is {self.retention_prompts}, but it must not be negative.")
        taken = {"retention"}
        for given in self.eval_dataset:
            name, _, path = given.partition("=")
            if not name.isidentifier() or name in taken or not path:
                raise ValueError(
                    f"--eval_dataset is {given!r}, but must be name=data set, such as other=other.jsonl. A name is of "
                    "letters, digits and underscores, is not `retention`, and is used once."
                )
            taken.add(name)
        for pair in self.all_pairs():
            if not all(0 <= weight < float("inf") for weight in pair) or not any(pair):
                raise ValueError(f"The pair {pair} has a weight that is negative or not finite, or no weight above 0.")

    def all_pairs(self) -> list[Pair]:
        """Returns the pairs of weights. Conventional tuning is always among them, and comes first."""
        if self.grid is not None:
            pairs = PAPER_PAIRS
        elif self.pairs:
            try:
                split = [pair.split(",") if isinstance(pair, str) else pair for pair in self.pairs]
                pairs = [(float(prompt), float(completion)) for prompt, completion in split]
            except (TypeError, ValueError) as error:
                raise ValueError(f"--pairs is {self.pairs}, but each must be two numbers, such as 0.2,0.8.") from error
        else:
            pairs = [(ratio, 1.0) for ratio in self.ratios]
        return list(dict.fromkeys([BASELINE, *pairs]))


def ratio(pair: Pair) -> float | None:
    """Returns the weight of the prompt divided by that of the completion, or `None` if the latter is 0."""
    prompt, completion = (Fraction(str(weight)) for weight in pair)  # 0.6 / 0.2 is exactly 3
    return float(prompt / completion) if completion else None


def name_of(pair: Pair) -> str:
    """Returns the name of a pair: its ratio if the completion weighs 1, else both weights."""
    return f"{pair[0]:g}" if pair[1] == 1 else f"({pair[0]:g}, {pair[1]:g})"
