"""Weighted Instruction Tuning (WIT) for TRL: `SFTTrainer` with a weight on the prompt and one on the completion."""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .config import WITSFTConfig
    from .data_collator import DataCollatorForWIT
    from .loss import weighted_linear_cross_entropy, wit_loss
    from .schemas import to_trl_format
    from .trainer import WITSFTTrainer
    from .vision_data_collator import DataCollatorForVisionLanguageWIT


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
    "DataCollatorForVisionLanguageWIT": "vision_data_collator",
    "DataCollatorForWIT": "data_collator",
    "WITSFTConfig": "config",
    "WITSFTTrainer": "trainer",
    "to_trl_format": "schemas",
    "weighted_linear_cross_entropy": "loss",
    "wit_loss": "loss",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    return value
