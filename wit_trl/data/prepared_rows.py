"""What a prepared row holds: its tokens with regions and data weights, and what the row was before it was cut."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset


STREAMED_ROWS = 1000  # at most this number of rows of a stream is read ahead
# Columns with the number of targets of each region. A target is a token whose data weight is not 0, but not the first
# of the row
TARGET_COLUMNS = ("prompt_targets", "completion_targets")


@dataclass(frozen=True)
class RowLengths:
    """What rows were before truncation, packing and dropping. The preparation notes it in columns of these names."""

    prompt_length: np.ndarray  # number of prompt tokens of each row, its first token included
    completion_length: np.ndarray  # number of completion tokens of each row
    truncated: np.ndarray  # whether the row is cut to `max_length`
    completion_lost: np.ndarray  # whether this cuts off all its completion tokens
    completion_cut: np.ndarray  # number of its completion tokens that are cut off
    answer_cut: np.ndarray  # whether the end of its last answer, which is its last completion, is cut off
    answer_lost: np.ndarray  # whether all of that is

    @classmethod
    def read(cls, dataset: Dataset) -> "RowLengths":
        """Returns the lengths of all rows of a prepared data set."""
        columns = dataset.select_columns(list(LENGTH_COLUMNS)).with_format("arrow")[:]
        return cls(*(columns[name].to_numpy() for name in LENGTH_COLUMNS))


LENGTH_COLUMNS = tuple(RowLengths.__dataclass_fields__)


def text_of(example: dict[str, Any]) -> slice:
    """
    Returns what of a tokenized example its `"attention_mask"` keeps: all but the padding before and after the text.
    Padding on the left would be attended, and its last token would predict the first of the text.

    Raises:
        `ValueError`: the mask keeps no token, or leaves one out between others.
    """
    if "attention_mask" not in example:
        return slice(None)
    mask = np.asarray(example["attention_mask"])
    if mask.all():
        return slice(None)
    positions = np.flatnonzero(mask)
    if len(positions) == 0 or len(positions) != positions[-1] + 1 - positions[0]:
        raise ValueError(
            "`attention_mask` must be 1 for the tokens of the text, which follow each other, and 0 for padding before "
            f"and after them, but is {mask.tolist()}. Remove the row, or the tokens that it leaves out."
        )
    return slice(positions[0], positions[-1] + 1)


def prepared_row(input_ids: list[int], regions: list[int], weights: np.ndarray, kept: slice) -> dict[str, Any]:
    """
    Returns a row as it is trained on: the kept part of its tokens, of their regions and of their data weights; its
    [`RowLengths`]; and how many targets each region has.
    """
    left, left_weights = regions[kept], weights[kept]
    targets = np.where(left_weights[1:] != 0, left[1:], -100)  # nothing predicts the first token
    completion_cut, end_cut, start_cut = 0, False, False
    if len(left) < len(regions):
        completion_cut = regions.count(1) - left.count(1)
        end_cut, start_cut = _cuts_of_last_answer(regions, kept)
    return {
        "input_ids": input_ids[kept],
        "completion_mask": left,
        "token_weights": left_weights,
        "prompt_length": regions.count(0),
        "completion_length": regions.count(1),
        "truncated": len(left) < len(regions),
        "completion_lost": 1 in regions[1:] and 1 not in left[1:],
        "completion_cut": completion_cut,
        "answer_cut": end_cut,
        "answer_lost": end_cut and start_cut,
        **{name: np.count_nonzero(targets == region) for region, name in enumerate(TARGET_COLUMNS)},
    }


def _cuts_of_last_answer(regions: list[int], kept: slice) -> tuple[bool, bool]:
    """Returns whether the last and the first token of the last answer are cut off."""
    if 1 not in regions:
        return False, False
    last = first = len(regions) - 1 - regions[::-1].index(1)
    while first > 0 and regions[first - 1] == 1:
        first -= 1
    left = range(len(regions))[kept]
    return last not in left, first not in left
