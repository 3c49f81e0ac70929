"""The flags of the commands, on the command line and in a YAML file, and what users get wrong, in one sentence."""

import argparse
import difflib
import itertools
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from datasets.exceptions import DatasetsError
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser
from yaml import YAMLError

from ..config import WITSFTConfig
from ..embedded import EMBEDDED_DEFAULTS


TRAINING_TYPES = (ScriptArguments, WITSFTConfig, ModelConfig, DatasetMixtureConfig)

_EPILOG = """
Without --model_name_or_path and --dataset_name, it is the embedded default: a small model and the functions of Python's
standard library. Any flag may stand in the YAML file. `wit-trl sft` takes the flags of `accelerate launch` too, which
`accelerate launch -h` lists, and --accelerate_config with a file or the name of one that is shipped, such as multi_gpu
or fsdp; `wit-trl inspect` ignores them. --debug without a value shows the traceback of an error.
"""


@contextmanager
def errors_in_one_sentence(debug: bool = False) -> Iterator[None]:
    """
    Ends the process with one sentence for what a user can get wrong, which one process of a machine alone prints. With
    `debug` the error is raised as it is.
    """
    try:
        yield
    except (DatasetsError, ImportError, OSError, ValueError, YAMLError) as error:
        if debug:
            raise
        message = f"error: {error}"
        if isinstance(error, DatasetsError) and error.__cause__:
            message += f": {error.__cause__}"
    else:
        return
    if os.environ.get("LOCAL_RANK", "0") != "0":
        # Time for the first process to print the same error. It ends the others; an error of this one alone is printed
        time.sleep(20)
    sys.exit(message)


def split_debug(args: Sequence[str]) -> tuple[list[str], bool]:
    """Returns the arguments without `--debug`, and whether it was there. With a value it is a flag of the training."""
    left, debug = [], False
    for flag, following in itertools.pairwise([*args, "-"]):
        if flag == "--debug" and following.startswith("-"):
            debug = True
        else:
            left.append(flag)
    return left, debug


@dataclass
class Flags:
    """
    The flags of a command as they were given. See [`parse_flags`].

    Args:
        dataclass_types (`Sequence[type]`): The dataclasses.
        args (`list[str]`): The arguments on the command line.
        prog (`str`, *optional*): The name of the program.
        unchecked (`tuple`): An instance of each dataclass, without what its `__post_init__` checks and changes.
        launch_in_file (`list[str]`): The flags of `accelerate launch` in the YAML file.
        launch_on_line (`list[str]`): The flags of `accelerate launch` on the command line.
        defaults (`dict`): The defaults that the command has instead of those of the dataclasses.
    """

    dataclass_types: Sequence[type]
    args: list[str]
    prog: str | None
    unchecked: tuple[Any, ...]
    launch_in_file: list[str]
    launch_on_line: list[str]
    defaults: dict[str, Any]

    @property
    def is_embedded(self) -> bool:
        """Whether neither model nor data is named. Raises `ValueError` if only one of them is."""
        *_, script_args, _, model_args, dataset_args = self.unchecked
        has_data = bool(script_args.dataset_name or dataset_args.datasets)
        if has_data != (model_args.model_name_or_path is not None):
            raise ValueError("Pass both --model_name_or_path and --dataset_name, or neither for the embedded default.")
        return not has_data

    def as_config(self) -> dict[str, Any]:
        """Returns what a YAML file with these flags holds, those of the launcher included: all that is no default."""
        defaults = _parser([type(given) for given in self.unchecked], self.prog).parse_args_into_dataclasses([])
        config = {
            name: getattr(value, "value", value)  # of an enumeration
            for given, default in zip(self.unchecked, defaults, strict=False)  # and what no dataclass has
            for name, value in vars(given).items()
            if value != getattr(default, name)
        }
        for flag, following in itertools.pairwise([*self.launch_in_file, *self.launch_on_line, "--"]):
            if flag.startswith("--"):
                name, _, value = flag[2:].partition("=")
                config[name.replace("-", "_")] = value or (True if following.startswith("--") else following)
        return config

    def check(self) -> tuple[Any, ...]:
        """
        Returns an instance of each dataclass. Without model and data, they have the `EMBEDDED_DEFAULTS`.

        Raises:
            `ValueError`: a model without data, data without a model, or what the dataclasses refuse.
        """
        parser = _parser(self.dataclass_types, self.prog)
        parser.set_defaults_with_config(**(EMBEDDED_DEFAULTS if self.is_embedded else {}) | self.defaults)
        return parser.parse_args_and_config(self.args, return_remaining_strings=True)[: len(self.dataclass_types)]


