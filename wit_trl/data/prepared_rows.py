"""What a prepared row holds: its tokens with regions and data weights, and what the row was before it was cut."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from ..weights import token_regions, token_weights


AnyDataset = Dataset | IterableDataset
Row = dict[str, Any]

STREAMED_ROWS = 1000  # at most this number of rows of a stream is read ahead
TOKEN_COLUMNS = ("input_ids", "completion_mask", "token_weights")  # with an entry for each token
SPANS_COLUMN = "token_spans"  # likewise, where spans or patterns have weights
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
    thinking_left_out: np.ndarray  # number of its turns whose thinking the chat template does not write

    @classmethod
    def read(cls, dataset: Dataset) -> "RowLengths":
        """Returns the lengths of all rows of a prepared data set."""
        columns = dataset.select_columns(list(LENGTH_COLUMNS)).with_format("arrow")[:]
        return cls(*(columns[name].to_numpy() for name in LENGTH_COLUMNS))


LENGTH_COLUMNS = tuple(RowLengths.__dataclass_fields__)


def read_tokens(example: Row) -> tuple[Any, np.ndarray, np.ndarray]:
    """
    Returns the tokens of a tokenized example, their regions and their data weights, without padding. Raises
    `ValueError` as `token_regions` and `token_weights` do, or if the `"attention_mask"` leaves out a token between
    others.
    """
    regions, weights, text = token_regions(example), token_weights(example), _text_of(example)
    return example["input_ids"][text], regions[text], weights[text].numpy()


def _text_of(example: Row) -> slice:
    """Padding on the left would be attended, and its last token would predict the first of the text."""
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


def prepared_row(
    input_ids: Any, regions: Any, weights: Any, kept: slice, spans: np.ndarray | None = None, thinking_left_out: int = 0
) -> Row:
    """
    Returns a row as it is trained on: the kept part of its tokens, of their regions and of their data weights, and of
    their spans if they are noted; its [`RowLengths`]; and how many targets each region has. Those of the tokens are
    arrays, which `datasets` writes faster than lists.
    """
    input_ids, regions, weights = map(np.asarray, (input_ids, regions, weights))
    left, left_weights = regions[kept], weights[kept]
    targets = left[1:][left_weights[1:] != 0]  # nothing predicts the first token
    is_cut = len(left) < len(regions)
    lengths = {
        "prompt_length": np.count_nonzero(regions == 0),
        "completion_length": np.count_nonzero(regions == 1),
        "truncated": is_cut,
        **(_losses(regions, kept) if is_cut else _NO_LOSSES),
        "thinking_left_out": thinking_left_out,
    }
    of_tokens = dict(zip(TOKEN_COLUMNS, (input_ids[kept], left, left_weights), strict=True))
    if spans is not None:
        of_tokens[SPANS_COLUMN] = spans[kept]
    counts = {name: np.count_nonzero(targets == region) for region, name in enumerate(TARGET_COLUMNS)}
    return of_tokens | lengths | counts


_NO_LOSSES = {"completion_lost": False, "completion_cut": 0, "answer_cut": False, "answer_lost": False}


def _losses(regions: np.ndarray, kept: slice) -> Row:
    """Returns what truncation takes of completion and last answer."""
    left, completion = regions[kept], np.flatnonzero(regions == 1)
    *_, last_answer = np.split(completion, np.flatnonzero(np.diff(completion) > 1) + 1)
    is_left = np.isin(last_answer, np.arange(len(regions))[kept])
    return {
        "completion_lost": 1 in regions[1:] and 1 not in left[1:],
        "completion_cut": len(completion) - np.count_nonzero(left == 1),
        "answer_cut": not is_left[-1:].all(),
        "answer_lost": len(completion) > 0 and not is_left.any(),
    }
