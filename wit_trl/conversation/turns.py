"""
Which tokens of a rendered conversation belong to which turn.

1. The whole conversation is rendered, and nothing of it may be left out.
2. `ContentSpans` finds the characters of each content, from what is remembered of the template, else by probes.
3. Where a turn starts follows from what the template writes before it, else from the rendering of the turns before.
4. `TokenPositions` tells the token of a character.
"""

import functools
import itertools
import json
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging
from trl.data_utils import prepare_multimodal_messages

from .._upstream import common_prefix_length, tokenize_messages
from .content_spans import Span
from .messages import THINKING, Messages, message_texts, missing_end
from .template_memory import TemplateMemory, Turn, kind_of
from .token_positions import TokenPositions


logger = logging.get_logger(__name__)

_PROBE = "\ue000"  # of private use, so that no text has it


class Conversation:
    """
    A conversation as the chat template renders it, and what each turn adds to it.

    Where a template does not mark the assistant's turns, they are found by rendering: a turn is what it adds to the
    rendering of the conversation before it, and the assistant's answer begins after the generation prompt. With a
    `memory` a template needs that once for each two roles that follow each other.

    Args:
        messages (`list[dict]`):
            The turns.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            What renders and tokenizes them.
        chat_template (`str`, *optional*):
            The template to render with. Defaults to the own one.
        row (`dict`):
            Row of the data set. Its `"tools"` (a list or JSON) and `"chat_template_kwargs"` go to the template.
        memory ([`TemplateMemory`], *optional*):
            What other conversations told of the template.

    Raises:
        `ValueError`: the template cannot render the conversation, or leaves out a part of it.
    """

    def __init__(
        self,
        messages: Messages,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        chat_template: str | None,
        row: dict[str, Any],
        memory: TemplateMemory | None = None,
    ):
        self.messages = messages
        self._processing_class = processing_class
        tools, template_kwargs = row.get("tools"), row.get("chat_template_kwargs")
        if isinstance(tools, str):
            try:
                tools = json.loads(tools)
            except json.JSONDecodeError as error:
                raise ValueError(f"`tools` is a text, but not JSON: {error}") from error
        if not isinstance(template_kwargs, dict | None):
            raise ValueError(f"`chat_template_kwargs` must be a dict, but is {template_kwargs!r}.")
        self.template_kwargs = {"chat_template": chat_template, "tools": tools, **(template_kwargs or {})}
        self.text = self.render(messages)
        self._memory = memory = memory or TemplateMemory(processing_class)
        self._tokens = memory.tokens
        self._content_spans, self._turns = memory.part(self.template_kwargs)
        self._kinds = [kind_of(message) for message in messages]
        # The characters of each content; `None` where the template changes what messages say
        self.spans = self._content_spans.find(self.text, messages, self._kinds)
        self._check_nothing_is_left_out()

    def render(self, messages: Messages, **kwargs: Any) -> str:
        """Returns the text of some of the turns. Raises `ValueError` if the template does."""
        if isinstance(self._processing_class, ProcessorMixin):
            messages = prepare_multimodal_messages(messages)
        try:
            return self._processing_class.apply_chat_template(
                messages, **{**self.template_kwargs, "tokenize": False, **kwargs}
            )
        except Exception as error:  # whatever a template raises
            what = "this conversation" if len(messages) == len(self.messages) else f"its first {len(messages)} turns"
            remedy = ""
            if any("content" not in message for message in messages):
                remedy = (
                    ". Choose a template that supports tools (`chat_template_path`), or give each message that has "
                    "only `tool_calls` an empty `content`"
                )
            raise ValueError(f"the chat template cannot render {what}: {error}{remedy}") from error

    def tokenize(self, **kwargs: Any) -> dict[str, list[int]]:
        """Returns `"input_ids"` and, with `return_assistant_tokens_mask=True`, the template's `"assistant_masks"`."""
        return tokenize_messages(self._processing_class, self.messages, **{**self.template_kwargs, **kwargs})

    def assistant_masks(self, input_ids: list[int], only_last: bool = False) -> list[int]:
        """
        Returns 1 for the tokens of the assistant's answers, or of the last one, with their end-of-turn tokens, and 0
        for all others.
        """
        masks = [0] * len(input_ids)
        positions = self.positions(input_ids)
        for turn in self.answers()[-1:] if only_last else self.answers():
            start, end = self.answer(turn, positions)
            masks[start:end] = [1] * (end - start)
        return masks

    def _check_nothing_is_left_out(self) -> None:
        """A template may print nothing of what it does not know, and Python's form of a list, without an error."""
        if self.spans is None:
            self._probe_contents()
        for turn, message in enumerate(self.messages):
            thinking = [text for key in THINKING if isinstance(text := message.get(key), str)]
            if turn == len(self.messages) - 1 and missing_end(thinking, self.text) is not None:
                logger.warning_once(
                    "The chat template leaves out what an assistant thinks before its last answer: it is not trained."
                )
            if thinking and not any(message_texts(message)):
                self._check_is_rendered(turn, thinking)
        without_calls = [
            {**message, "tool_calls": None, "content": message.get("content") or ""} for message in self.messages
        ]
        if any(message.get("tool_calls") for message in self.messages) and self._renders_the_same(without_calls):
            raise ValueError(
                "the chat template leaves out the tool calls of the assistant. Choose a template that supports tools "
                "(`chat_template_path`), or remove such rows."
            )
        if self.template_kwargs["tools"] and self._renders_the_same(self.messages, tools=None):
            raise ValueError(
                "the chat template leaves out the `tools`. Choose a template that supports tools "
                "(`chat_template_path`), or remove the column."
            )

    def _probe_contents(self) -> None:
        try:
            self.spans, missing, written = self._content_spans.probe(self.text, self.messages, self.render)
        except ValueError:  # it takes no such content
            missing, written = {*range(len(self.messages))}, []
        for turn in sorted(missing):
            self._check_is_rendered(turn, message_texts(self.messages[turn]))
        in_parts = any(isinstance(message.get("content"), list) for message in self.messages)
        in_parts = in_parts or isinstance(self._processing_class, ProcessorMixin)  # for which `render` makes parts
        if in_parts and any(before.endswith(("'text': '", '"text": "')) for before in written):
            raise ValueError(
                "the chat template prints a `content` of several parts as it stands. Make every `content` a text, or "
                "choose another template (`chat_template_path`)."
            )
        if self.spans is not None:
            self._content_spans.remember(self.messages, self._kinds, written)

    def _check_is_rendered(self, turn: int, texts: list[str]) -> None:
        message = self.messages[turn]
        left_out = missing_end(texts, self.text)
        # Some templates (gpt-oss) leave out what is said beside a tool call
        if left_out is not None and not message.get("tool_calls"):
            raise ValueError(
                f"the chat template leaves out turn {turn} ({message['role']}), which ends in {left_out!r}. Choose "
                "a template that renders all of the conversation (`chat_template_path`), name the role as the "
                "template does, or take the turn out of the data."
            )

    def without_tools(self) -> "Conversation":
        """Returns the conversation as it is rendered without `tools`."""
        row = {"chat_template_kwargs": {**self.template_kwargs, "tools": None}}
        return Conversation(self.messages, self._processing_class, None, row, self._memory)

    def _renders_the_same(self, messages: Messages, **kwargs: Any) -> bool:
        try:
            return self.render(messages, **kwargs) == self.text
        except ValueError:  # it misses something
            return False

    def render_prompt(self, number_of_turns: int) -> str:
        """
        Returns the first turns, rendered with the generation prompt. Raises `ValueError` where TRL would take the end
        of this prompt for completion.
        """
        rendered = self.render(self.messages[:number_of_turns], add_generation_prompt=True)
        if not self.text.startswith(rendered):
            self.text_before(number_of_turns)
        return rendered

    def answers(self) -> list[int]:
        """Returns the turns of the assistant."""
        return [turn for turn, message in enumerate(self.messages) if message["role"] == "assistant"]

    def answer(self, turn: int, positions: TokenPositions) -> Span:
        """Returns the tokens of an answer, with its end-of-turn tokens."""
        return positions.at(self._start_of_answer(turn), turn), self.end_of_turn(turn, positions)

    def _turn(self, turn: int) -> Turn:
        """Returns what is remembered of the beginning of such a turn, where contents are found."""
        if self.spans is None:
            return Turn()
        is_last = turn == len(self.messages) - 1
        key = (*self._kinds[max(turn - 1, 0) : turn + 1], turn < 2, is_last, *self._around[turn])
        return self._turns.setdefault(key, Turn())

    def start_of_turn(self, turn: int) -> int:
        """Returns its first character. Raises `ValueError` as `text_before` does."""
        if turn in (0, len(self.messages)):
            return len(self.text) if turn else 0
        known = self._turn(turn)
        _, end = self.spans[turn - 1] if self.spans else (0, 0)
        start, has_content = self.spans[turn] if self.spans else (0, 0)
        found = set()
        if end and known.tail is not None and self.text.startswith(known.tail, end):
            found.add(end + len(known.tail))
        if has_content and known.head is not None and self.text.endswith(known.head, 0, start):
            found.add(start - len(known.head))
        if len(found) == 1:
            return found.pop()
        character = len(self.text_before(turn))
        if end and end <= character:
            known.tail = self.text[end:character]
        if has_content and character <= start:
            known.head = self.text[character:start]
        return character

    def _start_of_answer(self, turn: int) -> int:
        before, known = self.start_of_turn(turn), self._turn(turn)
        if known.opening is not None and self.text.startswith(known.opening, before):
            return before + len(known.opening)
        turns = self.messages[:turn]
        prompt = self.render(turns, add_generation_prompt=True) if turns else ""
        start = len(prompt)
        # Thinking belongs to the answer, also where the generation prompt opens it, as in TRL's training templates
        opening = prompt.find("<think>", before)
        if opening >= 0:
            start = min(opening, common_prefix_length([*prompt], [*self.text]))
        elif len(prompt) == before or not self.text.startswith(prompt):
            # No generation prompt, or one that is not this turn's header: what the template puts before any answer
            start = common_prefix_length([*self.text], [*self.render([*turns, self._plain_answer(turn)])])
            if not self.text[before:start].strip():  # a mere space belongs to the answer, as in TRL's templates
                start = before
        if before <= start:
            known.opening = self.text[before:start]
        return start

    def text_before(self, turn: int) -> str:
        """Returns the rendering of the turns before. Raises `ValueError` unless the whole begins with it."""
        if turn == 0:
            return ""
        text = self.render(self.messages[:turn])
        # Some templates end every rendering with the EOS token (Phi-3), or the last turn (gpt-oss)
        before = text.removesuffix(self._tokens.tokenizer.eos_token or "")
        if not self.text.startswith(before):
            raise ValueError(
                f"the chat template renders turn {turn - 1} ({self.messages[turn - 1]['role']}) differently when other "
                "turns follow, as templates of thinking models do, so the completion cannot be told from the prompt. "
                "Set `chat_template_path` to a template that keeps earlier turns as they are, or that marks the "
                "assistant's turns with `{% generation %}`; or make a prompt/completion row of each answer."
            )
        return text if self.text.startswith(text) else before

    def end_of_turn(self, turn: int, positions: TokenPositions) -> int:
        """Returns the token after it. One that merges its end with the next turn belongs to the next."""
        end = positions.at(self.start_of_turn(turn + 1), turn + 1)
        # An answer may end in a special token that follows it, as it has no end-of-turn token itself
        is_answer = self.messages[turn]["role"] == "assistant"
        return end + (is_answer and positions.is_added(end) and self._ends_in_next(turn))

    def _ends_in_next(self, turn: int) -> bool:
        known = self._turn(turn + 1)
        if known.ends_in_next is None:
            answer = self.render([*self.messages[:turn], self._plain_answer(turn)])
            if not self.text.startswith(self.render(self.messages[: turn + 1])):  # it ends in the EOS token, as above
                answer = answer.removesuffix(self._tokens.tokenizer.eos_token or "")
            known.ends_in_next = answer.rstrip().endswith(_PROBE)
        return known.ends_in_next

    def _plain_answer(self, turn: int) -> dict[str, Any]:
        """Returns an answer in the place of the turn, without its thinking and tool calls, which may come first."""
        in_parts = isinstance(self.messages[turn].get("content"), list)
        return {"role": "assistant", "content": [{"type": "text", "text": _PROBE}] if in_parts else _PROBE}

    def positions(self, input_ids: list[int]) -> TokenPositions:
        """Returns what tells the token of a character."""
        return TokenPositions(self.text, input_ids, self._tokens, self._tokenize_beginning)

    def _tokenize_beginning(self, character: int, turns: int) -> list[int]:
        """Returns the tokens of the text up to a character, in which the images of this number of turns are."""
        text = self.text[:character]
        if not isinstance(self._processing_class, ProcessorMixin):
            return self._tokens.of(text)
        messages = prepare_multimodal_messages(self.messages[:turns])
        images = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
        kwargs = {key: value for key, value in self.template_kwargs.items() if key == "return_tensors"}
        kwargs |= self.template_kwargs.get("processor_kwargs", {})
        if text.startswith(self._tokens.tokenizer.bos_token or "\0"):
            kwargs["add_special_tokens"] = False
        input_ids = self._processing_class(text=[text], images=[images] if images else None, **kwargs)["input_ids"]
        return [int(token) for token in input_ids[0]]

    @functools.cached_property
    def _around(self) -> list[tuple[frozenset, frozenset]]:
        """
        The kinds of the messages before each turn and from it on. Templates of thinking models drop what was thought
        before the last question.
        """
        none: frozenset[tuple] = frozenset()
        before, after = (
            [*itertools.accumulate(kinds, lambda known, kind: known | {kind}, initial=none)]
            for kinds in (self._kinds, self._kinds[::-1])
        )
        return [*zip(before[:-1], after[:0:-1], strict=True)]
