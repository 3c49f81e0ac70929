"""
The flags of the commands, and one sentence for what a user gets wrong.

1. [`Flags`] reads the command line and the YAML file, and refuses a name that no flag has.
2. `Flags.make` and `Flags.check` make dataclasses of the values. Model and data decide which defaults these have.

The process that launches a training takes the first step alone, because the second looks for devices.
"""

import argparse
import difflib
import importlib.util
import inspect
import itertools
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from typing import Any, NoReturn, TypeVar

from datasets.exceptions import DatasetsError
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser
from yaml import YAMLError

from ..config import WITSFTConfig
from ..embedded import EMBEDDED_DEFAULTS


TRAINING_TYPES = (ScriptArguments, WITSFTConfig, ModelConfig, DatasetMixtureConfig)
T = TypeVar("T")

_EPILOG = """
Without --model_name_or_path and --dataset_name, it is the embedded default: a small model and the functions of Python's
standard library. Any flag may stand in the YAML file. `wit-trl sft` takes the flags of `accelerate launch` too, which
`accelerate launch -h` lists, and --accelerate_config with a file or the name of one that is shipped, such as multi_gpu
or fsdp; `wit-trl inspect` ignores them. --debug without a value shows the traceback of an error.
"""


@contextmanager
def errors_in_one_sentence(debug: bool = False) -> Iterator[None]:
    """
    Ends the process with one sentence for what a user can get wrong. Of several processes on a machine, one prints it.
    With `debug` the error is raised as it is.
    """
    try:
        yield
    except (DatasetsError, ImportError, OSError, ValueError, YAMLError) as error:
        if debug:
            raise
        message = f"error: {error}"
        if isinstance(error, DatasetsError) and error.__cause__:
            message += f": {error.__cause__}"
        if os.environ.get("LOCAL_RANK", "0") != "0":
            # Mostly all processes have the same error. The first one prints it meanwhile, and its end ends this one
            time.sleep(20)
        sys.exit(message)


def split_debug(args: Sequence[str] | None = None) -> tuple[list[str], bool]:
    """
    Returns the arguments without `--debug`, and whether it was there. With a value it is a flag of the training. By
    default the arguments are those of the process.
    """
    left, debug = [], False
    for flag, following in itertools.pairwise([*(sys.argv[1:] if args is None else args), "-"]):
        if flag == "--debug" and following.startswith("-"):
            debug = True
        else:
            left.append(flag)
    return left, debug


