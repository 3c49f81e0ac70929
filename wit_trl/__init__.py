"""Weighted Instruction Tuning (WIT) for TRL: `SFTTrainer` with a weight on the prompt and one on the completion."""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .config import WITSFTConfig
    from .data.collator import DataCollatorForWIT
    from .data.schemas import to_trl_format
    from .data.vision_collator import DataCollatorForVisionLanguageWIT
    from .loss.functions import weighted_linear_cross_entropy, wit_loss
    from .trainer import WITSFTTrainer


__all__ = [
    "DataCollatorForVisionLanguageWIT",
    "DataCollatorForWIT",
    "WITSFTConfig",
    "WITSFTTrainer",
    "to_trl_format",
    "weighted_linear_cross_entropy",
    "wit_loss",
]
__version__ = "0.1.0"

# Imported at their first use, as in TRL: the command line answers `--version` and `--help` without torch
_MODULES = {
    "DataCollatorForVisionLanguageWIT": "data.vision_collator",
    "DataCollatorForWIT": "data.collator",
    "WITSFTConfig": "config",
    "WITSFTTrainer": "trainer",
    "to_trl_format": "data.schemas",
    "weighted_linear_cross_entropy": "loss.functions",
    "wit_loss": "loss.functions",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    return value
