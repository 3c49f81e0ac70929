"""The command line. A command is imported when it runs, so that `wit-trl --help` takes no time."""

import argparse
import importlib
import os
import sys
import threading
import time
from collections.abc import Sequence


LAUNCHER = "WIT_TRL_LAUNCHER"  # the variable that tells a process which one launched it
# The module of each command. Its `main` runs it
_MODULES = {"sft": "cli.launch", "sweep": "sweep.command", "inspect": "cli.inspect", "check": "cli.check"}


def main(args: Sequence[str] | None = None) -> None:
    """Runs `wit-trl`. `args` are the arguments after it, by default those of the process."""
    if args is None:
        args = sys.argv[1:]
        # A training runs in other processes. PEFT takes seconds to import, and bitsandbytes says something each time
        if args[:1] != ["check"]:  # which trains in this one
            sys.modules.setdefault("peft", None)  # type: ignore[arg-type]
    parser = argparse.ArgumentParser(
        prog="wit-trl", description="Weighted Instruction Tuning for TRL.", allow_abbrev=False
    )
    parser.add_argument("--version", action="store_true", help="print what a bug report needs, and exit")
    commands = parser.add_subparsers(dest="command", required="--version" not in args[:1])
    # The command itself parses its flags and prints their help
    commands.add_parser("sft", add_help=False, help="train a model, on any number of devices")
    commands.add_parser("sweep", add_help=False, help="search the weights: train some, and compare")
    commands.add_parser("inspect", add_help=False, help="show tokens and their weights as the trainer sees them")
    commands.add_parser("check", add_help=False, help="check the loss on this machine, and time the head")
    given = parser.parse_args(args[:1])
    if given.version:
        from .versions import versions

        print(versions(), end="")
        sys.exit()
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars would fill a file with escapes
    importlib.import_module(f"wit_trl.{_MODULES[given.command]}").main(args[1:])


def end_with_launcher() -> None:
    """Ends this process soon after the one that launched it, which may be killed before it can end it."""
    launcher = int(os.environ.pop(LAUNCHER, 0))

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os._exit(1)

    # Else other launchers are in between, which end their processes themselves. 1 adopts orphans
    if launcher and os.getppid() in (launcher, 1):
        threading.Thread(target=watch, daemon=True).start()
