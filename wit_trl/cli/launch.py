"""`wit-trl sft` up to its training: it reads the flags, and runs `accelerate launch` in this process."""

import logging
import os
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.commands.config import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from .arguments import TRAINING_TYPES, Flags, errors_in_one_sentence, parse_launch_flags, split_debug


# In a wheel they are in the package, in a clone at the top
_CONFIG_FOLDERS = [Path(__file__).parents[1] / "accelerate_configs", Path(__file__).parents[2] / "accelerate_configs"]


def accelerate_config_file(name: str) -> Path:
    """Returns the file of an accelerate configuration. Its name is a path or that of a shipped one, such as `fsdp`."""
    shipped = {file.stem: file for folder in _CONFIG_FOLDERS for file in folder.glob("*.yaml")}
    if Path(name).is_file():
        return Path(name)
    if name not in shipped:
        raise ValueError(
            f"--accelerate_config is {name}, but there is no such file. Shipped are {', '.join(sorted(shipped))}."
        )
    return shipped[name]


def main(args: Sequence[str], module: str = "wit_trl.cli.sft", types: Sequence[type] = TRAINING_TYPES) -> None:
    """
    Launches a training. `args` are the arguments after `wit-trl sft`. Each process runs `module`, and the fields of
    `types` are its flags.
    """
    args, debug = split_debug(args)
    with errors_in_one_sentence(debug):
        flags = Flags(types, args, prog="wit-trl sft")
        training = _without(flags.args, flags.launch_on_line)
        if debug:
            training.append("--debug")
        launched = parse_launch_flags(flags.launch_flags, module, training)
        if launched.accelerate_config is not None and launched.config_file is None:
            launched.config_file = str(accelerate_config_file(launched.accelerate_config))
        _suit_cpu(launched, flags.given.get("use_cpu", False))
        with _status_of_the_training():
            launch_command(launched)


def _without(args: list[str], remaining: list[str]) -> list[str]:
    """Returns the arguments without the remaining ones, which the parser did not know. Both are in the same order."""
    left, unknown = [], list(remaining)
    for arg in args:
        if unknown and arg == unknown[0]:
            unknown.pop(0)
        else:
            left.append(arg)
    return left


def _suit_cpu(launched: Namespace, use_cpu: bool) -> None:
    """
    Sets what a training on CPUs needs and `accelerate launch` does not choose, unless a flag says otherwise:

    - all cores, divided among the processes. The launcher would give one to each;
    - no mixed precision from a file that was written for GPUs: without instructions for it, bfloat16 made a step 8
      times slower. The training arguments may still ask for it;
    - several processes, if they were asked for without a file. The launcher would start one.
    """
    has_file = launched.config_file is not None or Path(default_config_file).is_file()
    config = load_config_from_file(launched.config_file) if has_file else None
    written_for_cpu = config is not None and config.use_cpu
    if not (use_cpu or launched.cpu or written_for_cpu) and torch.accelerator.is_available():
        return
    machines = launched.num_machines or (config and config.num_machines) or 1
    processes = launched.num_processes or (config and config.num_processes) or 1
    if launched.num_cpu_threads_per_process is None and "OMP_NUM_THREADS" not in os.environ:
        launched.num_cpu_threads_per_process = max(torch.get_num_threads() * machines // processes, 1)
    if launched.mixed_precision is None and not written_for_cpu:
        launched.mixed_precision = "no"
    if config is None and processes > 1 and not (launched.use_fsdp or launched.use_deepspeed or launched.cpu):
        launched.multi_gpu = True


@contextmanager
def _status_of_the_training() -> Iterator[None]:
    """
    Ends this process with the exit status of the training. The training has said why it failed, so the traceback of the
    launcher is left out.
    """
    # These loggers repeat the exit status of each process
    for name in ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.agent.server.api"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # This one lists the flags that were not given
    logging.getLogger("accelerate.commands.launch").setLevel(logging.ERROR)
    try:
        yield
        return
    except subprocess.CalledProcessError as error:
        status = error.returncode
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        status = failure.exitcode
    except SignalException as error:
        status = 128 + error.sigval
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    if status < 0:  # the process was killed and could say nothing
        name = signal.Signals(-status).name
        print(f"error: {name} ended a process of the training. SIGKILL often means too little memory.", file=sys.stderr)
        status = 128 - status
    sys.exit(status)
