"""From rows of any type that TRL knows to tokens, each with a region and a weight."""

import copy
import functools
import importlib.metadata
import reprlib
from collections.abc import Callable
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl.chat_template_utils import has_generation_markers
from trl.data_utils import maybe_convert_to_chatml

from ._upstream import get_dataset_column_names, global_then_local_main_first
from .config import WITSFTConfig
from .conversation import Conversation, chosen_chat_template, training_chat_template
from .messages import check_answer, check_messages, check_unicode
from .report import LENGTH_COLUMNS
from .schemas import remedy_for
from .weights import MASK_COLUMNS, NO_PROMPT_MESSAGE, token_regions, token_weights


logger = get_logger(__name__)

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_TRL_COLUMNS = {"prompt", "completion", "messages", "conversations"}
# Columns that belong to tokens, and mean nothing in a row that has none yet
_COLUMNS_OF_TOKENS = {*MASK_COLUMNS, *LENGTH_COLUMNS, "attention_mask", "position_ids", "seq_lengths", "turn_weights"}


def check_train_dataset(dataset: Any, formatting_func: Callable | None) -> set[str]:
    """
    Returns the columns of a training set.

    Raises:
        `ValueError`: it is empty, or TRL would ignore the `formatting_func`.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        return set()  # TRL refuses it
    columns = set(dataset.column_names) if isinstance(dataset, Dataset) else set(next(iter(dataset), ()))
    if not columns or (isinstance(dataset, Dataset) and len(dataset) == 0):
        raise ValueError("`train_dataset` is empty. Check the file, the split and any filter it comes from.")
    if formatting_func and not _TRL_COLUMNS.isdisjoint(columns):
        raise ValueError(
            f"`formatting_func` makes plain text, but TRL reads the columns {sorted(_TRL_COLUMNS & columns)} instead "
            "of it. Drop `formatting_func` (the chat template does its work), or rename these columns to train on the "
            "text, in which every token is completion."
        )
    return columns


class DataPreparation:
    """
    The steps that TRL's preparation of a data set lacks: what the trainer does before TRL tokenizes, and after.

    Every error names the row. None of the steps depends on the weights of the regions but the last, so that the cache
    of a prepared data set serves all of them.

    Args:
        args ([`WITSFTConfig`]):
            Arguments of the training.
        packing (`bool`):
            Whether the rows are to be packed.
        dataset_name (`str`):
            What messages call the data set.
    """

    def __init__(self, args: WITSFTConfig, packing: bool, dataset_name: str):
        self.args, self.packing, self.dataset_name = args, packing, dataset_name

    def first_row(self, dataset: Dataset | IterableDataset) -> dict[str, Any]:
        """Returns the first row. Raises `ValueError` if there is none, or if rows are read through a transform."""
        if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
            raise ValueError(
                f"The {self.dataset_name} dataset has a transform (`with_transform`), through which it cannot be "
                "prepared. Apply it with `map`; or return tokenized rows from it and pass "
                "`dataset_kwargs={'skip_prepare_dataset': True}`."
            )
        example = next(iter(dataset), None)
        if example is None:
            raise ValueError(f"The {self.dataset_name} dataset is empty. Check the file, the split and any filter.")
        return example

    def check_rows(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        prompt_template: str | None,
    ) -> Dataset | IterableDataset:
        """
        Checks every row of a data set that is not tokenized. Conversations get `"turn_weights"`, the weight of each
        token's message, if messages have one, and `messages` are tokenized here: TRL cannot find the assistant's turns
        on a template that neither marks them nor is one of those it knows. `prompt_template` is what TRL renders
        prompts and completions with, if it is not the own template.
        """
        dataset = self.drop_columns_of_tokens(dataset)
        if "conversations" in get_dataset_column_names(dataset):
            dataset = self.map_rows(dataset, _to_chatml, "Converting to ChatML", remove_columns="conversations")
        example = self.first_row(dataset)
        columns = set(example)
        if not {"image", "images"}.isdisjoint(columns):
            raise ValueError(
                f"The {self.dataset_name} dataset has images, which the train dataset has not, so they would be "
                "ignored. Remove the column, or evaluate with images apart."
            )
        if "token_weights" in columns:
            raise ValueError(
                f"The {self.dataset_name} dataset has `token_weights` but no `input_ids` that they could belong to. "
                "Tokenize it, or weigh rows or messages with `weight`."
            )
        function: Callable[..., dict[str, Any]]
        if {"prompt", "completion"} <= columns:
            if self.args.dataset_text_field in columns:  # TRL would give it the EOS token instead of the completion
                dataset = dataset.remove_columns(self.args.dataset_text_field)
            if isinstance(example["prompt"], list):
                function = functools.partial(
                    _check_prompt_completion, processing_class=processing_class, chat_template=prompt_template
                )
            else:
                function = functools.partial(_check_texts, columns=["prompt", "completion"])
        elif "messages" in columns:
            function = functools.partial(
                _tokenize_messages,
                processing_class=processing_class,
                chat_template=chosen_chat_template(processing_class),
                tool_template=training_chat_template(processing_class, tools=True),
            )
        elif self.args.dataset_text_field in columns:
            logger.warning_once(NO_PROMPT_MESSAGE)
            if "prompt" in columns:  # in which TRL would look for a completion
                dataset = dataset.remove_columns("prompt")
            function = functools.partial(_check_texts, columns=[self.args.dataset_text_field])
        else:
            raise ValueError(
                f"The {self.dataset_name} dataset has the columns {sorted(columns)}, but needs `prompt` and "
                f"`completion`, `messages`, `conversations`, `{self.args.dataset_text_field}` or `input_ids`. "
                f"{remedy_for(columns)} `wit_trl.to_trl_format` converts Alpaca, Dolly and WIT data, and "
                "`formatting_func` makes text of any columns."
            )
        return self.map_rows(dataset, function, "Checking rows")

    def format_rows(
        self, dataset: Dataset | IterableDataset, formatting_func: Callable[[dict], str]
    ) -> Dataset | IterableDataset:
        """Returns rows with the `"text"` that a `formatting_func` makes of each. It may read any column."""
        logger.warning_once(NO_PROMPT_MESSAGE)

        def format_row(example: dict[str, Any]) -> dict[str, str]:
            text = formatting_func(example)
            if not isinstance(text, str):
                raise ValueError(
                    f"`formatting_func` must return a text, but returned {text!r} for the row {reprlib.repr(example)}."
                )
            return {"text": text}

        return self.drop_columns_of_tokens(self.map_rows(dataset, format_row, "Applying formatting function"))

    def drop_columns_of_tokens(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """Removes what belongs to tokens from rows that are not tokenized, where TRL ignores most of it."""
        if isinstance(dataset, Dataset):
            return dataset.remove_columns(sorted(_COLUMNS_OF_TOKENS & {*dataset.column_names}))
        if _COLUMNS_OF_TOKENS.isdisjoint(get_dataset_column_names(dataset)):
            return dataset
        return dataset.map(remove_columns=sorted(_COLUMNS_OF_TOKENS))

    def weigh_tokens(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """
        Gives each token of tokenized rows its region, `"completion_mask"`, and the data's own weight of it,
        `"token_weights"`, truncates all of it to `max_length` as TRL does, and notes the [`RowLengths`].
        """
        columns = get_dataset_column_names(dataset)
        known = ("weight", "token_weights", "turn_weights")
        if ignored := [name for name in columns if "weight" in name.lower() and name not in known]:
            logger.warning(
                f"The {self.dataset_name} dataset has {ignored}, which is ignored. Rename it to `weight`, one number "
                "for the row, or to `token_weights`, one for each token of `input_ids`."
            )
        if {*MASK_COLUMNS}.isdisjoint(columns):
            logger.warning_once(
                "The tokenized data set has no `labels`, `completion_mask` or `assistant_masks` column: every token is "
                "completion and `prompt_loss_weight` has no effect."
            )
        used = {*MASK_COLUMNS, "attention_mask", "turn_weights", "weight"} - {"completion_mask"}
        if isinstance(dataset, Dataset):  # in a stream, the first row may lack columns of the others
            used &= {*columns}
        function = functools.partial(_weigh_tokens, kept=self._kept())
        return self.map_rows(dataset, function, "Finding completions", remove_columns=sorted(used))

    def _kept(self) -> slice:
        """The part of a row that is kept."""
        args = self.args
        if self.packing and args.max_length is None:
            raise ValueError("Packing needs a `max_length`, the length of a packed row.")
        windows = {"keep_start": slice(args.max_length), "keep_end": slice(-(args.max_length or 0), None)}
        if args.truncation_mode not in windows:
            raise ValueError(f"`truncation_mode` is {args.truncation_mode!r}, but must be one of {list(windows)}.")
        if args.max_length is None or (self.packing and args.packing_strategy != "bfd"):
            return slice(None)  # the other strategies split a row
        return windows["keep_start" if self.packing else args.truncation_mode]

    def map_kwargs(self, dataset: Dataset | IterableDataset, desc: str) -> dict[str, Any]:
        """Returns how to map a data set: on several processes, with a progress bar of this name."""
        if isinstance(dataset, IterableDataset):  # takes neither
            return {}
        return {"num_proc": self.args.dataset_num_proc, "desc": f"{desc} of {self.dataset_name} dataset"}

    def map_rows(
        self, dataset: Dataset | IterableDataset, function: Callable[..., dict[str, Any]], desc: str, **kwargs: Any
    ) -> Dataset | IterableDataset:
        """Maps each row to what the function adds to it, with the number of the row in its errors."""
        # `Dataset.map` writes the rows anew unless it gets None, which `IterableDataset.map` does not take
        unchanged: dict[str, Any] | None = None if isinstance(dataset, Dataset) else {}

        def call(example, index, dataset_name, prepared_by):
            try:
                return function(example) or unchanged
            except ValueError as error:
                raise ValueError(f"Row {index} of the {dataset_name} dataset: {error}") from error
            except (AttributeError, LookupError, TypeError) as error:  # of a tokenizer or template, whatever it met
                raise ValueError(f"Row {index} of the {dataset_name} dataset: {error!r}") from error

        # A cache of another version would not have what this one finds
        fn_kwargs = {"dataset_name": self.dataset_name, "prepared_by": importlib.metadata.version("wit_trl")}
        map_kwargs = {"with_indices": True, "fn_kwargs": fn_kwargs, **self.map_kwargs(dataset, desc), **kwargs}
        with global_then_local_main_first():
            return dataset.map(call, **map_kwargs)


def _to_chatml(example: dict[str, Any]) -> dict[str, Any]:
    """ShareGPT calls the user `human` and the assistant `gpt`, which chat templates do not know."""
    turns = example.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"`conversations` must be a list of turns, but is {turns!r}.")
    messages = maybe_convert_to_chatml({"conversations": copy.deepcopy(turns)})["messages"]
    check_messages(messages, "conversations")
    return {"messages": [{**m, "role": _SHAREGPT_ROLES.get(m["role"], m["role"])} for m in messages]}


def _tokenize_messages(
    example: dict[str, Any],
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    chat_template: str,
    tool_template: str | None,
) -> dict[str, Any]:
    if example.get("tools") and tool_template is not None:
        chat_template = tool_template
    messages = check_messages(example.get("messages"), "messages")
    check_answer(messages, "messages")
    conversation = Conversation(messages, processing_class, chat_template, example)
    if has_generation_markers(chat_template):
        tokens = conversation.tokenize(return_assistant_tokens_mask=True)
        masks = tokens["assistant_masks"]
    else:
        tokens = conversation.tokenize()
        masks = conversation.assistant_masks(tokens["input_ids"])
    if 1 not in masks:
        raise ValueError(
            "the chat template marks no token of the assistant's turns. Check where its `{% generation %}` stands."
        )
    input_ids = tokens["input_ids"]
    return {"input_ids": input_ids, "assistant_masks": masks, "turn_weights": conversation.turn_weights(input_ids)}


def _check_prompt_completion(
    example: dict[str, Any],
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    chat_template: str | None,
) -> dict[str, Any]:
    prompt, completion = (check_messages(example.get(name), name) for name in ("prompt", "completion"))
    check_answer(completion, "completion")
    if example.get("chat_template_kwargs", {}) is None:
        raise ValueError("`chat_template_kwargs` is None, which TRL does not take. Give every row a dict, or none.")
    conversation = Conversation(prompt + completion, processing_class, chat_template, example)
    conversation.check_prompt(prompt)
    return {"turn_weights": conversation.turn_weights()}


def _check_texts(example: dict[str, Any], columns: list[str]) -> dict[str, Any]:
    for column in columns:
        if not isinstance(example.get(column), str):
            raise ValueError(
                f"`{column}` must be a text, but is {example.get(column)!r}. Fill it in or remove the row."
            )
        check_unicode(example[column], f"`{column}`")
    return {}


def _weigh_tokens(example: dict[str, Any], kept: slice) -> dict[str, Any]:
    regions, weights = token_regions(example), token_weights(example)
    if len(turn_weights := example.get("turn_weights", ())):
        if len(turn_weights) != len(weights):
            raise ValueError(
                "the messages have weights, but the tokens of the whole conversation are not those of prompt and "
                "completion. Pass the conversation as `messages`."
            )
        weights *= torch.as_tensor(turn_weights)
    left = regions[kept]
    return {
        "input_ids": example["input_ids"][kept],
        "completion_mask": left,
        "token_weights": weights.numpy()[kept],
        "prompt_length": regions.count(0),
        "completion_length": regions.count(1),
        "truncated": len(left) < len(regions),
        "completion_lost": 1 in regions[1:] and 1 not in left[1:],
    }
