"""
The preparation of a data set: from rows of any type to tokens, each with a region and a data weight.

1. The columns of the first row tell the type of the data set, and what of it would be ignored.
2. One map tokenizes the rows, weighs their tokens and truncates them. `datasets` caches it.
3. If a row is wrong, the error names its number.
"""

import functools
import hashlib
import importlib.metadata
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .._upstream import global_then_local_main_first
from ..config import WITSFTConfig
from ..weights import MASK_COLUMNS, NO_CONVERSATION_MESSAGE, NO_PROMPT_MESSAGE, check_weight
from .columns import warn_of_ignored_columns, warn_of_messages
from .prepared_rows import LENGTH_COLUMNS, SPANS_COLUMN, AnyDataset, Row, prepared_row, read_tokens
from .schemas import remedy_for
from .tokenization import RowTokenizer, row_tokenizer


logger = get_logger(__name__)

RowFunction = Callable[[list[Row]], list[Row]]

# Columns that belong to tokens, and mean nothing in a row that has none yet
_COLUMNS_OF_TOKENS = {*MASK_COLUMNS, *LENGTH_COLUMNS, SPANS_COLUMN, "attention_mask", "position_ids", "seq_lengths"}
_BATCH_SIZE = 100  # rows that are tokenized together
_PACKAGE = Path(__file__).parents[1]
# The code that decides about tokens, regions and data weights: these modules, and all in these folders
_SOURCES = ("_upstream.py", "conversation", "data", "weights.py")


