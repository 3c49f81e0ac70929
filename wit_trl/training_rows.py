"""Which of the prepared rows are trained on, packed or not, and what is refused because nothing would be learned."""

import itertools
from typing import NamedTuple

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from trl import pack_dataset

from ._upstream import global_then_local_main_first
from .config import WITSFTConfig
from .data_preparation import DataPreparation
from .report import STREAMED_ROWS, RowLengths
from .vision_data_collator import DataCollatorForVisionLanguageWIT


logger = get_logger(__name__)

_TOKEN_COLUMNS = ["input_ids", "completion_mask", "token_weights"]


class TrainingRows(NamedTuple):
    """
    A prepared training set, and what its rows do not tell.

    Args:
        dataset (`Dataset` or `IterableDataset`): The rows that are trained on.
        lengths ([`RowLengths`], *optional*): What they and the dropped ones were before. `None` for a stream.
        dropped (`int`, *optional*): Number of rows that were dropped. `None` for a stream.
    """

    dataset: Dataset | IterableDataset
    lengths: RowLengths | None = None
    dropped: int | None = None


def pack(dataset: Dataset | IterableDataset, preparation: DataPreparation) -> Dataset | IterableDataset:
    """Packs rows as TRL does, with all that belongs to each token."""
    dataset = dataset.select_columns(_TOKEN_COLUMNS)
    with global_then_local_main_first():
        if preparation.args.shuffle_dataset:
            dataset = dataset.shuffle(seed=preparation.args.seed)
        map_kwargs = preparation.map_kwargs(dataset, "Packing")
        return pack_dataset(dataset, preparation.args.max_length, preparation.args.packing_strategy, map_kwargs)


def select_training_rows(whole: Dataset | IterableDataset, preparation: DataPreparation) -> TrainingRows:
    """
    Returns what of the rows of `weigh_tokens` is trained on. Drops the rows in which every token weighs 0, where
    TRL drops fully masked ones: after truncation, but not after packing.

    Raises:
        `ValueError`: no row has a target, or completions have a weight, but truncation left no row one.
    """
    args = preparation.args
    weights = (args.prompt_loss_weight, args.completion_loss_weight)
    if args.completion_loss_weight > 0 and _completions_are_lost(whole):
        raise ValueError(
            f"No row of the {preparation.dataset_name} dataset has a completion left to train on: "
            f"{_truncation(whole, args)}, so the model would learn its prompts alone. Raise `max_length`, or set "
            "`completion_loss_weight=0` if that is what you want."
        )

    def has_target(regions, token_weights):
        return any(
            weights[region] != 0 and weight != 0
            for region, weight in zip(regions[1:], token_weights[1:], strict=True)
            if region != -100
        )

    columns = ["completion_mask", "token_weights"]
    kept = pack(whole, preparation) if preparation.packing else whole
    if args.max_length is not None and not args.packing:
        desc = preparation.map_kwargs(whole, "Dropping rows without target")
        with global_then_local_main_first():
            kept = kept.filter(has_target, input_columns=columns, **desc)
    if not any(has_target(*(row[name] for name in columns)) for row in kept):
        raise ValueError(
            f"No row of the {preparation.dataset_name} dataset has a token left to train on. The weights of prompt and "
            f"completion are {weights}, and {_truncation(whole, args)}. Raise `max_length`, give the other region a "
            "weight, or look for weights of 0 in the data."
        )
    if not isinstance(whole, Dataset):
        return TrainingRows(kept)
    dropped = 0 if preparation.packing else len(whole) - len(kept)
    if dropped:
        logger.warning(
            f"Dropped {dropped} of {len(whole)} rows of the {preparation.dataset_name} dataset: they have no token of "
            f"non-zero weight, or none within `max_length={args.max_length}`."
        )
    return TrainingRows(kept, RowLengths.read(whole), dropped)


def _first_rows(rows: Dataset | IterableDataset, columns: list[str]) -> list[dict]:
    """Returns these columns of all rows, or of the first ones of a stream, which may have no end."""
    rows = rows.select_columns(columns)
    return list(itertools.islice(rows, STREAMED_ROWS + 1)) if isinstance(rows, IterableDataset) else list(rows)


def _completions_are_lost(rows: Dataset | IterableDataset) -> bool:
    """Whether there are completions, but truncation left no row one. Of a long stream nobody can tell."""
    lost = False
    for number, row in enumerate(rows.select_columns(["completion_length", "completion_lost"])):
        is_long_stream = isinstance(rows, IterableDataset) and number == STREAMED_ROWS
        if is_long_stream or (row["completion_length"] and not row["completion_lost"]):
            return False
        lost = lost or row["completion_lost"]
    return lost


def _truncation(rows: Dataset | IterableDataset, args: WITSFTConfig) -> str:
    """What an error says of it."""
    column, verb = ("completion_lost", "lost") if args.completion_loss_weight else ("truncated", "cut")
    found = [bool(row[column]) for row in _first_rows(rows, [column])]
    return f"{sum(found)} of {len(found)} rows were {verb} to `max_length={args.max_length}`"


def check_image_rows(
    dataset: Dataset | IterableDataset, collator: DataCollatorForVisionLanguageWIT, args: WITSFTConfig
) -> None:
    """
    Raises `ValueError` if a row is wrong but for its images, which are not read, or if no row has a target, in its
    completion if that has a weight: it stops at the first that has one.
    """
    in_completion = args.completion_loss_weight > 0

    def has_target(row):
        batch = collator([row])
        return (batch["labels"] != -100).any() and (not in_completion or (batch["completion_mask"] == 1).any())

    if isinstance(dataset, Dataset) and dataset.format["type"] != "custom":
        texts = dataset.remove_columns([name for name in ("image", "images") if name in dataset.column_names])
        DataPreparation(args, False, "train").map_rows(texts, collator.check_row, "Checking rows")
    if not any(map(has_target, dataset)):
        raise ValueError(
            f"No example of the train dataset has a token left to train on{' in its completion' * in_completion}. The "
            "weights of prompt and completion are "
            f"{(args.prompt_loss_weight, args.completion_loss_weight)}, and `max_length` is {args.max_length}. Raise "
            "`max_length`, give the other region a weight, or check the data."
        )
