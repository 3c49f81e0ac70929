"""`wit-trl sweep`: trains pairs of weights with several seeds, and says what differs and what does not."""

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..cli.arguments import TRAINING_TYPES, Flags, errors_in_one_sentence, parse_flags, split_debug
from ..cli.launch import accelerate_config_file
from ..embedded import EMBEDDED_DEFAULTS
from .metrics import TASK_METRIC
from .pairs import BASELINE, PAPER_PAIRS, Pair


# No clipping: only then the ratio of the weights is all that matters
SWEEP_DEFAULTS = {"output_dir": "runs/sweep", "max_grad_norm": 0.0, "eval_strategy": "epoch", "save_strategy": "no"}
# Ten trainings of it take some minutes
EMBEDDED_SWEEP = EMBEDDED_DEFAULTS | SWEEP_DEFAULTS | {"max_steps": 180, "eval_on_start": False}
# What each trial sets: refused on the command line. In a YAML file, which may be that of a training, it gives way.
_OF_THE_TRIALS = {
    "prompt_loss_weight": "--ratios or --pairs sets the weights of each trial",
    "completion_loss_weight": "--ratios or --pairs sets the weights of each trial",
    "seed": "--seeds sets the seed of each trial",
}
_IMPOSSIBLE = {
    "resume_from_checkpoint": "a trial that was cut off starts again",
    "push_to_hub": "train with best.yaml and push that",
    "num_machines": "a trial runs on one machine. Start `wit-trl sweep` on each, with an --output_dir that they share",
}
# Over the tokens with a weight, or weighted
_WEIGHTED_METRICS = [p + n for p in ("", "eval_", "train_") for n in ("loss", "entropy", "mean_token_accuracy")]


@dataclass
class SweepArguments:
    """
    Arguments of `wit-trl sweep` besides those of the training.

    Args:
        ratios (`list[float]`, *optional*, defaults to `[0, 0.1, 0.25, 0.5, 1]`):
            Weights of a prompt token, where a completion token weighs 1.
        seeds (`list[int]`, *optional*, defaults to `[1, 2, 3]`):
            Seeds that each pair is trained with.
        pairs (`list[str]`, *optional*):
            Pairs of weights instead of the ratios, as `0.2,0.8`. Conventional tuning, `0,1`, is always among them.
        grid (`str`, *optional*):
            `"paper"`: the 35 pairs of the paper instead of the ratios.
        eval_dataset (`list[str]`, *optional*):
            Other evaluation sets, as `name=data set`: what should be kept.
        retention_prompts (`int`, *optional*, defaults to `16`):
            Number of held-out prompts, besides general ones, whose answers by the base model should be kept. 0 for no
            retention.
        metric (`str`, *optional*, defaults to `"eval_completion_loss"`):
            What the best pair is chosen by: any metric that is logged, or a function of the trainer, as
            `module:function` or `file.py:function`.
        lm_eval_tasks (`list[str]`, *optional*):
            Benchmarks of lm-evaluation-harness that each trial runs: names, or YAML files of tasks of your own.
        storage (`str`, *optional*):
            URL of a database for the trials, such as `postgresql://…`, instead of a file in the output folder.
        keep (`str`, *optional*, defaults to `"best"`):
            Whose model is kept: the best trial's, all, or none.
    """

    ratios: list[float] = field(
        default_factory=lambda: [0.0, 0.1, 0.25, 0.5, 1.0],
        metadata={"help": "Weights of a prompt token, where a completion token weighs 1."},
    )
    seeds: list[int] = field(
        default_factory=lambda: [1, 2, 3], metadata={"help": "Seeds that each pair is trained with."}
    )
    pairs: list[str] = field(
        default_factory=list, metadata={"help": "Pairs of weights instead of the ratios, as 0.2,0.8."}
    )
    grid: str | None = field(
        default=None, metadata={"help": "The 35 pairs of the paper instead of the ratios.", "choices": ["paper"]}
    )
    eval_dataset: list[str] = field(
        default_factory=list, metadata={"help": "Other evaluation sets, as name=data set: what should be kept."}
    )
    retention_prompts: int = field(
        default=16,
        metadata={
            "help": "Number of held-out prompts whose answers by the base model should be kept. 0: no retention."
        },
    )
    metric: str = field(
        default=TASK_METRIC,
        metadata={"help": "What the best pair is chosen by: a logged metric, or a function, as file.py:function."},
    )
    lm_eval_tasks: list[str] = field(
        default_factory=list,
        metadata={"help": "Benchmarks of lm-evaluation-harness that each trial runs: names, or YAML files."},
    )
    storage: str | None = field(
        default=None, metadata={"help": "URL of a database for the trials, instead of a file in the output folder."}
    )
    keep: str = field(default="best", metadata={"help": "Whose model is kept.", "choices": ["best", "all", "none"]})

    def __post_init__(self):
        for name in ("ratios", "seeds", "pairs", "eval_dataset", "lm_eval_tasks"):  # a YAML file may have a single one
            if not isinstance(value := getattr(self, name), list):
                setattr(self, name, [value])
        if self.pairs and self.grid is not None:
            raise ValueError("--pairs and --grid both name the pairs. Leave out one of them.")
        for flag, values in (("ratios", self.ratios), ("seeds", self.seeds)):
            if not values:
                raise ValueError(f"--{flag} has no value. Give at least one.")
        if self.metric in _WEIGHTED_METRICS:
            raise ValueError(
                f"--metric is {self.metric}, which depends on the weights: it is another number for the same model. "
                "Take that of a region, such as eval_completion_loss or eval_completion_mean_token_accuracy."
            )
        if self.retention_prompts < 0:
            raise ValueError(f"--retention_prompts is {self.retention_prompts}, but it must not be negative.")
        names = [name for name, path in (part.split("=", 1) if "=" in part else ("", "") for part in self.eval_dataset)]
        for name, given in zip(names, self.eval_dataset, strict=True):
            if not name.isidentifier() or name == "retention" or names.count(name) > 1 or given.endswith("="):
                raise ValueError(
                    f"--eval_dataset is {given!r}, but must be name=data set, such as other=other.jsonl. A name is of "
                    "letters, digits and underscores, is not `retention`, and is used once."
                )
        for pair in self.all_pairs():
            if not all(0 <= weight < float("inf") for weight in pair) or not any(pair):
                raise ValueError(f"The pair {pair} has a weight that is negative or not finite, or no weight above 0.")

    def all_pairs(self) -> list[Pair]:
        """Returns the pairs of weights, conventional tuning first."""
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


