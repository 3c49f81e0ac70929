"""Resuming a training: the last complete checkpoint, and the weights that it was trained with."""

import zipfile
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from .._upstream import TRAINER_STATE_NAME, sort_checkpoints
from ..config import WITSFTConfig


logger = get_logger(__name__)


class LossWeightsCallback(TrainerCallback, ExportableState):
    """Writes the weights, and what else decides about the loss, to the state of each checkpoint."""

    def __init__(self):
        self.weights: dict[str, Any] = {}

    def on_train_begin(self, args: WITSFTConfig, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        self.weights = args.loss_settings
        state.stateful_callbacks.setdefault(type(self).__name__, {})  # which a checkpoint of TRL's trainer lacks

    def state(self) -> dict[str, dict]:
        """Returns what a checkpoint keeps."""
        return {"args": {}, "attributes": {"weights": self.weights}}


def checkpoint_to_resume(resume_from_checkpoint: str | bool | None, args: WITSFTConfig) -> str | bool | None:
    """
    Returns the folder to resume from, the last complete one in `output_dir` if `resume_from_checkpoint` is `True`.
    Warns if it was trained with other weights, or has no optimizer.

    Raises:
        `ValueError`: it is `True`, but there is no complete checkpoint; or the folder is none.
    """
    if resume_from_checkpoint is True:
        (resume_from_checkpoint,) = broadcast_object_list([_last_complete_checkpoint(args.output_dir)])
        if resume_from_checkpoint is None:
            raise ValueError(
                f"There is no complete checkpoint in `{args.output_dir}` to resume from. Check the folder, or train "
                "from the start without `resume_from_checkpoint`."
            )
    if not resume_from_checkpoint:
        return resume_from_checkpoint
    folder = Path(str(resume_from_checkpoint))
    if file := _damaged_file(folder):
        raise ValueError(
            f"The checkpoint {folder} cannot be resumed: its {file} is missing or damaged. Choose another one, or "
            "train from the start."
        )
    saved, current = _saved_settings(folder) or {}, args.loss_settings
    if changed := {name: saved[name] for name in current if name in saved and saved[name] != current[name]}:
        logger.warning_once(
            f"The checkpoint {folder} was trained with {changed}, and is resumed with "
            f"{ {name: current[name] for name in changed} }. Its optimizer state and the losses logged so far are of "
            "the former."
        )
    lost = [name for name in ("optimizer", "scheduler") if not any(folder.glob(f"{name}*"))]
    if lost and not any(folder.glob("global_step*")):  # where DeepSpeed keeps them
        logger.warning_once(
            f"The checkpoint {folder} has no {lost[0]}.pt, so the optimizer and the learning rate begin as in a new "
            "training. Choose another one, or train without `save_only_model`, if that is not what you want."
        )
    return resume_from_checkpoint


def _last_complete_checkpoint(output_dir: str) -> str | None:
    """Returns the last whole checkpoint. The state is written last: no kill and no full disk cut the saving off."""
    for folder in reversed(sort_checkpoints(output_dir)):
        if (file := _damaged_file(Path(folder))) is None:
            return folder
        logger.warning(f"{folder} is passed over: its {file} is missing or damaged. Looking for an earlier one.")
    return None


def _saved_settings(folder: Path) -> dict[str, Any] | None:
    """Returns the settings of the loss in the state of a checkpoint. `None` if it is missing or of another form."""
    try:
        state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        of_trl: dict[str, Any] = {"attributes": {"weights": {}}}
        settings = {**state.stateful_callbacks.get(LossWeightsCallback.__name__, of_trl)["attributes"]["weights"]}
    except (KeyError, OSError, TypeError, ValueError):  # another program may have written it
        return None
    return settings if isinstance(state.global_step, int) and isinstance(state.log_history, list) else None


def _damaged_file(folder: Path) -> str | None:
    """Returns the name of a file of a checkpoint that is missing or cut off."""
    if _saved_settings(folder) is None:
        return TRAINER_STATE_NAME
    files = [*folder.rglob("*")]
    if not any("model" in file.name for file in files):  # whole, in parts, or of an adapter
        return "model"
    for file in files:
        try:
            if file.suffix == ".safetensors":
                safe_open(file, "pt")
            elif file.suffix in (".pt", ".pth") and not zipfile.is_zipfile(file):
                return file.name
        except (OSError, SafetensorError):
            return file.name
    return None