@dataclass(frozen=True)
class DataPreparation:
    """
    Makes tokens with regions and data weights of the rows of one data set. Every error names the row. Nothing depends
    on λ, so the cache of a prepared data set serves all weights.
    """

    args: WITSFTConfig
    processing_class: PreTrainedTokenizerBase | ProcessorMixin
    dataset_name: str  # what messages call the data set
    packing: bool = False  # whether the rows are to be packed
    formatting_func: Callable[[Row], str] | None = None
    pair_template: str | None = None  # what TRL renders prompts and completions with, if it is not the own template
    assistant_only_loss: bool = False

    def first_row(self, dataset: AnyDataset) -> Row:
        """Returns the first row. Raises `ValueError` if there is none, or if rows are read through a transform."""
        if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
            raise ValueError(
                f"The {self.dataset_name} dataset has a transform (`with_transform`), through which it cannot be "
                "prepared. Apply it with `map`; or return tokenized rows from it and pass "
                "`dataset_kwargs={'skip_prepare_dataset': True}`."
            )
        example = next(iter(dataset.with_format(None)), None)
        if example is None:
            raise ValueError(f"The {self.dataset_name} dataset is empty. Check the file, the split and any filter.")
        return example

    def tokenize(self, dataset: AnyDataset, example: Row) -> AnyDataset:
        """Tokenizes rows as TRL does it and weighs their tokens, all in one pass. `example` is the first of them."""
        columns = set(example)
        if not {"image", "images"}.isdisjoint(columns):
            raise ValueError(
                f"The {self.dataset_name} dataset has images, which the train dataset has not, so they would be "
                "ignored. Remove the column, or evaluate with images apart."
            )
        tokenizer = row_tokenizer(
            example, self.processing_class, self.args, self.pair_template, self.assistant_only_loss
        )
        if tokenizer is None:
            raise ValueError(
                f"The {self.dataset_name} dataset has the columns {sorted(columns)}, but needs `prompt` and "
                f"`completion`, `messages`, `conversations`, `{self.args.dataset_text_field}` or `input_ids`. "
                f"{remedy_for(columns)} `wit_trl.to_trl_format` converts Alpaca, Dolly and WIT data, and "
                "`formatting_func` makes text of any columns."
            )
        conversations = tokenizer.columns if tokenizer.of_messages else ()
        self.check_structure_weights(bool(conversations), has_text=True)
        is_text_pair = not conversations and "prompt" in tokenizer.columns
        unread = {"system", "tools"} if is_text_pair else set()
        unread |= set() if conversations else {"completion_turns"}
        warn_of_ignored_columns(columns, unread, self.dataset_name)
        if conversations:
            roles = self.args.structure_weights.role_loss_weights
            warn_of_messages(dataset, example, conversations, roles, self.dataset_name)
        function = functools.partial(_tokenize_and_weigh, tokenizer=tokenizer, kept=self._kept())
        unused = {*_COLUMNS_OF_TOKENS, "weight", "conversations", "completion_turns"}
        return self.map_rows(dataset, function, "Tokenizing", unused)

    def format_rows(self, dataset: AnyDataset, formatting_func: Callable[[Row], str]) -> AnyDataset:
        """Returns rows with the text that a `formatting_func` makes of each. It may read any column."""
        logger.warning_once(NO_PROMPT_MESSAGE)
        # Not a closure, with which all arguments of the training would be part of the key of the cache
        function = functools.partial(_format, formatting_func=formatting_func, column=self.args.dataset_text_field)
        return self.map_rows(dataset, function, "Applying formatting function")

    def weigh_tokens(self, dataset: AnyDataset, example: Row) -> AnyDataset:
        """
        Gives each token of tokenized rows its region, `"completion_mask"`, and the data's own weight of it,
        `"token_weights"`, truncates all of it to `max_length` as TRL does, and notes the [`RowLengths`].
        """
        self.check_structure_weights(has_messages=False)
        warn_of_ignored_columns({*example}, {"completion_turns"}, self.dataset_name)
        if {*MASK_COLUMNS}.isdisjoint(example):
            logger.warning_once(
                "The tokenized data set has no `labels`, `completion_mask` or `assistant_masks` column: every token is "
                "completion and `prompt_loss_weight` has no effect."
            )
        unused = {*MASK_COLUMNS, SPANS_COLUMN, "attention_mask", "weight"}
        function = functools.partial(_weigh_tokens, kept=self._kept())
        return self.map_rows(dataset, function, "Finding completions", unused)

    def check_structure_weights(self, has_messages: bool, has_text: bool = False) -> None:
        """Refuses weights of roles, spans and templates without conversations, and of patterns without texts."""
        structure = self.args.structure_weights
        if structure.of_conversations and not has_messages:
            raise ValueError(f"The {self.dataset_name} dataset has no messages: {NO_CONVERSATION_MESSAGE}")
        if structure.regex_loss_weights and not has_text:
            raise ValueError(
                f"The {self.dataset_name} dataset is tokenized, so `regex_loss_weights` has no text to search. Leave "
                "it unset and give the rows `token_weights`, or pass texts or messages."
            )

    def _kept(self) -> slice:
        """The part of a row that is kept."""
        args = self.args
        if self.packing and args.max_length is None:
            raise ValueError("Packing needs a `max_length`, the length of a packed row.")
        if args.max_length is not None and args.max_length < 1:
            raise ValueError(f"`max_length` is {args.max_length}, but must be a number of tokens, or None for all.")
        windows = {"keep_start": slice(args.max_length), "keep_end": slice(-(args.max_length or 0), None)}
        if args.truncation_mode not in windows:
            raise ValueError(f"`truncation_mode` is {args.truncation_mode!r}, but must be one of {list(windows)}.")
        if args.max_length is None or (self.packing and args.packing_strategy != "bfd"):
            return slice(None)  # the other strategies split a row
        return windows["keep_start" if self.packing else args.truncation_mode]

    def map_kwargs(self, dataset: AnyDataset, desc: str) -> dict[str, Any]:
        """Returns how to map a data set: on several processes, with a progress bar of this name."""
        if isinstance(dataset, IterableDataset):  # takes neither
            return {}
        return {"num_proc": self.args.dataset_num_proc, "desc": f"{desc} of {self.dataset_name} dataset"}

    def map_rows(self, dataset: AnyDataset, function: RowFunction, desc: str, unused: Iterable[str] = ()) -> AnyDataset:
        """
        Maps rows to what the function makes of some of them, with the number of the row in its errors, and removes the
        unused columns. A second start reads it from the cache of the data set, also where it is a mere check.
        """
        is_stream = isinstance(dataset, IterableDataset)  # of which no row is read before it is needed
        # In a stream, the first row may lack columns of the others
        unused = {*unused} if is_stream else {*unused} & {*dataset.column_names}
        call = _map_row if is_stream else _map_batch
        fn_kwargs = {"function": function, "dataset_name": self.dataset_name, "made_by": _versions()}
        options = {"with_indices": True, "fn_kwargs": fn_kwargs, "remove_columns": sorted(unused)}
        if not is_stream:
            options |= {"batched": True, "batch_size": _BATCH_SIZE}
        with global_then_local_main_first():
            # Not in a format of torch or pandas, in which messages are something else
            return dataset.with_format(None).map(call, **options, **self.map_kwargs(dataset, desc))


