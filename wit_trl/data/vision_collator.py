"""`DataCollatorForVisionLanguageWIT`: TRL's batches of text and images, with a weight for each token."""

import copy
import itertools
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers.utils import logging
from trl.chat_template_utils import has_generation_markers
from trl.data_utils import is_conversational, prepare_multimodal_messages
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from .._upstream import record_replacements
from ..conversation.chat_template import check_marks, chosen_chat_template
from ..conversation.messages import Messages, check_answer, read_messages
from ..conversation.tool_calls import arguments_as_objects
from ..conversation.turn_weights import weigh_conversation
from ..conversation.turns import Conversation
from ..weights import NO_CONVERSATION_MESSAGE, NO_PROMPT_MESSAGE, StructureWeights, check_weight, set_targets
from .prepared_rows import SPANS_COLUMN, TOKEN_COLUMNS, prepared_row


logger = logging.get_logger(__name__)

# What templates, tokenizers and image processors raise for a row that they cannot take
_ROW_ERRORS = (AttributeError, LookupError, OSError, TypeError, ValueError)


@dataclass
class DataCollatorForVisionLanguageWIT(DataCollatorForVisionLanguageModeling):
    """
    Data collator for examples with images that gives every token its weight as a prediction target.

    Renders, tokenizes, processes the images, pads and truncates as TRL's
    [`~trl.trainer.sft_trainer.DataCollatorForVisionLanguageModeling`] does, for the same examples: `"messages"`,
    `"prompt"` and `"completion"` (text or messages), or `"text"`, with `"images"` or `"image"`. An example may have no
    image. The completion is what TRL would train on with `completion_only_loss` or `assistant_only_loss`; the examples
    decide which. All of a `"text"` is completion. Messages are rendered with TRL's training template where the
    processor's own has no `{% generation %}` marks. Where TRL has none, the collator finds the assistant's turns: it
    renders the conversation up to each of them, which processes the images again.

    Next to the keys of TRL, the batch holds `"completion_mask"`, `"token_weights"` and `"labels"` as in
    [`DataCollatorForWIT`]. The tokens that stand for an image (its placeholders, and the special tokens that the
    processor puts around or between them) are never a target: their `"completion_mask"` is -100.

    An example and a message may have a `"weight"`, which multiplies those of the regions. What is missing or `None`
    weighs 1. A turn of weight 0 is in neither sum of the loss.

    Args:
        processor ([`~transformers.ProcessorMixin`]):
            The processor used to tokenize text and process images.
        max_length (`int`, *optional*):
            Maximum sequence length. Longer sequences are truncated.
        pad_to_multiple_of (`int`, *optional*):
            Pad the length to a multiple of this value.
        dataset_text_field (`str`, *optional*, defaults to `"text"`):
            Name of the column that holds plain text.
        chat_template (`str`, *optional*):
            Chat template used to render `"messages"`. Defaults to the one to train with, as described above.
        prompt_loss_weight (`float`, *optional*, defaults to `0.2`):
            Weight of a prompt token.
        completion_loss_weight (`float`, *optional*, defaults to `0.8`):
            Weight of a completion token.
        role_loss_weights (`dict[str, float]`, *optional*), span_loss_weights (`dict[str, float]`, *optional*),
        regex_loss_weights (`dict[str, float]`, *optional*), chat_template_loss_weight (`float`, *optional*, defaults to
        `1.0`), completion_turns (`str`, *optional*, defaults to `"all"`):
            As in [`WITSFTConfig`].

    Raises:
        `ValueError`: a column is missing or `None`; a conversation is empty, or has no assistant turn or a message
        without role or content; a weight of the data is not a finite number of at least 0.

    Example:
    ```python
    >>> from datasets import load_dataset
    >>> from transformers import AutoProcessor
    >>> from wit_trl import DataCollatorForVisionLanguageWIT

    >>> processor = AutoProcessor.from_pretrained("Qwen/Qwen2.5-VL-3B-Instruct")
    >>> dataset = load_dataset("trl-lib/llava-instruct-mix", split="train")
    >>> collator = DataCollatorForVisionLanguageWIT(processor, prompt_loss_weight=0.2, completion_loss_weight=0.8)
    >>> batch = collator([dataset[0], dataset[1]])
    ```
    """

    prompt_loss_weight: float = 0.2
    completion_loss_weight: float = 0.8
    role_loss_weights: dict[str, float] | None = None
    span_loss_weights: dict[str, float] | None = None
    regex_loss_weights: dict[str, float] | None = None
    chat_template_loss_weight: float = 1.0
    completion_turns: str = "all"

    @property
    def structure_weights(self) -> StructureWeights:
        """What the structure of a conversation says of the weights of its tokens."""
        return StructureWeights.of(self)

    def tokenize_rows(self, examples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yields each example as the row that is trained on, with the columns of [`prepared_row`]."""
        whole = copy.copy(self)
        whole.max_length, whole.prompt_loss_weight, whole.completion_loss_weight = None, 1.0, 1.0
        for example in examples:
            batch = whole([example])
            length = int(batch["attention_mask"].sum())
            input_ids, regions, weights = (batch[name][0, :length] for name in TOKEN_COLUMNS)
            spans = batch[SPANS_COLUMN][0, :length].numpy() if SPANS_COLUMN in batch else None
            row = prepared_row(input_ids, regions, weights, slice(self.max_length), spans)
            yield {name: x.tolist() if isinstance(x, np.ndarray) else x for name, x in row.items()}

    def tokenize_first_rows(self, dataset: Iterable[dict[str, Any]], count: int) -> list[dict[str, Any]]:
        """
        Returns the first rows of a data set as `tokenize_rows` does. All processes must call it: each takes a share,
        and what fails on one fails on all.
        """
        state = PartialState()
        if isinstance(dataset, Dataset):  # `select` reads no image of the other rows
            dataset = dataset.select(range(state.process_index, min(count, len(dataset)), state.num_processes))
        else:
            dataset = itertools.islice(dataset, state.process_index, count, state.num_processes)
        rows: list[Any] = []
        try:
            rows += self.tokenize_rows(dataset)
        except Exception as error:
            rows = [error]
        rows = gather_object(rows)
        for error in rows:
            if isinstance(error, Exception):
                raise error
        return rows

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        columns, structure = columns_of(examples[0], self.dataset_text_field), self.structure_weights
        is_pair, is_messages = columns == ["prompt", "completion"], columns == ["messages"]
        chat_template = (self.chat_template or chosen_chat_template(self.processor)) if is_messages else None
        has_marks = is_messages and has_generation_markers(chat_template)
        image_texts: set[str] = set()
        of_trl = copy.copy(self)
        of_trl.processor, of_trl.chat_template = record_replacements(self.processor, image_texts), chat_template
        of_trl.completion_only_loss, of_trl.assistant_only_loss = is_pair, has_marks
        collate = super(DataCollatorForVisionLanguageWIT, of_trl).torch_call
        if columns == [self.dataset_text_field]:
            logger.warning_once(NO_PROMPT_MESSAGE)
        rows, conversations = [], []
        for position, example in enumerate(examples):
            with _naming(position, example, columns):
                rows.append(_complete_row(example, columns, self.dataset_text_field))
                conversations.append(self._conversation(rows[-1], columns, chat_template))
        try:
            batch = collate([{**row} for row in rows])  # it changes what it gets
        except _ROW_ERRORS:
            for position, row in enumerate(rows):  # which of them?
                with _naming(position, row, columns):
                    collate([{**row}])
            raise
        if batch["input_ids"].size(1) == 0:
            raise ValueError("No example of the batch has a token. Remove such rows.")

        region = (batch["labels"] != -100).long()
        data_weights = torch.tensor([row["weight"] for row in rows])[:, None].repeat(1, region.size(1))
        spans = torch.zeros_like(region)
        for position, (row, conversation) in enumerate(zip(rows, conversations, strict=True)):
            if conversation is None:
                continue
            with _naming(position, row, columns):
                length = int(batch["attention_mask"][position].sum())  # the padding is on the right
                input_ids = batch["input_ids"][position, :length].tolist()
                marked = region[position, :length].tolist() if is_pair or has_marks else None
                first_answer = len(row["prompt"]) if is_pair else 0
                self._check_turns(row.get("completion", []), conversation, input_ids)
                weighed = weigh_conversation(conversation, input_ids, marked, structure, first_answer)
                if marked is not None and is_messages and length != self.max_length:
                    check_marks(marked)
                region[position, :length] = torch.tensor(weighed.regions)
                data_weights[position, :length] *= torch.from_numpy(weighed.weights)
                if weighed.spans is not None:
                    spans[position, :length] = torch.from_numpy(weighed.spans)

        region[batch["attention_mask"] == 0] = -100
        region[torch.isin(batch["input_ids"], self._placeholder_ids(image_texts))] = -100
        region[:, 0] = -100
        if structure.has_spans:
            batch[SPANS_COLUMN] = spans
        set_targets(batch, region, data_weights, (self.prompt_loss_weight, self.completion_loss_weight))
        return batch

    def _check_turns(self, completion: Messages, conversation: Conversation, input_ids: list[int]) -> None:
        """
        Raises `ValueError` if turns of a completion, or what is inside them, have different weights or regions, but
        cannot be found, because their tokens are not those of the whole conversation.
        """
        structure = self.structure_weights
        which = conversation.completion_turns or structure.completion_turns
        weights = {(turn.get("weight"), structure.role_loss_weights.get(turn["role"])) for turn in completion}
        is_cut = any(turn.get("completion") is False for turn in completion) or (which != "all" and len(completion) > 1)
        is_inside = bool(completion) and (structure.has_spans or bool(conversation.part_weights))
        if not (len(weights) > 1 or is_cut or is_inside):
            return
        if [int(token) for token in conversation.tokenize()["input_ids"][: len(input_ids)]] != input_ids:
            raise ValueError(
                "the turns of `completion`, or what is inside them, have different weights, but its tokens are other "
                "ones than those of the whole conversation, so its turns cannot be found. Pass the conversation as "
                "`messages`."
            )

    def _placeholder_ids(self, image_texts: set[str]) -> torch.Tensor:
        """
        Returns the tokens that stand for an image, a video or an audio. The processor names some of them. Some
        families replace these by a text: its added tokens belong to them as well.
        """
        tokenizer = self.processor.tokenizer
        ids = {tokenizer.convert_tokens_to_ids(str(token)) for token in self.processor.all_special_multimodal_tokens}
        added = {token for content, token in tokenizer.get_added_vocab().items() if content.strip()}
        for text in image_texts:
            ids |= added.intersection(tokenizer(text, add_special_tokens=False)["input_ids"])
        return torch.tensor(sorted(ids - {None, tokenizer.unk_token_id}), dtype=torch.long)

    def _conversation(self, row: dict[str, Any], columns: list[str], chat_template: str | None) -> Conversation | None:
        """Returns a row's conversation as TRL's collator renders it and checks it, or `None` if the row is a text."""
        if not is_conversational(row):
            if self.structure_weights.of_conversations or self.regex_loss_weights:
                raise ValueError(NO_CONVERSATION_MESSAGE)
            return None
        messages = prepare_multimodal_messages(row[columns[0]], images=row["images"])
        kwargs = {"return_tensors": "pt", "processor_kwargs": {"add_special_tokens": False}}
        of_row = {"completion_turns": row.get("completion_turns")}
        if columns == ["messages"]:
            return Conversation(messages, self.processor, chat_template, of_row | {"chat_template_kwargs": kwargs})
        messages += prepare_multimodal_messages(row["completion"])
        kwargs |= row.get("chat_template_kwargs") or {}
        of_row["chat_template_kwargs"] = kwargs
        conversation = Conversation(messages, self.processor, chat_template, of_row)
        conversation.render_prompt(len(row["prompt"]))
        return conversation


def check_rows(rows: list[dict[str, Any]], text_field: str) -> list[dict[str, Any]]:
    """Raises `ValueError` for what is wrong in an example, apart from its images."""
    for row in rows:
        _complete_row(row, columns_of(row, text_field), text_field)
    return [{"checked": True}] * len(rows)


def columns_of(example: dict[str, Any], text_field: str) -> list[str]:
    """Returns the columns with what is trained on, apart from images."""
    if "messages" in example:
        return ["messages"]
    return [text_field] if text_field in example and "completion" not in example else ["prompt", "completion"]


@contextmanager
def _naming(position: int, example: dict[str, Any], columns: list[str]) -> Iterator[None]:
    """Adds the position and the beginning of the example to an error. A collator does not know its index."""
    try:
        yield
    except _ROW_ERRORS as error:
        content = reprlib.repr([example.get(column) for column in columns])
        raise ValueError(f"Example {position} of the batch, {content}: {error}") from error


def _complete_row(example: dict[str, Any], columns: list[str], text_field: str) -> dict[str, Any]:
    """Returns a copy of an example with a `"weight"` and a list of `"images"`, in which nothing is missing."""
    row = {**example, "images": example.get("images") or []}
    if text_field not in columns:  # which TRL would take
        row.pop(text_field, None)
    for column in columns:
        value = example.get(column)
        if value is None:
            raise ValueError(
                f"`{column}` is missing or None. An example with images needs `messages`, `prompt` and `completion`, "
                "or a text. Add it, or remove such rows."
            )
        if isinstance(value, list):
            row[column] = arguments_as_objects(read_messages(example, column))
            if column != "prompt":
                check_answer(row[column], column)
    if not isinstance(row["images"], list):
        raise ValueError(f"`images` must be a list, but is {row['images']!r}. Name a single one `image`.")
    if row.pop("image", None) is not None:
        row["images"] = [example["image"]]
    row["weight"] = check_weight(row.get("weight"), "`weight`")
    return row


@contextmanager
def explain_cut_images(max_length: int | None) -> Iterator[None]:
    """Says what to do where a model finds fewer tokens of an image than the image has."""
    try:
        yield
    except ValueError as error:
        if "Image features and image tokens do not match" not in str(error) or max_length is None:
            raise
        raise ValueError(
            f"`max_length={max_length}` cuts off tokens of an image, but not the image. Raise it, or set it to `None`."
        ) from error