def parse_flags(
    dataclass_types: Sequence[type],
    args: Sequence[str] | None = None,
    prog: str | None = None,
    defaults: dict[str, Any] | None = None,
) -> Flags:
    """
    Returns the flags of the command line and of `--config`.

    Args:
        dataclass_types (`Sequence[type]`):
            The dataclasses: any of the caller's, then the `TRAINING_TYPES` or subclasses of them.
        args (`Sequence[str]`, *optional*):
            The arguments, without a `--debug` that has no value. By default those of the process.
        prog (`str`, *optional*):
            What `--help` calls the program, by default the file that was started.
        defaults (`dict`, *optional*):
            Defaults instead of those of the dataclasses.

    Raises:
        `ValueError`: a flag that does not exist, or a value of another type.
    """
    args = _config_apart(sys.argv[1:] if args is None else args)
    unchecked: list[type] = [
        dataclass(type(cls.__name__, (cls,), {"__post_init__": lambda self: None})) for cls in dataclass_types
    ]
    parser = _parser(unchecked, prog)
    parser.set_defaults_with_config(**defaults or {})
    *arguments, _, in_file, on_line = parser.parse_args_and_config(
        args, return_remaining_strings=True, separate_remaining_strings=True
    )
    _check_names(parser, in_file, in_file=True)
    _check_names(parser, on_line, in_file=False)
    return Flags(dataclass_types, args, prog, tuple(arguments), in_file, on_line, defaults or {})


class _Parser(TrlParser):
    """A parser that raises where argparse prints the names of all flags and ends the process."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message[0].upper()}{message[1:]}. `{self.prog} -h` lists the flags.")


def _parser(dataclass_types: Sequence[type], prog: str | None) -> TrlParser:
    # No abbreviations: the next version of TRL or of accelerate may give them another meaning
    parser = _Parser(dataclass_types, prog=prog, allow_abbrev=False, epilog=_EPILOG)
    # TrlParser takes it out of the arguments before it parses
    parser.add_argument("--config", help="YAML file with any of the flags.")
    return parser


def _config_apart(args: Sequence[str]) -> list[str]:
    """Returns the arguments with `--config` and its file as two, as `TrlParser` needs them."""
    apart = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if apart[-1:] == ["--config"]:
        raise ValueError("--config needs the name of a YAML file after it.")
    return apart


def launch_parser() -> argparse.ArgumentParser:
    """Returns the parser of `accelerate launch`, with `--accelerate_config`."""
    handlers = logging.root.handlers[:]
    from accelerate.commands.launch import launch_command_parser

    logging.root.handlers[:] = handlers  # it adds one, which would print the warnings of the training too

    def error(message: str) -> NoReturn:
        raise ValueError(f"{message[0].upper()}{message[1:]}. `accelerate launch -h` lists the flags of the launcher.")

    parser = launch_command_parser()
    parser.error = error
    parser.add_argument("--accelerate_config", "--accelerate-config")
    return parser


def parse_launch_flags(flags: Sequence[str], module: str = "", module_args: Sequence[str] = ()) -> argparse.Namespace:
    """
    Returns the flags as `accelerate launch` parses them before the module that it starts. Those that take no value may
    have True or False, as the flags of the training.
    """
    parser = launch_parser()
    given: list[str] = []
    for flag in flags:
        switch = parser._option_string_actions.get(given[-1]) if given else None
        if switch is None or switch.nargs != 0 or flag.lower() not in ("true", "false"):
            given.append(flag)
        elif flag.lower() == "false":
            given.pop()
    launched = parser.parse_args([*given, "--module", module, *module_args])
    if launched.training_script != module:
        raise ValueError(f"{launched.training_script!r} is the value of no flag. Remove it, or put its flag before it.")
    return launched


def _check_names(parser: TrlParser, flags: list[str], in_file: bool) -> None:
    """Raises `ValueError` for flags that are neither those of the training nor those of `accelerate launch`."""
    if not flags:
        return
    launch = launch_parser()._option_string_actions
    for flag in (flag.split("=")[0] for flag in flags):
        if not flag.startswith("-") or flag in launch or _is_number(flag):
            continue
        # Each is known with underscores and with hyphens
        names = {name[2:].replace("-", "_") for name in (*parser._option_string_actions, *launch) if len(name) > 2}
        nearest = difflib.get_close_matches(flag.lstrip("-").replace("-", "_"), sorted(names), n=1)
        prefix = "" if in_file else "--"
        there_is_no = "The YAML file has a key that is no flag:" if in_file else "There is no flag"
        remedy = f"Did you mean {prefix}{nearest[0]}?" if nearest else f"`{parser.prog} -h` lists the flags."
        raise ValueError(f"{there_is_no} {flag.removeprefix('--') if in_file else flag}. {remedy}")
    parse_launch_flags(flags)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
