"""`DataCollatorForVisionLanguageWIT`: TRL's batches of text and images, with a weight for each token."""

import copy
import functools
import itertools
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers.utils import logging
from trl.chat_template_utils import has_generation_markers
from trl.data_utils import is_conversational, prepare_multimodal_messages
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from .._upstream import record_replacements
from ..conversation.chat_template import chosen_chat_template
from ..conversation.messages import check_answer, check_messages
from ..conversation.turn_weights import turn_weights
from ..conversation.turns import Conversation
from ..weights import NO_CONVERSATION_MESSAGE, NO_PROMPT_MESSAGE, StructureWeights, check_weight, set_targets


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
    image. The completion is what TRL would train on with `completion_only_loss` or `assistant_only_loss`, which are set
    by the examples here; all of a `"text"` is completion. Messages are rendered with TRL's training template where the
    processor's own has no `{% generation %}` marks; where TRL has none, the assistant's turns are found by rendering
    the conversation up to each of them, which processes the images again.

    Next to the keys of TRL, the batch holds `"completion_mask"`, `"token_weights"` and `"labels"` as in
    [`DataCollatorForWIT`]. The tokens that stand for an image (its placeholders, and the special tokens that the
    processor puts around or between them) are never a target: their `"completion_mask"` is -100.

    The data may bring weights of its own, which multiply those of the regions: a `"weight"` of the example, and a
    `"weight"` of a message. What is missing or `None` weighs 1. A turn of weight 0 is in neither sum of the loss.

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
        role_loss_weights (`dict[str, float]`, *optional*), chat_template_loss_weight (`float`, *optional*, defaults to
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
    chat_template_loss_weight: float = 1.0
    completion_turns: str = "all"

    @property
    def structure_weights(self) -> StructureWeights:
        """What roles and the chat template's own tokens weigh, and which turns are completion."""
        return StructureWeights(self.role_loss_weights or {}, self.chat_template_loss_weight, self.completion_turns)

    def tokenize_rows(self, examples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """
        Yields each example as the row that is trained on: `"input_ids"`, and of each token the region and the weight
        that the data gives it, with the [`RowLengths`] as columns.
        """
        whole = copy.copy(self)
        whole.max_length, whole.prompt_loss_weight, whole.completion_loss_weight = None, 1.0, 1.0
        for example in examples:
            batch = whole.torch_call([example])
            length = int(batch["attention_mask"].sum())
            names = ("input_ids", "completion_mask", "token_weights")
            tokens = {name: batch[name][0, :length].tolist() for name in names}
            row = {name: values[: self.max_length] for name, values in tokens.items()}
            regions, left = tokens["completion_mask"], row["completion_mask"]
            yield row | {
                "prompt_length": regions.count(0),
                "completion_length": regions.count(1),
                "truncated": len(left) < len(regions),
                "completion_lost": 1 in regions and 1 not in left,
            }

    def tokenize_first_rows(self, dataset: Iterable[dict[str, Any]], count: int) -> list[dict[str, Any]]:
        """
        Returns the first rows of a data set as `tokenize_rows` does. Of several processes all must call it: each takes
        a share, and what fails on one fails on all.
        """
        state = PartialState()
        mine: Iterable[dict[str, Any]]
        if isinstance(dataset, Dataset):  # reads no image of the others
            mine = dataset.select(range(state.process_index, min(count, len(dataset)), state.num_processes))
        else:
            mine = itertools.islice(dataset, state.process_index, count, state.num_processes)
        rows: list[Any]
        try:
            rows = list(self.tokenize_rows(mine))
        except Exception as error:
            rows = [error]
        rows = gather_object(rows)
        for row in rows:
            if isinstance(row, Exception):
                raise row
        return rows

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        columns = _columns(examples[0], self.dataset_text_field)
        if columns == ["prompt", "completion"]:  # where TRL would take a text
            examples = [{k: v for k, v in row.items() if k != self.dataset_text_field} for row in examples]
        mark_turns = columns == ["messages"] and not has_generation_markers(self._training_template)
        self.completion_only_loss = columns == ["prompt", "completion"]
        self.assistant_only_loss = columns == ["messages"] and not mark_turns
        if columns == ["messages"]:
            self.chat_template = self._training_template
        elif columns == [self.dataset_text_field]:
            logger.warning_once(NO_PROMPT_MESSAGE)
        rows, row_weights, conversations = [], [], []
        for position, example in enumerate(examples):
            with _naming(position, example, columns):
                row = _complete_row(example, columns)
                rows.append(row)
                row_weights.append(check_weight(row.get("weight"), "`weight`"))
                conversation = self._conversation(row, columns) if is_conversational(row) else None
                if conversation is None and self.structure_weights != StructureWeights():
                    raise ValueError(NO_CONVERSATION_MESSAGE)
                if conversation is not None and self.completion_only_loss:
                    prompt = conversation.messages[: len(row["prompt"])]
                    conversation.check_prompt(len(prompt), conversation.render(prompt, add_generation_prompt=True))
                conversations.append(conversation)
        collator = copy.copy(self)
        image_texts: set[str] = set()
        collator.processor = record_replacements(self.processor, image_texts)
        collate = super(DataCollatorForVisionLanguageWIT, collator).torch_call
        try:
            batch = collate([{**row} for row in rows])  # it changes what it gets
        except _ROW_ERRORS:
            for position, row in enumerate(rows):  # which of them?
                with _naming(position, row, columns):
                    collate([{**row}])
            raise
        if batch["input_ids"].size(1) == 0:
            raise ValueError("No example of the batch has a token. Remove such rows.")

        structure = self.structure_weights
        only_last = structure.completion_turns == "last"
        region = (batch["labels"] != -100).long()
        data_weights = torch.tensor(row_weights)[:, None].repeat(1, region.size(1))
        for position, (row, conversation) in enumerate(zip(rows, conversations, strict=True)):
            if conversation is None:
                continue
            with _naming(position, row, columns):
                length = int(batch["attention_mask"][position].sum())  # the padding is on the right
                input_ids = batch["input_ids"][position, :length].tolist()
                prompt, completion = row.get("prompt", ()), row.get("completion", ())
                if mark_turns or (only_last and len(completion) > 1):
                    masks = torch.tensor(conversation.assistant_masks(input_ids, only_last))
                    region[position, :length] = masks if mark_turns else masks.minimum(region[position, :length])
                elif only_last and columns == ["messages"]:
                    kept = conversation.keep_last_answer(region[position, :length].tolist(), input_ids)
                    region[position, :length] = torch.tensor(kept)
                regions = region[position, :length].tolist()
                of_turns = turn_weights(conversation, input_ids, structure, regions, len(prompt))
                if len(of_turns):
                    data_weights[position, :length] *= torch.from_numpy(of_turns)
                weights = {(turn.get("weight"), structure.role_loss_weights.get(turn["role"])) for turn in completion}
                if len(weights) > 1 or (only_last and len(completion) > 1):
                    _check_same_tokens(conversation, input_ids)
                if columns == ["messages"] and length != self.max_length and not region[position].any():
                    raise ValueError(
                        "the chat template marks no token of the assistant's turns. Put `{% generation %}` around "
                        "what it renders for them, or remove these marks from the template."
                    )

        region[batch["attention_mask"] == 0] = -100
        region[torch.isin(batch["input_ids"], self._placeholder_ids(image_texts))] = -100
        region[:, 0] = -100
        set_targets(batch, region, data_weights, self.prompt_loss_weight, self.completion_loss_weight)
        return batch

    @functools.cached_property
    def _training_template(self) -> str:
        return self.chat_template or chosen_chat_template(self.processor)

    def _placeholder_ids(self, image_texts: set[str]) -> torch.Tensor:
        """
        The tokens that stand for an image, a video or an audio: those that the processor names, which for some families
        are only what it replaces, and the added tokens of what it replaces them by, where there may be text as well.
        """
        tokenizer = self.processor.tokenizer
        ids = {tokenizer.convert_tokens_to_ids(str(token)) for token in self.processor.all_special_multimodal_tokens}
        added = {token for content, token in tokenizer.get_added_vocab().items() if content.strip()}
        for text in image_texts:
            ids |= added.intersection(tokenizer(text, add_special_tokens=False)["input_ids"])
        return torch.tensor(sorted(ids - {None, tokenizer.unk_token_id}), dtype=torch.long)

    def _conversation(self, row: dict[str, Any], columns: list[str]) -> Conversation:
        """The conversation as TRL's collator renders it: `"messages"` with `chat_template`, else with the own one."""
        messages = prepare_multimodal_messages(row[columns[0]], images=row["images"])
        template_kwargs = {"return_tensors": "pt", "processor_kwargs": {"add_special_tokens": False}}
        if self.completion_only_loss:
            messages += prepare_multimodal_messages(row["completion"])
            template_kwargs |= row.get("chat_template_kwargs") or {}
        template = None if self.completion_only_loss else self.chat_template
        return Conversation(messages, self.processor, template, {"chat_template_kwargs": template_kwargs})


def check_rows(rows: list[dict[str, Any]], text_field: str) -> list[dict[str, Any]]:
    """Raises `ValueError` for what is wrong in an example but for its images."""
    for row in rows:
        check_weight(_complete_row(row, _columns(row, text_field)).get("weight"), "`weight`")
    return [{"checked": True}] * len(rows)


def _columns(example: dict[str, Any], text_field: str) -> list[str]:
    if "messages" in example:
        return ["messages"]
    return [text_field] if text_field in example and "completion" not in example else ["prompt", "completion"]


@contextmanager
def _naming(position: int, example: dict[str, Any], columns: list[str]) -> Iterator[None]:
    """Says which example an error is about, by its position and its beginning: a collator does not know its index."""
    try:
        yield
    except _ROW_ERRORS as error:
        content = reprlib.repr([example.get(column) for column in columns])
        raise ValueError(f"Example {position} of the batch, {content}: {error}") from error


def _complete_row(example: dict[str, Any], columns: list[str]) -> dict[str, Any]:
    """Returns a copy of an example with a list of `"images"`, in which nothing is missing."""
    for column in columns:
        value = example.get(column)
        if value is None:
            raise ValueError(
                f"`{column}` is missing or None. An example with images needs `messages`, `prompt` and `completion`, "
                "or a text. Add it, or remove such rows."
            )
        if isinstance(value, list):
            check_messages(value, column)
            if column != "prompt":
                check_answer(value, column)
    row = {**example, "images": example.get("images") or []}
    if not isinstance(row["images"], list):
        raise ValueError(f"`images` must be a list, but is {row['images']!r}. Name a single one `image`.")
    if row.pop("image", None) is not None:
        row["images"] = [example["image"]]
    return row


def _check_same_tokens(conversation: Conversation, input_ids: list[int]) -> None:
    if [int(token) for token in conversation.tokenize()["input_ids"][: len(input_ids)]] != input_ids:
        raise ValueError(
            "the turns of `completion` have different weights, but its tokens are other ones than those of the whole "
            "conversation, so its turns cannot be found. Pass the conversation as `messages`."
        )


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
