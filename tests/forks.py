"""
Runs functions, and what users launch, in processes that have their imports behind them. The imports take a process ten
seconds, and the tests have more than a hundred, so one server imports once, and every process is a fork of it. All else
is what users launch: accelerate reads the configuration, and torchrun's agent starts and watches the ranks.
"""

import contextlib
import gc
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

from accelerate.commands import launch
from torch.distributed import run as torchrun

from wit_trl import cli


REPOSITORY = Path(__file__).parent.parent
IMPORTED = (
    "tests.forks",
    "tests.distributed.worker",
    "deepspeed",
    "matplotlib.figure",
    "optuna",
    "wit_trl.sweep.trial",
)
# What Triton defines while it is imported is for its interpreter or for a GPU
ENVIRONMENT = {"PYTHONPATH": str(REPOSITORY), "TRITON_INTERPRET": "1", "DS_ACCELERATOR": "cpu"}


def run_python(*arguments):
    """Does what Python does with these arguments: a script and its own, or `-m`, a module and its own."""
    if arguments[0] != "-m":
        sys.argv = list(arguments)
        runpy.run_path(arguments[0], run_name="__main__")
        return
    _, module, *sys.argv[1:] = arguments
    sys.modules.pop(module, None)  # it runs once more
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _run_in(environment, function, arguments):
    os.environ.clear()
    os.environ.update(environment)
    function(*arguments)


def _launch_one(args):
    (_, *arguments), environment = launch.prepare_simple_launcher_cmd_env(args)
    process = multiprocessing.get_context("fork").Process(target=_run_in, args=(environment, run_python, arguments))
    process.start()
    process.join()
    if process.exitcode:
        raise subprocess.CalledProcessError(process.exitcode, arguments)


def _launch_several(args, run=torchrun.run):
    module = ["-m"] if args.module else []
    args.run_path, args.start_method = True, "fork"
    with mock.patch.object(torchrun, "run_script_path", lambda *arguments: run_python(*module, *arguments)):
        run(args)


@contextlib.contextmanager
def _forking():
    """Has accelerate fork the processes that it launches."""
    with (
        mock.patch.object(launch, "simple_launcher", _launch_one),
        mock.patch.object(torchrun, "run", _launch_several),
    ):
        yield


def accelerate_launch(*arguments):
    """Does what `accelerate launch` does with these arguments."""
    with _forking():
        launch.launch_command(launch.launch_command_parser().parse_args(arguments))


def wit_trl(*arguments):
    """Does what `wit-trl` does with these arguments."""
    with _forking():
        cli.main(arguments)


def _start(function, arguments, environment, folder, output):
    os.setsid()  # a group with all that it starts, which can be killed at once
    gc.freeze()  # what was imported needs no collection
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
        stream.reconfigure(line_buffering=True)
    _run_in(environment, function, arguments)


class Fork:
    """A call in a fork of the server, in this folder and this environment."""

    def __init__(self, function, *arguments, **environment):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(IMPORTED))
        with mock.patch.dict(os.environ, ENVIRONMENT):
            multiprocessing.forkserver.ensure_running()
        self.output = tempfile.NamedTemporaryFile("r+")  # noqa: SIM115 -- which closes it with this object
        environment = os.environ | ENVIRONMENT | environment
        given = (function, [str(word) for word in arguments], environment, Path.cwd(), self.output.name)
        self.process = context.Process(target=_start, args=given)
        self.process.start()

    def finish(self, timeout=270):
        """Returns its exit status and all output. Leaves nothing of its group behind, whatever happens."""
        try:
            self.process.join(timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.join()
        return self.process.exitcode, self.output.read()


def run(function, *arguments, **environment):
    """Runs a call in a fork of the server. Returns its exit status and all output."""
    return Fork(function, *arguments, **environment).finish()
