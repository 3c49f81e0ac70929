"""Resuming a training: the last complete checkpoint, and the weights that it was trained with."""

from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from .._upstream import TRAINER_STATE_NAME, sort_checkpoints
from ..config import WITSFTConfig


logger = get_logger(__name__)


class LossWeightsCallback(TrainerCallback, ExportableState):
    """Writes the weights, and what else decides about the loss, to the state of each checkpoint."""

    def __init__(self):
        self.weights: dict[str, Any] = {}

    def on_train_begin(self, args: WITSFTConfig, *_: Any, **kwargs: Any) -> None:
        self.weights = args.loss_settings

    def state(self) -> dict[str, dict]:
        """Returns what a checkpoint keeps."""
        return {"args": {}, "attributes": {"weights": self.weights}}


def checkpoint_to_resume(resume_from_checkpoint: str | bool | None, args: WITSFTConfig) -> str | bool | None:
    """
    Returns the folder to resume from, the last complete one in `output_dir` if `resume_from_checkpoint` is `True`.
    Warns if it was trained with other weights.

    Raises:
        `ValueError`: it is `True`, but there is no complete checkpoint.
    """
    if resume_from_checkpoint is True:
        (resume_from_checkpoint,) = broadcast_object_list([_last_complete_checkpoint(args.output_dir)])
        if resume_from_checkpoint is None:
            raise ValueError(
                f"There is no complete checkpoint in `{args.output_dir}` to resume from. Check the folder, or train "
                "from the start without `resume_from_checkpoint`."
            )
    if resume_from_checkpoint and (state := _read_state(str(resume_from_checkpoint))) is not None:
        saved = state.stateful_callbacks.get(LossWeightsCallback.__name__, {})
        weights = saved.get("attributes", {}).get("weights", {})
        changed = {name: weight for name, weight in weights.items() if getattr(args, name) != weight}
        if changed:
            current = {name: getattr(args, name) for name in changed}
            logger.warning_once(
                f"The checkpoint {resume_from_checkpoint} was trained with {changed}, and is resumed with {current}. "
                "Its optimizer state and the losses logged so far are of the former."
            )
    return resume_from_checkpoint


def _last_complete_checkpoint(output_dir: str) -> str | None:
    """Returns the last checkpoint with a state. It is written last: no kill and no full disk cut the saving off."""
    for folder in reversed(sort_checkpoints(output_dir)):
        if _read_state(folder) is not None:
            return folder
        logger.warning(f"{folder} is incomplete, because its saving was cut off. Looking for an earlier one.")
    return None


def _read_state(folder: str) -> TrainerState | None:
    try:
        return TrainerState.load_from_json(str(Path(folder, TRAINER_STATE_NAME)))
    except (OSError, TypeError, ValueError):  # another program may have written it
        return None
