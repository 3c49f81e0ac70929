"""
From rows of any type to tokens, each with a region and the data weight that messages give it.

1. A row is a text, a prompt and a completion, or a conversation. Whole rows are rendered and tokenized, as TRL does it.
2. Texts: the completion is what follows the tokens of the prompt.
3. Conversations: `weigh_conversation` tells regions and data weights.
"""

import itertools
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from accelerate.logging import get_logger
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl.chat_template_utils import has_generation_markers

from .._upstream import common_prefix_length, tokenize_messages
from ..config import WITSFTConfig
from ..conversation.chat_template import check_marks, chosen_chat_template, training_chat_template
from ..conversation.messages import check_answer, check_unicode, read_messages
from ..conversation.patterns import matches
from ..conversation.template_memory import TemplateMemory
from ..conversation.token_positions import first_holding, token_begins
from ..conversation.tool_calls import read_tools
from ..conversation.turn_weights import Weighed, span_factors, weigh_conversation
from ..conversation.turns import Conversation
from ..weights import NO_PROMPT_MESSAGE, PATTERN_BIT, StructureWeights, check_weight
from .prepared_rows import Row


logger = get_logger(__name__)

# What `apply_chat_template` does not pass to the template, but uses itself once it has rendered
_OF_TOKENIZER = {"max_length", "padding", "return_tensors", "sanitize_control_tokens", "tokenizer_kwargs", "truncation"}

# The tokens of a row, and what each of them is
TokenizedRow = tuple[list[int], Weighed]


