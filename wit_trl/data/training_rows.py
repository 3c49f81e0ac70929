"""Which of the prepared rows are trained on, packed or not, and what is refused because nothing would be learned."""

import functools
import itertools
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from trl import pack_dataset

from .._upstream import global_then_local_main_first
from ..config import WITSFTConfig
from .columns import warn_of_ignored_columns, warn_of_messages
from .preparation import DataPreparation
from .prepared_rows import SPANS_COLUMN, STREAMED_ROWS, TARGET_COLUMNS, TOKEN_COLUMNS, AnyDataset, RowLengths
from .vision_collator import DataCollatorForVisionLanguageWIT, check_rows, columns_of


logger = get_logger(__name__)

_FIRST_ROWS = 1000  # in which spans and patterns are looked for
_ROWS_WITHOUT_TARGET = 10_000  # of a stream, which may have no end, before it is refused


class TrainingRows(NamedTuple):
    """A prepared training set, and what its rows do not tell. Of a stream nothing more is known."""

    dataset: AnyDataset
    lengths: RowLengths | None = None  # of all rows before any was dropped
    dropped: int | None = None  # number of rows


def prepare_rows(dataset: AnyDataset, preparation: DataPreparation, is_train: bool) -> TrainingRows:
    """
    Returns rows of any type as they are trained on or evaluated: tokenized, weighed, truncated, packed and shuffled.

    One map does what TRL does in several, each of which reads and writes all rows. Where TRL's rows have labels, these
    have the region and the data weight of each token.
    """
    args = preparation.args
    example = preparation.first_row(dataset)
    if {"seq_lengths", "completion_mask"} <= example.keys():  # packed already
        preparation.check_structure_weights(has_messages=False)
        return TrainingRows(dataset)
    if "input_ids" in example:
        dataset = preparation.weigh_tokens(dataset, example)
    else:
        if preparation.formatting_func is not None:
            dataset = preparation.format_rows(dataset, preparation.formatting_func)
            example = {args.dataset_text_field: None}
        dataset = preparation.tokenize(dataset, example)
    warn_of_unmatched(dataset, preparation)
    # Evaluation sets keep all their rows, since both regions are measured
    rows = select_training_rows(dataset, preparation) if is_train else TrainingRows(dataset)
    dataset = _pack(rows.dataset, preparation) if preparation.packing else rows.dataset
    return rows._replace(dataset=dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset)


def warn_of_unmatched(dataset: AnyDataset, preparation: DataPreparation) -> None:
    """Tells which spans and patterns that have a weight are in none of the first rows. Streams are not read for it."""
    structure = preparation.args.structure_weights
    if not structure.has_spans or isinstance(dataset, IterableDataset):
        return
    spans = dataset.select_columns([SPANS_COLUMN]).take(min(_FIRST_ROWS, len(dataset))).with_format("arrow")[:]
    codes = np.unique(pc.list_flatten(spans[SPANS_COLUMN]).to_numpy())
    found = structure.tokens_of_spans(codes)
    if unused := [name for name, weight, tokens in found if weight is not None and not tokens.any()]:
        logger.warning(
            f"Nothing in the first {_FIRST_ROWS:,} rows of the {preparation.dataset_name} dataset is one of {unused}, "
            "which `span_loss_weights` or `regex_loss_weights` names."
        )


def _pack(dataset: AnyDataset, preparation: DataPreparation) -> AnyDataset:
    """Packs rows as TRL does, with all that belongs to each token."""
    spans = [SPANS_COLUMN] if preparation.args.structure_weights.has_spans else []
    dataset = dataset.select_columns([*TOKEN_COLUMNS, *spans])
    with global_then_local_main_first():
        if preparation.args.shuffle_dataset:
            dataset = dataset.shuffle(seed=preparation.args.seed)
        map_kwargs = preparation.map_kwargs(dataset, "Packing")
        return pack_dataset(dataset, preparation.args.max_length, preparation.args.packing_strategy, map_kwargs)


