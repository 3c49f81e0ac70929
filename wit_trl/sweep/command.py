"""The command `wit-trl sweep`: it reads the flags and refuses what no trial can do. Then it is a worker."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..cli.arguments import TRAINING_TYPES, Flags, check_packages, errors_in_one_sentence, split_debug
from ..cli.launch import accelerate_config_file
from ..cli.names import check_file
from .arguments import SweepArguments


# Without clipping, only the ratio of the weights matters
_DEFAULTS = {"output_dir": "runs/sweep", "max_grad_norm": 0.0, "eval_strategy": "epoch", "save_strategy": "no"}
_EMBEDDED_DEFAULTS = {"max_steps": 180, "eval_on_start": False}  # ten trainings take some minutes
# What each trial sets. It is refused on the command line. In a YAML file, which may be that of a training, it gives way
_OF_THE_TRIALS = {
    "prompt_loss_weight": "--ratios or --pairs sets the weights of each trial",
    "completion_loss_weight": "--ratios or --pairs sets the weights of each trial",
    "seed": "--seeds sets the seed of each trial",
}
_IMPOSSIBLE = {
    "resume_from_checkpoint": "a trial that was cut off starts again",
    "push_to_hub": "train with best.yaml and push that",
    "aws_secret_access_key": "a trial runs on this machine",
    "num_machines": "a trial runs on one machine. Start `wit-trl sweep` on each, with an --output_dir that they share",
}


def parse_sweep_flags(args: Sequence[str]) -> Flags:
    refused = (*_OF_THE_TRIALS, *_IMPOSSIBLE)
    return Flags((SweepArguments, *TRAINING_TYPES), args, "wit-trl sweep", _DEFAULTS, _EMBEDDED_DEFAULTS, refused)


def settings_of(flags: Flags) -> dict[str, Any]:
    """Returns the flags that all trials share, as a YAML file. Raises `ValueError` if one contradicts the sweep."""
    config = flags.as_config()
    machines = config.pop("num_machines", None)
    if machines is None and (file := config.get("config_file") or config.get("accelerate_config")):
        machines = yaml.safe_load(accelerate_config_file(file).read_text(encoding="utf-8")).get("num_machines")
    if machines is not None and str(machines) != "1":
        config["num_machines"] = machines
    on_line = {arg.split("=")[0].lstrip("-").replace("-", "_") for arg in flags.args if arg.startswith("--")}
    for remedies, given in ((_OF_THE_TRIALS, on_line), (_IMPOSSIBLE, config)):
        for name, remedy in remedies.items():
            if name in given:
                raise ValueError(f"--{name} has no place in a sweep: {remedy}.")
    if flags.is_embedded:
        folder = Path(config["output_dir"]) / "embedded"
        config |= {"model_name_or_path": str(folder / "model"), "dataset_name": str(folder / "data")}
    if "token" in str(config.get("model_init_kwargs")):
        raise ValueError(
            "--model_init_kwargs has a token, which the files of the sweep would show. Set HF_TOKEN instead."
        )
    config["eval_packing"] = False  # packed rows cannot be told apart
    return {name: value for name, value in config.items() if name not in _OF_THE_TRIALS}


def main(args: Sequence[str]) -> None:
    """Runs the command. `args` are the arguments after `wit-trl sweep`."""
    args, debug = split_debug(args)
    with errors_in_one_sentence(debug):
        flags = parse_sweep_flags(args)
        flags.check_files()
        sweep, settings = flags.make(SweepArguments), settings_of(flags)
        for other in sweep.eval_dataset:
            check_file(Path(other.partition("=")[2]))
        if token := settings.pop("hub_token", None):
            os.environ["HF_TOKEN"] = token  # trials inherit it, and no file shows it
        needed = ["optuna", "scipy", "matplotlib"]
        if sweep.lm_eval_tasks:
            needed.append("lm-eval")
        check_packages("This", *needed)
        from .worker import SweepWorker  # imports these packages

        worker = SweepWorker(sweep, settings, flags.is_embedded)
        try:
            worker.prepare()
            worker.work()
        except KeyboardInterrupt:
            print("Interrupted. The same command goes on where it stopped.", file=sys.stderr)
            sys.exit(130)
        worker.report()