@dataclass
class RowTokenizer:
    """
    Tokenizes rows of one type. Called with some of them, it returns a `TokenizedRow` for each.

    Raises:
        `ValueError`: a row cannot be tokenized, or the regions of its tokens cannot be told.
    """

    processing_class: PreTrainedTokenizerBase | ProcessorMixin
    columns: tuple[str, ...]  # `"prompt"` and `"completion"`, or one column
    of_messages: bool  # whether the columns hold messages, or turns of ShareGPT, and not texts
    chat_template: str | None = None  # of messages; by default the own one
    tool_template: str | None = None  # of `"messages"` in rows with tools
    assistant_only: bool = False  # whether a completion is only what the template marks as the assistant's
    structure: StructureWeights = field(default_factory=StructureWeights)

    def __post_init__(self):
        self._memory = TemplateMemory(self.processing_class)
        self._is_fast = isinstance(self.processing_class, PreTrainedTokenizerBase) and self.processing_class.is_fast

    def __reduce__(self):  # without the memory, on which no token depends: the hash of the cache would
        return type(self), tuple(getattr(self, each.name) for each in fields(self))

    def __call__(self, rows: list[Row]) -> list[TokenizedRow]:
        if not self.of_messages:
            return self._tokenize_texts(rows)
        return self._tokenize_conversations(rows) if len(self.columns) == 1 else self._tokenize_pairs(rows)

    def _tokenize_texts(self, rows: list[Row]) -> list[TokenizedRow]:
        for row in rows:
            for column in self.columns:
                _check_text(row, column)
        parts = [_parts(row, self.columns) for row in rows]
        rows = [{**row, **{column: _joined(row[column]) for column in self.columns}} for row in rows]
        eos_token = self._memory.tokens.tokenizer.eos_token or ""
        texts = ["".join(row[column] for column in self.columns) for row in rows]
        # As TRL, which looks at the end of the completion alone
        ends = ["" if row[self.columns[-1]].endswith(eos_token) else eos_token for row in rows]
        whole = self._encode([text + end for text, end in zip(texts, ends, strict=True)], add_special_tokens=True)
        if len(self.columns) == 1:
            regions = [[1] * len(input_ids) for input_ids in whole]
        else:
            prompts = self._encode([row["prompt"] for row in rows], add_special_tokens=True)
            regions = [_regions(input_ids, prompt) for input_ids, prompt in zip(whole, prompts, strict=True)]
        starts = [len(text) - len(row[self.columns[-1]]) for text, row in zip(texts, rows, strict=True)]
        columns = zip(whole, regions, texts, ends, starts, parts, strict=True)
        return [(input_ids, self._weigh_text(input_ids, *others)) for input_ids, *others in columns]

    def _weigh_text(
        self,
        input_ids: list[int],
        regions: list[int],
        text: str,
        end_of_text: str,
        start_of_completion: int,
        parts: list[tuple[int, int, float]],  # the characters and the weight of what has one
    ) -> Weighed:
        weights, patterns = np.ones(len(input_ids), np.float32), self.structure.regex_loss_weights
        if not parts and not patterns:
            return Weighed(regions, weights)
        tokenizer = self._memory.tokens.tokenizer
        encoded = tokenizer(text + end_of_text, return_offsets_mapping=True) if tokenizer.is_fast else {}
        if encoded.get("input_ids") != input_ids:
            raise ValueError(
                "parts of a text and `regex_loss_weights` need a fast tokenizer, and no tokens but those of the text. "
                "Load one (`use_fast`), or pass messages."
            )
        begins = token_begins(encoded["offset_mapping"])
        for start, end, weight in parts:
            weights[slice(*np.searchsorted(begins, (start, end)))] *= np.float32(weight)
        if not patterns:
            return Weighed(regions, weights)
        codes, is_completion = np.zeros(len(input_ids), np.int32), np.asarray(regions) == 1
        for bit, pattern in enumerate(patterns, start=PATTERN_BIT):
            for _, start, end in matches(pattern, text, [(start_of_completion, len(text))]):
                found = slice(first_holding(begins, start), int(np.searchsorted(begins, end)))
                codes[found] |= is_completion[found] * np.int32(1 << bit)
        return Weighed(regions, weights * span_factors(codes, self.structure), codes)

    def _tokenize_conversations(self, rows: list[Row]) -> list[TokenizedRow]:
        tokenized = []
        for has_marks, group in itertools.groupby(map(self._conversation, rows), _has_marks):
            conversations = [*group]
            for conversation, tokens in zip(
                conversations, self._encode_conversations(conversations, has_marks), strict=True
            ):
                marked = tokens["assistant_masks"] if has_marks else None
                weighed = weigh_conversation(conversation, tokens["input_ids"], marked, self.structure)
                if marked is not None:
                    check_marks(marked)
                tokenized.append((tokens["input_ids"], weighed))
        return tokenized

    def _conversation(self, row: Row) -> Conversation:
        (column,) = self.columns
        messages = read_messages(row, column)
        check_answer(messages, column)
        template = self.tool_template if self.tool_template and read_tools(row.get("tools")) else self.chat_template
        return Conversation(messages, self.processing_class, template, row, self._memory)

    def _tokenize_pairs(self, rows: list[Row]) -> list[TokenizedRow]:
        conversations, prompt_turns, texts = [], [], []
        for row in rows:
            prompt, completion = (read_messages(row, name) for name in self.columns)
            check_answer(completion, "completion")
            conversation = Conversation(
                prompt + completion, self.processing_class, self.chat_template, row, self._memory
            )
            conversations.append(conversation)
            prompt_turns.append(len(prompt))
            texts.append(conversation.render_prompt(len(prompt)))
        if self._tokenizes_what_is_rendered(conversations):
            prompt_ids = self._encode(texts, add_special_tokens=False)
        else:
            prompt_ids = [
                tokenize_messages(
                    self.processing_class,
                    conversation.messages[:turns],
                    **{**conversation.template_kwargs, "add_generation_prompt": True},
                )["input_ids"]
                for conversation, turns in zip(conversations, prompt_turns, strict=True)
            ]
        tokenized = []
        whole = self._encode_conversations(conversations, self.assistant_only)
        for conversation, turns, of_prompt, tokens in zip(conversations, prompt_turns, prompt_ids, whole, strict=True):
            input_ids = tokens["input_ids"]
            marked = _regions(input_ids, of_prompt)
            if self.assistant_only:
                check_marks(tokens["assistant_masks"])
                marked = [*map(min, marked, tokens["assistant_masks"])]
            weighed = weigh_conversation(conversation, input_ids, marked, self.structure, turns)
            tokenized.append((input_ids, weighed))
        return tokenized

    def _encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        if not self._is_fast:
            return [tokenize_messages(self.processing_class, text)["input_ids"] for text in texts]
        return self.processing_class(
            texts, add_special_tokens=add_special_tokens, return_attention_mask=False, return_token_type_ids=False
        )["input_ids"]

    def _tokenizes_what_is_rendered(self, conversations: list[Conversation]) -> bool:
        """Whether the tokens are those of the rendered text. A processor may write more."""
        return self._is_fast and all(_OF_TOKENIZER.isdisjoint(c.template_kwargs) for c in conversations)

    def _encode_conversations(self, conversations: list[Conversation], with_masks: bool) -> list[dict[str, list[int]]]:
        """Returns `"input_ids"` and, if asked, the template's `"assistant_masks"` of each."""
        if not self._tokenizes_what_is_rendered(conversations):
            kwargs = {"return_assistant_tokens_mask": True} if with_masks else {}
            return [conversation.tokenize(**kwargs) for conversation in conversations]
        if not with_masks:
            texts = [conversation.text for conversation in conversations]
            return [{"input_ids": input_ids} for input_ids in self._encode(texts, add_special_tokens=False)]
        tokens = []
        for kwargs, group in itertools.groupby(conversations, lambda conversation: conversation.template_kwargs):
            messages = [conversation.messages for conversation in group]
            batch = self.processing_class.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **kwargs
            )
            columns = zip(batch["input_ids"], batch["assistant_masks"], strict=True)
            tokens += [{"input_ids": input_ids, "assistant_masks": masks} for input_ids, masks in columns]
        return tokens