def check_packages(what: str, *packages: str) -> None:
    """Raises `ValueError` if one of these packages, which `what` needs, is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name.replace("-", "_")) is None]
    if missing:
        raise ValueError(f"{what} needs {', '.join(missing)}. Install it with `pip install {' '.join(missing)}`.")


@dataclass
class Arguments:
    """The checked arguments of a training."""

    script: ScriptArguments
    training: WITSFTConfig
    model: ModelConfig
    dataset: DatasetMixtureConfig


class Flags:
    """
    The flags of a command as they were given, on the command line and in the file of `--config`.

    Args:
        dataclass_types (`Sequence[type]`): The dataclasses whose fields are flags.
        args (`Sequence[str]`): The command line, without a `--debug` that has no value.
        prog (`str`, *optional*): What `--help` calls the program, by default the file that was started.
        defaults (`dict`, *optional*): Defaults instead of those of the dataclasses.
        embedded_defaults (`dict`, *optional*): Further defaults, for the embedded model and data.

    Raises:
        `ValueError`: a flag that does not exist, or a value of another type.
    """

    def __init__(
        self,
        dataclass_types: Sequence[type],
        args: Sequence[str],
        prog: str | None = None,
        defaults: dict[str, Any] | None = None,
        embedded_defaults: dict[str, Any] = EMBEDDED_DEFAULTS,
    ):
        self.args, self.defaults, self.embedded_defaults = _config_apart(args), defaults or {}, embedded_defaults
        parser = _Parser(dataclass_types, prog, self.defaults)
        given, launch_in_file, self.launch_on_line = parser.parse_args_and_config(
            self.args, return_remaining_strings=True, separate_remaining_strings=True
        )
        _check_names(parser, launch_in_file, in_file=True)
        _check_names(parser, self.launch_on_line, in_file=False)
        self.given: dict[str, Any] = vars(given)  # by the name of the flag
        # Those of `accelerate launch`. The last one counts
        self.launch_flags = [*launch_in_file, *self.launch_on_line]

    @property
    def is_embedded(self) -> bool:
        """Whether neither model nor data is named. Raises `ValueError` if only one of them is."""
        has_data = bool(self.given.get("dataset_name") or self.given.get("datasets"))
        if has_data != (self.given.get("model_name_or_path") is not None):
            raise ValueError("Pass both --model_name_or_path and --dataset_name, or neither for the embedded default.")
        return not has_data

    @property
    def values(self) -> dict[str, Any]:
        """The values by the name of the flag, with all defaults that are not those of the dataclasses."""
        return (self.embedded_defaults if self.is_embedded else {}) | self.defaults | self.given

    def make(self, dataclass_type: type[T]) -> T:
        """Returns an instance of a dataclass. Raises `ValueError` for a model without data, or what it refuses."""
        names = inspect.signature(dataclass_type).parameters
        return dataclass_type(**{name: value for name, value in self.values.items() if name in names})

    def check(self, config_type: type[WITSFTConfig] = WITSFTConfig) -> Arguments:
        """Returns the arguments of the training. Raises `ValueError` as `make` does."""
        return Arguments(
            self.make(ScriptArguments), self.make(config_type), self.make(ModelConfig), self.make(DatasetMixtureConfig)
        )

    def as_config(self) -> dict[str, Any]:
        """Returns what a YAML file for `wit-trl sft` holds: what is no default, and the flags of the launcher."""
        values, config = self.values, {}
        for field in (field for dataclass_type in TRAINING_TYPES for field in fields(dataclass_type)):
            default = field.default if field.default_factory is MISSING else field.default_factory()
            if (value := values.get(field.name, default)) != default:
                config[field.name] = value
        for flag, following in itertools.pairwise([*self.launch_flags, "--"]):
            if flag.startswith("--"):
                name, _, value = flag[2:].partition("=")
                config[name.replace("-", "_")] = value or (True if following.startswith("--") else following)
        return config


class _Parser(TrlParser):
    """
    A parser of the flags that were given, without defaults. It raises `ValueError` where argparse prints the names of
    all flags and ends the process.
    """

    def __init__(self, dataclass_types: Sequence[type], prog: str | None, defaults: dict[str, Any]):
        # No abbreviations: the next version of TRL or of accelerate may give them another meaning
        super().__init__(dataclass_types, prog=prog, allow_abbrev=False, epilog=_EPILOG)
        self.set_defaults_with_config(**defaults)
        for action in self._actions[1:]:  # the first one is `--help`, which shows the defaults
            if action.help:
                action.help += f" (default: {action.default})".replace("%", "%%")
            action.default = argparse.SUPPRESS
        self.dataclass_types = ()  # the values come in a namespace instead
        # TrlParser takes it out of the arguments before it parses
        self.add_argument("--config", help="YAML file with any of the flags.")

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message[0].upper()}{message[1:]}. `{self.prog} -h` lists the flags.")


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
    Returns the flags as `accelerate launch` parses them before the module that it starts. As in a YAML file, True or
    False may follow a flag that takes no value.
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
        if flag in launch or re.match(r"-+[^-\d.]", flag) is None:  # the latter is a value
            continue
        # Each is known with underscores and with hyphens
        names = {name[2:].replace("-", "_") for name in (*parser._option_string_actions, *launch) if len(name) > 2}
        nearest = difflib.get_close_matches(flag.lstrip("-").replace("-", "_"), sorted(names), n=1)
        prefix = "" if in_file else "--"
        there_is_no = "The YAML file has a key that is no flag:" if in_file else "There is no flag"
        remedy = f"Did you mean {prefix}{nearest[0]}?" if nearest else f"`{parser.prog} -h` lists the flags."
        raise ValueError(f"{there_is_no} {flag.removeprefix('--') if in_file else flag}. {remedy}")
    parse_launch_flags(flags)
