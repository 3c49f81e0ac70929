"""
Launches the worker with `accelerate launch`, in processes that have their imports behind them. The imports take a rank
ten seconds, and the engines have some fifty ranks, so one server imports once, and every process is a fork of it. All
else is what users launch: accelerate reads the configuration, and torchrun's agent starts and watches the ranks.
"""

import contextlib
import multiprocessing.forkserver
import os
import runpy
import signal
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed import run as torchrun


REPOSITORY = Path(__file__).parent.parent.parent
WORKER = str(Path(__file__).parent / "worker.py")
# What Triton defines while it is imported is for its interpreter or for a GPU
ENVIRONMENT = {"PYTHONPATH": str(REPOSITORY), "TRITON_INTERPRET": "1", "DS_ACCELERATOR": "cpu"}


def run_worker(*arguments):
    """Runs the worker in this process."""
    sys.argv = [WORKER, *arguments]
    runpy.run_path(WORKER, run_name="__main__")


def accelerate_launch(*arguments):
    """Does what `accelerate launch` does with these arguments and the worker, but forks the ranks."""
    run = torchrun.run

    def run_forked(args):
        args.run_path, args.start_method = True, "fork"
        run(args)

    with mock.patch.object(torchrun, "run", run_forked):
        launch_command(launch_command_parser().parse_args(arguments))


def _run(function, arguments, environment, output):
    os.setsid()  # a group with all that it starts, which can be killed at once
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
        stream.reconfigure(line_buffering=True)
    function(*arguments)


def start(*calls, timeout=270, **environment):
    """Runs calls, each a function and its arguments, side by side in forks of the server. Returns the first exit status
    that is not 0, and all output. Leaves no child behind, whatever happens."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.launcher", "tests.distributed.worker"])
    with mock.patch.dict(os.environ, ENVIRONMENT):
        multiprocessing.forkserver.ensure_running()
    environment = os.environ | ENVIRONMENT | environment
    with tempfile.NamedTemporaryFile("r+") as output:
        processes = [
            context.Process(target=_run, args=(function, [str(word) for word in arguments], environment, output.name))
            for function, *arguments in calls
        ]
        end = time.monotonic() + timeout
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(max(0, end - time.monotonic()))
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.join()
        return next((process.exitcode for process in processes if process.exitcode), 0), output.read()
