"""
What a token weighs. It follows from its region (prompt or completion), the weight that the data gives it, and λ. Out of
them come `token_weights`, which scale the numerator of the loss, and `labels`, which count its divisor.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


NO_PROMPT_MESSAGE = (
    "The data set has no prompt to weight: every token is completion and `prompt_loss_weight` has no effect. Pass "
    "prompt/completion or `messages` columns to use both weights."
)
NO_CONVERSATION_MESSAGE = (
    "`role_loss_weights`, `chat_template_loss_weight` and `completion_turns` mean nothing in data that holds no "
    "conversations. Leave them unset, or pass messages."
)
# The columns of tokenized data that tell prompt and completion apart
MASK_COLUMNS = ("labels", "completion_mask", "assistant_masks")
# Below the first a product of three is 0 in float32, above the second there is none
_SMALLEST, _LARGEST = 1e-12, 1e38
WEIGHT_RANGE = f"a weight must be a finite number (no text) that is not negative: 0, or {_SMALLEST} to {_LARGEST}."
REGIONS = {0: "prompt", 1: "completion", -100: "never a target"}


@dataclass(frozen=True)
class StructureWeights:
    """What the structure of a conversation says of the weights of its tokens."""

    role_loss_weights: dict[str, float] = field(default_factory=dict)  # of the tokens of a role, 1 for other roles
    chat_template_loss_weight: float = 1.0  # of the prompt tokens that the chat template writes itself
    completion_turns: str = "all"  # which of the assistant's turns are completion: "all" or "last"


def token_regions(example: dict[str, Any]) -> np.ndarray:
    """
    Returns the region of each token of a tokenized example: 1 completion, 0 prompt, -100 never a target.

    The regions come from `"labels"` (-100 marks the prompt). Without these, the completion is what `"completion_mask"`
    and `"assistant_masks"` both mark, or every token. A token with `"attention_mask"` 0 is padding. Raises `ValueError`
    if a column does not have one entry for each token, or holds other values.
    """
    input_ids = _token_values(example, "input_ids")
    if len(input_ids) == 0 or input_ids.dtype.kind == "f" or (input_ids < 0).any():
        raise ValueError(f"`input_ids` must be the numbers of one token or more, but is {example['input_ids']!r}.")
    columns = {name: _token_values(example, name) for name in (*MASK_COLUMNS, "attention_mask") if name in example}
    for name, column in columns.items():
        if len(column) != len(input_ids):
            raise ValueError(
                f"`{name}` has {len(column)} entries, but `input_ids` has {len(input_ids)}. Give each token one."
            )
    attention_mask = columns.pop("attention_mask", None)
    if "labels" in columns:
        labels = columns["labels"]
        wrong = (labels != input_ids) & (labels != -100)
        if wrong.any():
            position = int(wrong.argmax())
            raise ValueError(
                f"The label at position {position} is {labels[position]}, but it must be the token itself, "
                f"{input_ids[position]} (completion), or -100 (prompt)."
            )
        columns = {"labels": labels != -100}
    regions = np.ones(len(input_ids), np.int64)
    for name, mask in columns.items():
        if not ((mask == 0) | (mask == 1) | (mask == -100)).all():
            raise ValueError(
                f"`{name}` holds {sorted({*mask.tolist()} - {0, 1, -100})}, but it must hold 1 for a completion "
                "token and 0 for a prompt token. Weights are set by `prompt_loss_weight` and `completion_loss_weight`."
            )
        regions = np.minimum(regions, mask.astype(np.int64))
    if attention_mask is not None:
        regions[attention_mask == 0] = -100
    return regions


def _token_values(example: dict[str, Any], name: str) -> np.ndarray:
    try:
        values = np.asarray(example.get(name))
    except (TypeError, ValueError):  # lists of different lengths
        values = np.empty(())
    if values.ndim != 1 or values.dtype.kind not in "biuf":
        raise ValueError(f"`{name}` must be a list with a number for each token, but is {example.get(name)!r}.")
    return values


def token_weights(example: dict[str, Any]) -> torch.Tensor:
    """
    Returns the weight that the data gives each token of a tokenized example, in float32: its `"token_weights"` times
    the `"weight"` of the row. What is missing or `None` is 1. Raises `ValueError` if one is wrong, or not every token
    has one.
    """
    length = len(example["input_ids"])
    weights = torch.ones(length)
    if example.get("token_weights") is not None:
        weights = check_weights(example["token_weights"], "`token_weights`")
        if weights.shape != (length,):
            entries = " x ".join(map(str, weights.shape))
            raise ValueError(
                f"`token_weights` has {entries} entries, but `input_ids` has {length}. Give each token one number."
            )
    return weights * check_weight(example.get("weight"), "`weight`")


def is_weight(value: Any) -> bool:
    return value == 0 or _SMALLEST <= value <= _LARGEST


def check_weights(values: Any, name: str) -> torch.Tensor:
    """Returns weights as a tensor in float32. Raises `ValueError` unless each is 0 or in the range of weights."""
    try:
        weights = torch.as_tensor(values, dtype=torch.float64)
    except (OverflowError, TypeError, ValueError, RuntimeError):  # torch raises them all for what is not a number
        weights = torch.tensor(torch.nan)
    if not ((weights == 0) | (weights >= _SMALLEST) & (weights <= _LARGEST)).all():
        raise ValueError(f"{name} is {values!r}, but {WEIGHT_RANGE}")
    return weights.float()


def check_weight(value: Any, name: str) -> float:
    """Returns one weight, 1 for `None`. Raises `ValueError` unless it is 0 or in the range of weights."""
    if value is None:
        return 1.0
    if type(value) in (int, float) and is_weight(value):  # most weights, so without a tensor
        return float(value)
    weight = check_weights(value, name)
    if weight.ndim > 0:
        raise ValueError(f"{name} is {value!r}, but must be one number.")
    return weight.item()


def set_targets(
    batch: dict[str, Any], region: torch.Tensor, data_weights: torch.Tensor, loss_weights: tuple[float, float]
) -> None:
    """Sets `"completion_mask"`, `"token_weights"` and `"labels"`, from what is known of each of the `"input_ids"`."""
    weights = data_weights * (region == 0) * loss_weights[0]
    weights += data_weights * (region == 1) * loss_weights[1]
    batch["completion_mask"] = region
    batch["token_weights"] = weights
    batch["labels"] = batch["input_ids"].masked_fill(weights == 0, -100)


def pop_weights(batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Takes `"token_weights"` and `"completion_mask"` out of a batch and returns them. Raises `ValueError` if one of them
    is missing, or the labels are.
    """
    needed = {"token_weights", "completion_mask", "shift_labels" if "shift_labels" in batch else "labels"}
    if missing := needed - {name for name, value in batch.items() if value is not None}:
        raise ValueError(
            f"The data collator returned no {sorted(missing)}. Use `wit_trl.DataCollatorForWIT` (the default), or "
            "return all that it does."
        )
    return batch.pop("token_weights"), batch.pop("completion_mask")
