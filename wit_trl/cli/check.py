"""`wit-trl check`: whether the loss is right on this machine, and which head is the faster one."""

import dataclasses
import itertools
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from ..check.checks import Check, check_kernels, check_trainers, fastest_head, time_heads
from .arguments import Flags, errors_in_one_sentence, split_debug
from .loading import errors_of_model
from .versions import versions


@dataclass
class CheckArguments:
    """Arguments of `wit-trl check`."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model whose vocabulary and hidden size are timed. Its weights are not loaded."}
    )
    model_revision: str = field(default="main", metadata={"help": "Revision of the model."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether code of the model may run."})
    use_cpu: bool = field(default=False, metadata={"help": "Whether to check the CPU, although there is a device."})
    json: str | None = field(default=None, metadata={"help": "File to write all figures to."})
    timing: bool = field(default=True, metadata={"help": "Whether to time the head. That takes most of the memory."})

    def __post_init__(self):
        if self.json is not None and not Path(self.json).parent.is_dir():
            raise ValueError(f"Cannot write {self.json}: there is no folder {Path(self.json).parent}. Create it first.")