@functools.cache
def _versions() -> str:
    """Returns what tells a cache of this code from one of another."""
    sources = hashlib.sha256()
    for source in (_PACKAGE / name for name in _SOURCES):
        for module in sorted(source.rglob("*.py")) if source.is_dir() else [source]:
            sources.update(module.read_bytes())
    others = [importlib.metadata.version(name) for name in ("trl", "transformers", "tokenizers", "jinja2")]
    return " ".join([sources.hexdigest(), *others])


def _map_batch(
    batch: Mapping[str, list], indices: list[int], function: RowFunction, dataset_name: str, made_by: str
) -> dict[str, list]:
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    made = _name_row(function, rows, indices, dataset_name)
    return {name: [row[name] for row in made] for name in made[0]}


def _map_row(row: Row, index: int, function: RowFunction, dataset_name: str, made_by: str) -> Row:
    (made,) = _name_row(function, [row], [index], dataset_name)
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in made.items()}


def _name_row(function: RowFunction, rows: list[Row], indices: list[int], dataset_name: str) -> list[Row]:
    """Returns what a function makes of rows. Of several, it looks for the one that is wrong only if one is."""
    try:
        return function(rows)
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # of a tokenizer or template, whatever it met
        if len(rows) == 1:
            reason = error if isinstance(error, ValueError) else repr(error)
            raise ValueError(f"Row {indices[0]} of the {dataset_name} dataset: {reason}") from error
        for row, index in zip(rows, indices, strict=True):
            _name_row(function, [row], [index], dataset_name)
        raise


def _format(rows: list[Row], formatting_func: Callable[[Row], str], column: str) -> list[Row]:
    texts = [formatting_func(row) for row in rows]
    for row, text in zip(rows, texts, strict=True):
        if not isinstance(text, str):
            raise ValueError(
                f"`formatting_func` must return a text, but returned {text!r} for the row {reprlib.repr(row)}."
            )
    return [{column: text} for text in texts]


def _tokenize_and_weigh(rows: list[Row], tokenizer: RowTokenizer, kept: slice) -> list[Row]:
    """Returns rows of any type, tokenized, as they are trained on."""
    for row in rows:
        if row.get("token_weights") is not None:
            raise ValueError(
                "it has `token_weights` but no `input_ids` that they could belong to. Tokenize the data set, or weigh "
                "rows or messages with `weight`."
            )
    made = []
    for row, (input_ids, weighed) in zip(rows, tokenizer(rows), strict=True):
        weights = weighed.weights * np.float32(check_weight(row.get("weight"), "`weight`"))
        made.append(prepared_row(input_ids, weighed.regions, weights, kept, weighed.spans, weighed.thinking_left_out))
    return made


def _weigh_tokens(rows: list[Row], kept: slice) -> list[Row]:
    """Returns tokenized rows as they are trained on."""
    return [prepared_row(*read_tokens(row), kept) for row in rows]