def row_tokenizer(
    example: Row,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    args: WITSFTConfig,
    pair_template: str | None,
    assistant_only: bool,
) -> RowTokenizer | None:
    """
    Returns what tokenizes rows with the columns of an example, or `None` if these are those of no type of data set.
    TRL renders prompts and completions with `pair_template`, if it is not the own template.
    """
    structure = args.structure_weights
    if "prompt" in example and "completion" in example:
        if assistant_only and pair_template is None:
            pair_template = training_chat_template(processing_class)
        columns, prompt = ("prompt", "completion"), example["prompt"]
        of_messages = isinstance(prompt, list) and not all(map(_is_part, prompt))
        return RowTokenizer(processing_class, columns, of_messages, pair_template, None, assistant_only, structure)
    for column in ("conversations", "messages"):
        if column in example:
            templates = chosen_chat_template(processing_class), training_chat_template(processing_class, tools=True)
            return RowTokenizer(processing_class, (column,), True, *templates, structure=structure)
    if args.dataset_text_field not in example:
        return None
    logger.warning_once(NO_PROMPT_MESSAGE)
    return RowTokenizer(processing_class, (args.dataset_text_field,), False, structure=structure)


def _regions(input_ids: list[int], prompt_ids: list[int]) -> list[int]:
    """Returns 0 for the tokens that a prompt has alone too, and 1 for the others, as TRL tells the completion."""
    length = len(prompt_ids)
    if input_ids[:length] != prompt_ids:
        length = common_prefix_length(prompt_ids, input_ids)
        logger.warning_once(
            "The tokens of a prompt alone are not the first ones of prompt and completion, because tokens merge across "
            "the boundary or the chat template renders the prompt differently. The completion starts where they part. "
            "To avoid it, end the prompt where a token ends: a completion that starts with a space rather than a "
            "prompt that ends in one."
        )
    return [0] * length + [1] * (len(input_ids) - length)


def _has_marks(conversation: Conversation) -> bool:
    return has_generation_markers(conversation.template_kwargs["chat_template"])


def _is_part(value: Any) -> bool:
    """Whether it is a part of a text, and no message."""
    return isinstance(value, dict) and isinstance(value.get("text"), str) and not value.get("role")


def _joined(text: Any) -> str:
    """Returns a text, which may be a list of parts."""
    return "".join(part["text"] for part in text) if isinstance(text, list) else text


def _parts(row: Row, columns: tuple[str, ...]) -> list[tuple[int, int, float]]:
    """Returns the characters and the weight of each part of the texts that has one."""
    found, position = [], 0
    for column in columns:
        parts = row[column] if isinstance(row[column], list) else [{"text": row[column]}]
        for part in parts:
            end = position + len(part["text"])
            weight = check_weight(part.get("weight"), f"the `weight` of a part of `{column}`")
            if weight != 1:
                found.append((position, end, weight))
            position = end
    return found


def _check_text(row: Row, column: str) -> None:
    text = row.get(column)
    if isinstance(text, list) and text and all(map(_is_part, text)):
        text = _joined(text)
    if isinstance(text, int | float):  # of a CSV file, where "3" is no text
        raise ValueError(
            f"`{column}` must be a text, but is the number {text!r}. Cast the column: `dataset.cast_column({column!r}, "
            "datasets.Value('string'))`. Or store the rows as JSON lines with texts in quotes."
        )
    if not isinstance(text, str):
        raise ValueError(f"`{column}` must be a text, but is {text!r}. Fill it in or remove the row.")
    check_unicode(text, f"`{column}`")
