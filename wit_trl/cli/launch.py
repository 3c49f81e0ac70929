"""`wit-trl sft` up to its training: it reads the flags, and runs `accelerate launch` in this process."""

import logging
import os
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.commands.config import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command
from accelerate.utils import patch_environment
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from . import LAUNCHER
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
        flags.check_files()
        training = _without(flags.args, flags.launch_on_line)
        if debug:
            training.append("--debug")
        launched = parse_launch_flags(flags.launch_flags, module, training)
        if launched.accelerate_config is not None and launched.config_file is None:
            launched.config_file = str(accelerate_config_file(launched.accelerate_config))
        _suit_cpu(launched, flags.given.get("use_cpu", False))
        # With `-m`, Python would import modules of the working folder in the place of others of their name
        environment = {"PYTHONSAFEPATH": "1"}
        if launched.mpirun_hostfile is None:  # which would be the parent
            environment[LAUNCHER] = str(os.getpid())
        with patch_environment(**environment):
            _run(launched)


def _without(args: list[str], remaining: list[str]) -> list[str]:
    """Returns the arguments without the remaining ones, which the parser did not know. Both are in the same order."""
    unknown = list(remaining)
    return [arg for arg in args if unknown[:1] != [arg] or unknown.pop(0) != arg]


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


def _run(launched: Namespace) -> None:
    """Launches the training, and ends this process with its exit status if it fails. The training has said why."""
    # These loggers repeat the exit status of each process
    for name in ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.agent.server.api"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # This one lists the flags that were not given
    logging.getLogger("accelerate.commands.launch").setLevel(logging.ERROR)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # `nohup` ignores one
            signal.signal(number, _forward)
    try:
        launch_command(launched)
        return
    except subprocess.CalledProcessError as error:
        status = error.returncode
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
    except SignalException as error:
        status = 128 + error.sigval
    except KeyboardInterrupt:
        # In a terminal, Ctrl-C reaches the training too
        for child in psutil.wait_procs(psutil.Process().children(), timeout=5)[1]:
            child.terminate()
        status = 128 + signal.SIGINT
    if status < 0:  # the process was killed and could say nothing
        reason = " Often there was too little memory." if status == -signal.SIGKILL else ""
        print(f"error: {signal.Signals(-status).name} ended a process of the training.{reason}", file=sys.stderr)
        status = 128 - status
    if status == 128 + signal.SIGINT:
        print("Interrupted. With --resume_from_checkpoint True, it goes on from its last checkpoint.", file=sys.stderr)
    sys.exit(status)


def _forward(number: int, _: Any) -> None:
    """Sends a signal to the processes of the training, whose end ends this one."""
    children = psutil.Process().children()
    if not children:
        sys.exit(128 + number)
    for child in children:
        child.send_signal(number)
