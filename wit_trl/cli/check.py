"""`wit-trl check`: whether the loss is right on this machine, and which head is the faster one."""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
import transformers
from rich.console import Console
from transformers import AutoConfig

from ..check.checks import Check, check_kernels, check_trainers, time_heads
from ..loss.functions import uses_one_pass
from .arguments import Flags, errors_in_one_sentence, split_debug
from .loading import errors_of_model
from .versions import versions


# Hidden size and vocabulary of a Llama-3.2-1B
_DEFAULT_SIZES = (2048, 128256)


@dataclass
class CheckArguments:
    """Arguments of `wit-trl check`."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model whose hidden size and vocabulary are timed. Its weights are not read."}
    )
    model_revision: str = field(default="main", metadata={"help": "Revision of the model."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether code of the model may run."})
    use_cpu: bool = field(default=False, metadata={"help": "Whether to check the CPU where there is another device."})
    json: str | None = field(default=None, metadata={"help": "File to write all figures to."})

    def __post_init__(self):
        if self.json is not None and not Path(self.json).parent.is_dir():
            raise ValueError(f"Cannot write {self.json}: there is no folder {Path(self.json).parent}. Create it first.")


def head_sizes(arguments: CheckArguments) -> tuple[int, int]:
    """Returns the hidden size and the vocabulary of the model, or of a Llama-3.2-1B."""
    name = arguments.model_name_or_path
    if name is None:
        return _DEFAULT_SIZES
    with errors_of_model(name):
        config = AutoConfig.from_pretrained(
            name, revision=arguments.model_revision, trust_remote_code=arguments.trust_remote_code
        ).get_text_config()
    return config.hidden_size, config.vocab_size


def advice(seconds: dict[str, float], device: str, wrong: set[str]) -> str:
    """Returns which head to choose here, from times by the names of kernels, without those that are wrong."""
    chosen = "one_pass" if uses_one_pass("auto", torch.device(device)) else "trl"
    best = min((name for name in ("one_pass", "trl") if name not in wrong), key=lambda name: seconds[name], default=None)
    if best is None:
        return "No head is right here: do not train on this device."
    if best == chosen:
        return f'Leave `fused_head="auto"`, which is `"{chosen}"` here.'
    saved = 1000 * (seconds[chosen] - seconds[best])
    why = f"saves {saved:.1f} ms" if chosen not in wrong else "is right"
    return f'Set `fused_head="{best}"`: it {why}. `"auto"` is `"{chosen}"` here.'


def row(check: Check) -> str:
    """Returns a line of the table."""
    figure = check.error or f"{check.figure:.1e}, at most {check.limit:.0e}"
    return f"{'✓' if check.is_right else '✗'} {check.name}: {figure}"


def main(args: Sequence[str]) -> None:
    """Runs the command. `args` are the arguments after `wit-trl check`. Ends with status 1 if anything is wrong."""
    args, debug = split_debug(args)
    with errors_in_one_sentence(debug):
        arguments = Flags((CheckArguments,), args, prog="wit-trl check").make(CheckArguments)
        sizes = head_sizes(arguments)
