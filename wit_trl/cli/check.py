"""`wit-trl check`: is the loss right on this machine, and which head is the faster one."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .arguments import TRAINING_TYPES, Flags, errors_in_one_sentence, parse_launch_flags, split_debug
from .launch import accelerate_config_file


@dataclass
class CheckArguments:
    """Arguments of `wit-trl check` besides those of the training."""

    json: str | None = field(default=None, metadata={"help": "File to write all results to."})

    def __post_init__(self):
        if self.json is not None and not Path(self.json).parent.is_dir():
            raise ValueError(f"Cannot write {self.json}: there is no folder {Path(self.json).parent}. Create it first.")


def main(args: Sequence[str]) -> None:
    """Runs the command. `args` are the arguments after `wit-trl check`. Ends with status 1 if anything is wrong."""
    args, debug = split_debug(args)
    with errors_in_one_sentence(debug):
        flags = Flags((CheckArguments, *TRAINING_TYPES), args, prog="wit-trl check")
        environment = dict(os.environ)
        launch_flags = flags.launch_flags
        if (name := parse_launch_flags(launch_flags).accelerate_config) is not None:
            accelerate_config_file(name)
        if not (launch_flags or flags.given.get("use_cpu")) and torch.accelerator.device_count() > 1:
            launch_flags = ["--multi_gpu", "--num_processes", "2"]
        # Else `Trainer` would divide a batch among all devices
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        given, arguments = flags.make(CheckArguments), flags.check()
        from .checking import check  # imports the trainer, for which `-h` does not wait

        is_right = check(arguments, given.json, launch_flags, environment)
    sys.exit(0 if is_right else 1)
