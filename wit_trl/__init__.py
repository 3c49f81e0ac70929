"""Weighted Instruction Tuning (WIT) for TRL: `SFTTrainer` with a weight on the prompt and one on the completion."""

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
