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
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

import yaml
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from ..config import WITSFTConfig
from ..report.page import printable
from .names import check_file, check_mixture


TRAINING_TYPES = (ScriptArguments, WITSFTConfig, ModelConfig, DatasetMixtureConfig)
T = TypeVar("T")
_SHOWN = 2000  # characters at each end of a long error

_EMBEDDED = (
    "Without --model_name_or_path and --dataset_name, it is the embedded default: a small model and the functions of "
    "Python's standard library. "
)
_LAUNCHER = (
    "It takes the flags of `accelerate launch` too, which `accelerate launch -h` lists, and --accelerate_config with a "
    "file or the name of one that is shipped, such as multi_gpu or fsdp. "
)
# What is said below the flags of a command
_EPILOGS = {
    "wit-trl sft": _EMBEDDED + _LAUNCHER,
    "wit-trl sweep": _EMBEDDED + _LAUNCHER,
    "wit-trl inspect": _EMBEDDED + "The flags of `accelerate launch`, and --accelerate_config, are ignored. ",
    "wit-trl check": "Without --model_name_or_path and --dataset_name, it checks tiny models. It uses one process. ",
}
_COMMON = "Any flag may stand in the YAML file. --debug without a value shows the traceback of an error."


@contextmanager
def errors_in_one_sentence(debug: bool = False) -> Iterator[None]:
    """
    Ends the process with one sentence for what a user can get wrong. Of several processes on a machine, one prints it.
    With `debug` the error is raised as it is.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # what reads the output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (ImportError, OSError, ValueError, yaml.YAMLError) as error:
        if debug:
            raise
        message = f"error: {error}"
        if len(message) > 2 * _SHOWN:
            message = f"{message[:_SHOWN]} [... {len(message) - 2 * _SHOWN:,} characters ...] {message[-_SHOWN:]}"
        message = "\n".join(printable(line) for line in message.split("\n"))
        if os.environ.get("LOCAL_RANK", "0") != "0":
            # Mostly all processes have the same error. The first one prints it meanwhile, and its end ends this one
            time.sleep(20)
        sys.exit(message)


def is_refusal(error: BaseException) -> bool:
    """Whether this package raised an error that was caught."""
    return Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(Path(__file__).parents[1])


@contextmanager
def refusals_in_one_sentence(debug: bool) -> Iterator[None]:
    """Ends the process with one sentence for what this package refuses. All other errors keep their traceback."""
    try:
        yield
    except ValueError as error:
        if not is_refusal(error):
            raise
        with errors_in_one_sentence(debug):
            raise


def split_debug(args: Sequence[str] | None = None) -> tuple[list[str], bool]:
    """Returns the arguments, by default of the process, and whether a `--debug` without a value was among them."""
    args = sys.argv[1:] if args is None else args
    pairs = itertools.pairwise([*args, "-"])
    left = [arg for arg, following in pairs if arg != "--debug" or not following.startswith("-")]
    return left, len(left) < len(args)


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
    """The flags as given, on the command line and in a file. Raises `ValueError` for unknown ones and wrong values."""

    def __init__(
        self,
        dataclass_types: Sequence[type],  # their fields are flags
        args: Sequence[str],  # without a `--debug` that has no value
        prog: str | None = None,
        defaults: dict[str, Any] | None = None,
        embedded_defaults: dict[str, Any] | None = None,  # further ones, where model and data are embedded
        refused: Collection[str] = (),  # flags that the command refuses, and its help does not show
    ):
        self.args, self.defaults, self.embedded_defaults = list(args), defaults or {}, embedded_defaults or {}
        parser = _Parser(dataclass_types, prog, self.defaults, refused)
        line, self.launch_on_line = parser.parse_known_args(self.args)
        self.given: dict[str, Any] = vars(line)  # by the name of the flag
        # Those of `accelerate launch`. The last one counts
        self.launch_flags = self.launch_on_line
        files = self.given.pop("config", [])
        if len(files) > 1:
            raise ValueError(f"--config is given {len(files)} times. Put all flags into one file.")
        if files:
            in_file, launch_in_file = parser.read_file(files[0])
            self.given, self.launch_flags = in_file | self.given, [*launch_in_file, *self.launch_on_line]
        if self.launch_flags:
            _check_names(parser, self.launch_flags)

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
        if not self.is_embedded:
            return self.defaults | self.given
        from ..embedded import EMBEDDED_DEFAULTS  # imports `datasets`, for which `-h` does not wait

        return EMBEDDED_DEFAULTS | self.embedded_defaults | self.defaults | self.given

    def make(self, dataclass_type: type[T]) -> T:
        """Returns an instance of a dataclass. Raises `ValueError` for a model without data, or what it refuses."""
        names = inspect.signature(dataclass_type).parameters
        with warnings.catch_warnings():
            if "gradient_checkpointing" not in self.given:  # else it is of TRL's own default
                warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
            return dataclass_type(**{name: value for name, value in self.values.items() if name in names})

    def check_files(self) -> None:
        """Raises `ValueError` for a data file that is not there, before what reads data is imported."""
        mixture = DatasetMixtureConfig([*self.given.get("datasets", ())]).datasets  # made of mappings, if from a file
        for name in [entry.path for entry in mixture] or [self.given.get("dataset_name") or ""]:
            check_file(Path(name))

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
    """A parser of the flags that were given, without defaults. It raises `ValueError` where argparse would exit."""

    def __init__(
        self, dataclass_types: Sequence[type], prog: str | None, defaults: dict[str, Any], refused: Collection[str]
    ):
        # No abbreviations: the next version of TRL or of accelerate may give them another meaning
        super().__init__(dataclass_types, prog=prog, usage="%(prog)s [flags]", allow_abbrev=False)
        self.epilog = _EPILOGS.get(self.prog, "") + _COMMON
        self.set_defaults_with_config(**defaults)
        ours = self.add_argument_group("Weighted Instruction Tuning")
        self._action_groups.insert(0, self._action_groups.pop())
        names = {n for kind in dataclass_types if kind.__module__.startswith("wit_trl.") for n in kind.__annotations__}
        for action in self._actions[1:]:  # the first one is `--help`, which shows the defaults
            if action.dest in refused:
                action.help = argparse.SUPPRESS
            elif action.const is False:  # `--no_X`, which has the help of X
                action.help = f"The same as --{action.dest} False."
            elif action.help:
                action.help += f" (default: {action.default})".replace("%", "%%")
            action.default = argparse.SUPPRESS
            action.option_strings = action.option_strings[:1]  # the one with hyphens works too, and is not shown
            if action.dest in names:
                self._optionals._group_actions.remove(action)
                ours._group_actions.append(action)
        hints = [hint for kind in dataclass_types for hint in get_type_hints(kind).items()]
        self._may_be_null = {name for name, hint in hints if NoneType in get_args(hint)}
        ours.add_argument("--config", action="append", default=argparse.SUPPRESS, help="YAML file with any flags.")

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message[0].upper()}{message[1:]}. `{self.prog} -h` lists the flags.")

    def read_file(self, path: str) -> tuple[dict[str, Any], list[str]]:
        """Returns the values of a YAML file, checked as those of the command line are, and the other flags in it."""
        if not Path(path).exists():
            raise ValueError(f"--config is {path}, but there is no such file.")
        with Path(path).open(encoding="utf-8") as file:
            config = yaml.safe_load(file)
        if not isinstance(config, dict) or not isinstance(env := config.pop("env", {}), dict):
            raise ValueError(f"{path} must be a YAML mapping of flags to values, and so must be `env` in it.")
        os.environ |= {str(name): str(value) for name, value in env.items()}
        given: dict[str, Any] = {}
        launch: list[str] = []
        for name, value in config.items():
            action = self._option_string_actions.get(f"--{name}")
            values = value if isinstance(value, list) else [value]
            if name == "config":
                raise ValueError(f"{path} has the key `config`, but one file must hold all flags. Join the two.")
            if action is None:
                launch += [f"--{name}", str(value)]
            elif value is None and name not in self._may_be_null:
                raise ValueError(f"{path} sets `{name}` to null. Give it a value, or remove the line.")
            elif name == "datasets":
                check_mixture(value)
                given[name] = value
            elif value in (None, []) or (values is value and action.nargs != "+") or isinstance(values[0], dict | list):
                given[name] = value  # no text on the command line says the same
            elif isinstance(value, bool) and action.const is True and not action.choices:
                given[name] = value
            else:
                if value is False and "no" in (action.choices or ()):
                    values = ["no"]  # which YAML reads as false
                texts = [f"--{name}", *map(str, values)]
                given |= vars(self.parse_args(["=".join(texts)] if len(texts) == 2 else texts))
        return given, launch


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


def _check_names(parser: TrlParser, flags: list[str]) -> None:
    """Raises `ValueError` for flags that are neither those of the training nor those of `accelerate launch`."""
    launch = launch_parser()._option_string_actions
    # Each is known with underscores and with hyphens
    names = {name.replace("-", "_") for name in (*parser._option_string_actions, *launch) if len(name) > 2}
    for flag in (flag.split("=")[0] for flag in flags):
        if flag not in launch and re.match(r"-+[^-\d.]", flag):  # else it is a value
            nearest = difflib.get_close_matches(flag.replace("-", "_"), sorted(names), n=1)
            remedy = f"Did you mean --{nearest[0][2:]}?" if nearest else f"`{parser.prog} -h` lists the flags."
            raise ValueError(f"There is no flag {flag}. {remedy}")
    parse_launch_flags(flags)