def settings_of(flags: Flags) -> dict[str, Any]:
    """
    Returns what all trials have in common, as a YAML file holds it.

    Raises:
        `ValueError`: a flag contradicts the sweep.
    """
    config = {name: value for name, value in flags.as_config().items() if name not in SweepArguments.__annotations__}
    on_line = {arg.split("=")[0].lstrip("-").replace("-", "_") for arg in flags.args if arg.startswith("--")}
    refused = {name: remedy for name, remedy in _OF_THE_TRIALS.items() if name in on_line}
    machines = config.pop("num_machines", None)
    if machines is None and (file := config.get("config_file") or config.get("accelerate_config")):
        machines = yaml.safe_load(accelerate_config_file(file).read_text(encoding="utf-8")).get("num_machines")
    if machines is not None and str(machines) != "1":
        config["num_machines"] = machines
    refused |= {name: remedy for name, remedy in _IMPOSSIBLE.items() if name in config}
    for name, remedy in refused.items():
        raise ValueError(f"--{name} has no place in a sweep: {remedy}.")
    config = {name: value for name, value in config.items() if name not in _OF_THE_TRIALS}
    if flags.is_embedded:
        folder = Path(config["output_dir"]) / "embedded"
        config |= {"model_name_or_path": str(folder / "model"), "dataset_name": str(folder / "data")}
    return config | {"eval_packing": False}  # packed rows cannot be told apart


def check_packages(*names: str) -> None:
    """Raises `ValueError` if one of these packages is not installed."""
    missing = [name for name in names if importlib.util.find_spec(name.replace("-", "_")) is None]
    if missing:
        raise ValueError(f"This needs {', '.join(missing)}. Install it with `pip install {' '.join(missing)}`.")


def main(args: Sequence[str]) -> None:
    """Runs the command. `args` are the arguments after `wit-trl sweep`."""
    args, debug = split_debug(args)
    types = (SweepArguments, *TRAINING_TYPES)
    with errors_in_one_sentence(debug):
        flags = parse_flags(types, args, "wit-trl sweep", SWEEP_DEFAULTS)
        if flags.is_embedded:
            flags = parse_flags(types, args, "wit-trl sweep", EMBEDDED_SWEEP)
        sweep = SweepArguments(**vars(flags.unchecked[0]))
        settings = settings_of(flags)
        check_packages("optuna", "scipy", "matplotlib", *["lm-eval"] * bool(sweep.lm_eval_tasks))
        from .worker import SweepWorker

        worker = SweepWorker(sweep, settings, flags.is_embedded)
        try:
            worker.prepare()
            worker.work()
        except KeyboardInterrupt:
            print("Interrupted. The same command goes on where it stopped.", file=sys.stderr)
            sys.exit(130)
        worker.report()
