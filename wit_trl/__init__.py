"""Weighted Instruction Tuning (WIT) for TRL: `SFTTrainer` with a weight on the prompt and one on the completion."""

from .config import WITSFTConfig
from .data_collator import DataCollatorForWIT
from .loss import weighted_linear_cross_entropy, wit_loss
from .trainer import WITSFTTrainer


__all__ = ["DataCollatorForWIT", "WITSFTConfig", "WITSFTTrainer", "weighted_linear_cross_entropy", "wit_loss"]
__version__ = "0.1.0"
