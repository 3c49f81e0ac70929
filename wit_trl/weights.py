"""
What a token weighs. It follows from its region (prompt or completion), the weight that the data gives it, and λ. Out of
them come `token_weights`, which scale the numerator of the loss, and `labels`, which count its divisor.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import regex
import torch


NO_PROMPT_MESSAGE = (
    "The data set has no prompt to weight: every token is completion and `prompt_loss_weight` has no effect. Pass "
    "prompt/completion or `messages` columns to use both weights."
)
NO_CONVERSATION_MESSAGE = (
    "`role_loss_weights`, `span_loss_weights`, `chat_template_loss_weight` and `completion_turns` mean nothing in data "
    "that holds no conversations. Leave them unset, or pass messages."
)
# The columns of tokenized data that tell prompt and completion apart
MASK_COLUMNS = ("labels", "completion_mask", "assistant_masks")
# Below the first a product of three is 0 in float32, above the second there is none
_SMALLEST, _LARGEST = 1e-12, 1e38
WEIGHT_RANGE = f"a weight must be a finite number (no text) that is not negative: 0, or {_SMALLEST} to {_LARGEST}."
REGIONS = {0: "prompt", 1: "completion", -100: "never a target"}
# What lies inside the assistant's turns. The code of a token (`"token_spans"`) is the number of its span here, 0 for a
# token in none, such as that of a header; and from the bit `PATTERN_BIT` on, a bit for each pattern that it matches
SPANS = ("", "thinking", "tool_calls", "answer", "end_of_turn")
PATTERN_BIT = 3
MOST_PATTERNS = 28  # for which a code has bits
compile_pattern = functools.cache(regex.compile)
COMPLETION_TURNS = ("all", "last", "last_round")


@dataclass(frozen=True)
class StructureWeights:
    """What the structure of a conversation says of the weights of its tokens."""

    role_loss_weights: dict[str, float] = field(default_factory=dict)  # of the tokens of a role, 1 for other roles
    chat_template_loss_weight: float = 1.0  # of the prompt tokens that the chat template writes itself
    completion_turns: str = "all"  # which of the assistant's turns are completion: one of `COMPLETION_TURNS`
    span_loss_weights: dict[str, float] = field(default_factory=dict)  # of `SPANS`, 1 for others
    regex_loss_weights: dict[str, float] = field(default_factory=dict)  # of what a pattern matches in the completion

    @classmethod
    def of(cls, settings: Any) -> "StructureWeights":
        """Returns those of what has them as attributes, of which a dict may be `None`."""
        given = {each.name: getattr(settings, each.name) for each in fields(cls)}
        return cls(**{name: value for name, value in given.items() if value is not None})

    @property
    def has_spans(self) -> bool:
        """Whether the span of each token is noted."""
        return bool(self.span_loss_weights or self.regex_loss_weights)

    @property
    def spans(self) -> tuple[str, ...]:
        """The names of the spans that are noted."""
        return SPANS[1:] if self.span_loss_weights else ()

    def tokens_of_spans(self, codes: np.ndarray) -> Iterator[tuple[str, float | None, np.ndarray]]:
        """
        Yields each span and pattern that is noted, its weight (`None` for one that is not named), and which of the
        tokens with these codes are part of it.
        """
        for name in self.spans:
            yield name, self.span_loss_weights.get(name), codes % 2**PATTERN_BIT == SPANS.index(name)
        for bit, (pattern, weight) in enumerate(self.regex_loss_weights.items(), start=PATTERN_BIT):
            yield f"/{pattern}/", weight, codes >> bit & 1 == 1

    @property
    def of_conversations(self) -> bool:
        """Whether it says something that only a conversation has."""
        return self != StructureWeights(regex_loss_weights=self.regex_loss_weights)


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


def check_pattern(pattern: str) -> None:
    """Raises `ValueError` for what is no pattern."""
    try:
        compile_pattern(pattern)
    except (regex.error, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"`regex_loss_weights` has {pattern!r}, which is no pattern: {error}.") from error


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


def pop_weights(batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Takes `"token_weights"`, `"completion_mask"` and `"token_spans"` out of a batch and returns them. Raises
    `ValueError` if one of the first two is missing, or the labels are. Without spans, no token is in one.
    """
    needed = {"token_weights", "completion_mask", "shift_labels" if "shift_labels" in batch else "labels"}
    if missing := needed - {name for name, value in batch.items() if value is not None}:
        raise ValueError(
            f"The data collator returned no {sorted(missing)}. Use `wit_trl.DataCollatorForWIT` (the default), or "
            "return all that it does."
        )
    completion_mask = batch.pop("completion_mask")
    return batch.pop("token_weights"), completion_mask, batch.pop("token_spans", torch.zeros_like(completion_mask))
