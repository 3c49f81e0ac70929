"""The flags of the commands, and what users get wrong in them, in one sentence."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from datasets.exceptions import DatasetsError
from trl import TrlParser
from yaml import YAMLError

from ..embedded import EMBEDDED_DEFAULTS


@contextmanager
def errors_in_one_sentence() -> Iterator[None]:
    """Ends the process with one sentence for what a user can get wrong, which the main process alone prints."""
    try:
        yield
    except DatasetsError as error:
        message = f"error: {error}: {error.__cause__}" if error.__cause__ else f"error: {error}"
    except (ImportError, OSError, ValueError, YAMLError) as error:
        message = f"error: {error}"
    else:
        return
    sys.exit(message if os.environ.get("RANK", "0") == "0" else 1)


def parse_arguments(
    dataclass_types: Iterable[type], args: list[str] | None = None, prog: str | None = None
) -> tuple[Any, ...]:
    """
    Returns an instance of each dataclass from the command line and `--config`: any of the caller's, then
    [`~trl.ScriptArguments`], [`WITSFTConfig`], [`~trl.ModelConfig`] and [`~trl.DatasetMixtureConfig`]. Without model
    and data, they have the `EMBEDDED_DEFAULTS`. Wrong arguments end the process with one sentence.

    Args:
        dataclass_types (`Iterable[type]`):
            The dataclasses.
        args (`list[str]`, *optional*):
            The arguments, by default those of the process.
        prog (`str`, *optional*):
            What `--help` calls the program, by default the file that was started.
    """
    parser = TrlParser(dataclass_types, prog=prog)
    with errors_in_one_sentence():
        arguments = *_, script_args, _, model_args, dataset_args = parser.parse_args_and_config(args)
    has_data = bool(script_args.dataset_name or dataset_args.datasets)
    if has_data != (model_args.model_name_or_path is not None):
        sys.exit("error: Pass both --model_name_or_path and --dataset_name, or neither for the embedded default.")
    if has_data:
        return arguments
    parser.set_defaults_with_config(**EMBEDDED_DEFAULTS)
    return parser.parse_args_and_config(args)
