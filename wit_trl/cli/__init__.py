"""The command line. A command is imported when it runs, so that `wit-trl --help` takes no time."""

import argparse
import importlib
import sys
from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> None:
    """Runs `wit-trl`. `args` are the arguments after it, by default those of the process."""
    args = list(sys.argv[1:] if args is None else args)
    parser = argparse.ArgumentParser(
        prog="wit-trl", description="Weighted Instruction Tuning for TRL.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    # The flags, and the help on them, are those of the command
    commands.add_parser("inspect", add_help=False, help="show tokens and their weights as the trainer sees them")
    command = parser.parse_args(args[:1]).command
    importlib.import_module(f".{command}", __name__).main(args[1:])