def select_training_rows(whole: AnyDataset, preparation: DataPreparation) -> TrainingRows:
    """
    Returns what of prepared rows is trained on. Drops the rows in which every token weighs 0, where TRL drops fully
    masked ones: after truncation, but not after packing.

    Raises:
        `ValueError`: no row has a target, or completions have a weight, but truncation left no row one.
    """
    args = preparation.args
    weights = (args.prompt_loss_weight, args.completion_loss_weight)
    regions = [column for column, weight in zip(TARGET_COLUMNS, weights, strict=True) if weight]
    drops = args.max_length is not None and not args.packing

    _check_targets(whole, regions, preparation)
    if isinstance(whole, IterableDataset):
        return TrainingRows(whole.filter(lambda row: any(row[region] for region in regions)) if drops else whole)
    kept = whole
    if drops:
        columns = whole.select_columns(regions).with_format("arrow")[:]
        with_target = np.flatnonzero(sum(columns[region].to_numpy() for region in regions))
        kept = whole.select(with_target) if len(with_target) < len(whole) else whole
    if dropped := len(whole) - len(kept):
        logger.warning(
            f"Dropped {dropped} of {len(whole)} rows of the {preparation.dataset_name} dataset: they have no token of "
            f"non-zero weight, or none within `max_length={args.max_length}`."
        )
    return TrainingRows(kept, RowLengths.read(whole), dropped)


def _check_targets(rows: AnyDataset, regions: list[str], preparation: DataPreparation) -> None:
    """
    Raises `ValueError` if no row has a target, or if truncation takes every completion.

    It reads rows until one has a target and one keeps its completion. A stream may have no end, so both are looked for
    in its first rows only: a completion in fewer of them.
    """
    args, is_stream = preparation.args, isinstance(rows, IterableDataset)
    column, verb = ("completion_lost", "lost") if args.completion_loss_weight else ("truncated", "cut")
    has_target, keeps_completion = False, args.completion_loss_weight == 0
    number = cut = 0
    read = rows.select_columns([*regions, "completion_length", "completion_lost", "truncated"])
    for number, row in enumerate(itertools.islice(read, _ROWS_WITHOUT_TARGET if is_stream else None), start=1):
        cut += row[column]
        if (row["completion_length"] and not row["completion_lost"]) or (is_stream and number > STREAMED_ROWS):
            keeps_completion = True
        has_target = has_target or any(row[region] for region in regions)
        if has_target and keeps_completion:
            return
    of_dataset = f"of the {preparation.dataset_name} dataset"
    truncation = f"{cut} of {number} rows were {verb} to `max_length={args.max_length}`"
    if cut and not keeps_completion:
        raise ValueError(
            f"No row {of_dataset} has a completion left to train on: {truncation}, so the model would learn its "
            "prompts alone. Raise `max_length`, or set `completion_loss_weight=0` if that is what you want."
        )
    if not has_target:
        subject, remedy = "No row", ""
        if is_stream and number == _ROWS_WITHOUT_TARGET:
            subject, remedy = f"None of the first {number:,} rows", " Or shuffle the stream, if later rows have some."
        raise ValueError(
            f"{subject} {of_dataset} has a token left to train on. The weights of prompt and completion are "
            f"{(args.prompt_loss_weight, args.completion_loss_weight)}, and {truncation}. Raise `max_length`, give the "
            f"other region a weight, or look for weights of 0 in the data.{remedy}"
        )


def check_image_rows(dataset: AnyDataset, collator: DataCollatorForVisionLanguageWIT, args: WITSFTConfig) -> None:
    """
    Raises `ValueError` if a row is wrong but for its images, which are not read, or if no row has a target, in its
    completion if that has a weight: it stops at the first that has one. Tells the rest as for rows of text.
    """
    in_completion = args.completion_loss_weight > 0

    def has_target(row):
        batch = collator([row])
        return (batch["labels"] != -100).any() and (not in_completion or (batch["completion_mask"] == 1).any())

    is_stored = isinstance(dataset, Dataset)
    has_transform = is_stored and dataset.format["type"] == "custom"  # which may make other rows of them
    if is_stored and not has_transform:
        warn_of_ignored_columns({*dataset.column_names}, {"tools"}, "train")  # which TRL's collator does not render
        texts = dataset.remove_columns([name for name in ("image", "images") if name in dataset.column_names])
        function = functools.partial(check_rows, text_field=collator.dataset_text_field)
        DataPreparation(args, collator.processor, "train").map_rows(
            texts, function, "Checking rows", texts.column_names
        )
    rows = itertools.islice(dataset, None if is_stored else STREAMED_ROWS)  # a stream may have no end
    example = next(rows)
    if not any(map(has_target, itertools.chain([example], rows))):
        raise ValueError(
            f"No example of the train dataset has a token left to train on{' in its completion' * in_completion}. The "
            "weights of prompt and completion are "
            f"{(args.prompt_loss_weight, args.completion_loss_weight)}, and `max_length` is {args.max_length}. Raise "
            "`max_length`, give the other region a weight, or check the data."
        )
    if not has_transform:
        columns, roles = columns_of(example, collator.dataset_text_field), args.structure_weights.role_loss_weights
        warn_of_messages(dataset.with_format(None), example, (*columns,), roles, "train")
