"""
A conversation: its text as a chat template renders it, and which tokens of it belong to which turn.

1. The whole conversation is rendered, with the arguments of tool calls in the form that the template wants.
2. `find_contents` finds the characters of each content. Nothing may be left out: tool calls, thinking and tools count
   as rendered if the text without them is another one.
3. Where a turn starts follows from what the template writes before it, else from the rendering of the turns before.
4. `TokenPositions` tells the token of a character.
"""

import functools
import itertools
from typing import Any

from transformers import ProcessorMixin
from transformers.utils import logging
from trl.data_utils import prepare_multimodal_messages

from .._upstream import common_prefix_length, tokenize_messages
from .chat_template import TOOLS_REMEDY, ProcessingClass
from .messages import Messages, message_texts, missing_end
from .parts import Span, as_written, find_contents, parts, thinks
from .template_memory import TemplateMemory, Turn, kind_of
from .text_parts import join_parts, part_weights, without_weights
from .token_positions import TokenPositions
from .tool_calls import calls_of, read_tools, render_calls


logger = logging.get_logger(__name__)

_PROBE = "\ue000"  # of private use, so that no text has it


class Conversation:
    """
    The messages of a conversation, its text, where each content is in it, and what each turn adds to it.

    Where a template does not mark the assistant's turns, they are found by rendering. A turn is what it adds to the
    rendering of the turns before it. The assistant's answer begins after the generation prompt. With a `memory`, a
    template needs this once for each two roles that follow each other.

    Raises:
        `ValueError`: the template cannot render the conversation, or leaves out a part of it.
    """

    def __init__(
        self,
        messages: Messages,
        processing_class: ProcessingClass,
        chat_template: str | None,  # by default the own one
        row: dict[str, Any],  # its `"tools"` (a list or JSON) and `"chat_template_kwargs"` go to the template
        memory: TemplateMemory | None = None,  # what other conversations told of the template
    ):
        self._processing_class = processing_class
        template_kwargs = row.get("chat_template_kwargs")
        if not isinstance(template_kwargs, dict | None):
            raise ValueError(f"`chat_template_kwargs` must be a dict, but is {template_kwargs!r}.")
        tools = read_tools(row.get("tools"))
        self.template_kwargs = {"chat_template": chat_template, "tools": tools, **(template_kwargs or {})}
        self.completion_turns: str | None = row.get("completion_turns")  # of this row
        self._memory = memory = memory or TemplateMemory(processing_class)
        self._tokens = memory.tokens
        self._known = memory.of(self.template_kwargs)
        self.messages = messages  # `render` reads their number
        self.part_weights = {turn: found for turn, m in enumerate(messages) if (found := part_weights(m))}
        if not isinstance(processing_class, ProcessorMixin):  # which writes parts
            messages = join_parts(messages, self._known, self.render)
        self.messages, self.text = render_calls(without_weights(messages), self.render)
        self.frames = self._known.frames
        self._kinds = [kind_of(message) for message in self.messages]
        self.without_thinking: set[int] = set()  # turns whose thinking the template leaves out, as far as read
        self._check_parts()
        missing = self._find_contents()
        if self.contents is None and self._read_as_written():
            missing = self._find_contents()
        for turn in sorted(missing):
            self._check_is_rendered(turn)

    def _find_contents(self) -> set[int]:
        """Finds the texts. Returns the turns of which one is not rendered."""
        lists = (isinstance(message.get("content"), list) for message in self.messages)
        in_parts = isinstance(self._processing_class, ProcessorMixin) or any(lists)  # `render` makes parts for it
        # The characters of the texts of each turn; `None` where the template changes what messages say
        known = self._known.written
        self.contents, missing = find_contents(self.text, self.messages, self._kinds, known, self.render, in_parts)
        # From the first to the last of them, (0, 0) if a turn has none
        self.spans: list[Span] | None = None
        if self.contents is not None:
            self.spans = [(texts[0].start, texts[-1].end) if texts else (0, 0) for texts in self.contents]
        return missing

    def _read_as_written(self) -> bool:
        """Takes as messages what the template writes of them. Returns whether they are others now."""
        candidates = (as_written(self.messages, self.text, last_round_only) for last_round_only in (False, True))
        messages = next((each for each in candidates if each != self.messages and self._renders_the_same(each)), None)
        if messages is None:
            return False
        pairs = zip(self.messages, messages, strict=True)
        self.without_thinking |= {turn for turn, (was, now) in enumerate(pairs) if thinks(was) > thinks(now)}
        self.messages = messages
        self._kinds = [kind_of(message) for message in messages]
        vars(self).pop("_around", None)
        return True

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
            if any(message.get("content") is None for message in messages):
                remedy = f". {TOOLS_REMEDY}, or give each message that has only `tool_calls` an empty `content`"
            raise ValueError(f"the chat template cannot render {what}: {error}{remedy}") from error

    def tokenize(self, **kwargs: Any) -> dict[str, list[int]]:
        """Returns `"input_ids"` and, with `return_assistant_tokens_mask=True`, the template's `"assistant_masks"`."""
        return tokenize_messages(self._processing_class, self.messages, **{**self.template_kwargs, **kwargs})

    def _check_parts(self) -> None:
        """Checks what stands beside contents. A template that leaves it out raises no error."""
        complete, last = self._known.complete, len(self.messages) - 1
        for part in parts(self.messages):
            key: tuple = (part.key, self._kinds[part.turn], *self._around[part.turn], part.turn == last)
            if key not in complete and self._renders_the_same_with(part.without, part.turn):
                if part.remedy:
                    raise ValueError(f"the chat template leaves out {part.name}. {part.remedy}.")
                logger.warning_once(f"The chat template leaves out {part.name}: it is not trained.")
            complete.add(key)
        key = ("tools", self._kinds[0])
        if self.template_kwargs["tools"] and key not in complete:
            if self._renders_the_same(self.messages, tools=None):
                raise ValueError(f"the chat template leaves out the `tools`. {TOOLS_REMEDY}, or remove the column.")
            complete.add(key)

    def _check_is_rendered(self, turn: int) -> None:
        message = self.messages[turn]
        texts = message_texts(message)
        left_out = missing_end(texts, self.text)
        if left_out is None and any(texts) and self._renders_the_same_with({**message, "content": ""}, turn):
            left_out = texts[-1][-20:]  # what stands in the text is of another turn
        # Some templates (gpt-oss) leave out what is said beside a tool call
        if left_out is not None and not calls_of(message):
            raise ValueError(
                f"the chat template leaves out turn {turn} ({message['role']}), which ends in {left_out!r}. Choose "
                "a template that renders all of the conversation (`chat_template_path`), name the role as the "
                "template does, or take the turn out of the data."
            )

    def _renders_the_same_with(self, message: dict[str, Any], turn: int) -> bool:
        return self._renders_the_same([*self.messages[:turn], message, *self.messages[turn + 1 :]])

    def _renders_the_same(self, messages: Messages, **kwargs: Any) -> bool:
        try:
            return self.render(messages, **kwargs) == self.text
        except ValueError:  # it misses something
            return False

    @functools.cached_property
    def _around(self) -> list[tuple[frozenset, frozenset]]:
        """The kinds of the messages before and from each turn: templates drop thinking before the last question."""
        none: frozenset[tuple] = frozenset()
        before, after = (
            [*itertools.accumulate(kinds, lambda known, kind: known | {kind}, initial=none)]
            for kinds in (self._kinds, self._kinds[::-1])
        )
        return [*zip(before[:-1], after[:0:-1], strict=True)]

    def assistant_masks(self, input_ids: list[int], answers: list[int] | None = None) -> list[int]:
        """Returns 1 for the tokens of all answers, or of these, with their end-of-turn tokens, else 0."""
        masks = [0] * len(input_ids)
        positions = self.positions(input_ids)
        for turn in self.answers() if answers is None else answers:
            start, end = self.answer(turn, positions)
            masks[start:end] = [1] * (end - start)
        return masks

    def without_tools(self) -> "Conversation":
        """Returns the conversation as it is rendered without `tools`."""
        row = {"chat_template_kwargs": {**self.template_kwargs, "tools": None}}
        return Conversation(self.messages, self._processing_class, None, row, self._memory)

    def render_prompt(self, number_of_turns: int) -> str:
        """
        Returns the first turns, rendered with the generation prompt. Raises `ValueError` where TRL would count the end
        of this prompt as completion.
        """
        rendered = self.render(self.messages[:number_of_turns], add_generation_prompt=True)
        if not self.text.startswith(rendered):
            self._text_before(number_of_turns)
        return rendered

    def answers(self) -> list[int]:
        """Returns the turns of the assistant."""
        return [turn for turn, message in enumerate(self.messages) if message["role"] == "assistant"]

    def answer(self, turn: int, positions: TokenPositions) -> Span:
        """Returns the tokens of an answer, with its end-of-turn tokens."""
        return positions.at(self.start_of_answer(turn), turn), self.end_of_turn(turn, positions)

    def _turn(self, turn: int) -> Turn:
        """Returns what is remembered of the beginning of such a turn. Nothing is where contents are not found."""
        if self.spans is None:
            return Turn()
        is_last = turn == len(self.messages) - 1
        key = (*self._kinds[max(turn - 1, 0) : turn + 1], turn < 2, is_last, *self._around[turn])
        return self._known.turns.setdefault(key, Turn())

    def start_of_turn(self, turn: int) -> int:
        """Returns its first character. Raises `ValueError` as `_text_before` does."""
        if turn == 0:
            return 0
        if turn == len(self.messages):
            return len(self.text)
        if self.spans is None:
            return len(self._text_before(turn))
        known, (_, end), (start, has_content) = self._turn(turn), self.spans[turn - 1], self.spans[turn]
        found = set()
        if end and known.tail is not None and self.text.startswith(known.tail, end):
            found.add(end + len(known.tail))
        if has_content and known.head is not None and self.text.endswith(known.head, 0, start):
            found.add(start - len(known.head))
        if len(found) == 1:
            return found.pop()
        character = len(self._text_before(turn))
        if end and end <= character:
            known.tail = self.text[end:character]
        if has_content and character <= start:
            known.head = self.text[character:start]
        return character

    def start_of_answer(self, turn: int) -> int:
        """Returns the first character of an answer, after its header. Raises `ValueError` as `_text_before` does."""
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
            start = common_prefix_length([*self.text], [*self.render([*turns, self.plain_answer(turn)])])
            if not self.text[before:start].strip():  # a mere space belongs to the answer, as in TRL's templates
                start = before
        if before <= start:
            known.opening = self.text[before:start]
        return start

    def _text_before(self, turn: int) -> str:
        """Returns the rendering of the turns before. Raises `ValueError` unless the whole begins with it."""
        text = self.render(self.messages[:turn])
        # Some templates end every rendering with the EOS token (Phi-3), or the last turn (gpt-oss)
        before = text.removesuffix(self._tokens.tokenizer.eos_token or "")
        if not self.text.startswith(before):
            if self._read_as_written():
                return self._text_before(turn)
            raise ValueError(
                f"the chat template renders turn {turn - 1} ({self.messages[turn - 1]['role']}) differently when other "
                "turns follow, as templates of thinking models do, so the completion cannot be told from the prompt. "
                "Set `chat_template_path` to a template that keeps earlier turns as they are, or that marks the "
                "assistant's turns with `{% generation %}`; or make a prompt/completion row of each answer."
            )
        return text if self.text.startswith(text) else before

    def end_of_turn(self, turn: int, positions: TokenPositions) -> int:
        """Returns the position after its last token. A token that merges its end with the next turn is the next's."""
        end = positions.at(self.start_of_turn(turn + 1), turn + 1)
        # Some answers end in the special token that begins the next turn, as they have no end-of-turn token (GLM-4)
        is_answer = self.messages[turn]["role"] == "assistant"
        return end + (is_answer and positions.is_added(end) and self._ends_in_next(turn))

    def _ends_in_next(self, turn: int) -> bool:
        known = self._turn(turn + 1)
        if known.ends_in_next is None:
            answer = self.render([*self.messages[:turn], self.plain_answer(turn)])
            if not self.text.startswith(self.render(self.messages[: turn + 1])):
                if self._read_as_written():  # the template leaves out thinking
                    return self._ends_in_next(turn)
                # It ends in the EOS token, as above
                answer = answer.removesuffix(self._tokens.tokenizer.eos_token or "")
            known.ends_in_next = answer.rstrip().endswith(_PROBE)
        return known.ends_in_next

    def kind_of_turn(self, turn: int) -> tuple:
        """Returns what decides about what a template writes in a turn, besides its texts and calls."""
        is_last = turn == len(self.messages) - 1
        return *self._kinds[max(turn - 1, 0) : turn + 2], turn < 2, is_last, *self._around[turn]

    def plain_answer(self, turn: int, text: str = _PROBE) -> dict[str, Any]:
        """Returns an answer for the place of the turn, without its thinking and tool calls, which may come first."""
        in_parts = isinstance(self.messages[turn].get("content"), list)
        return {"role": "assistant", "content": [{"type": "text", "text": text}] if in_parts else text}

    def positions(self, input_ids: list[int]) -> TokenPositions:
        """Returns what tells the token of a character."""
        return TokenPositions(self.text, input_ids, self._tokens, self._tokenize_beginning)

    def _tokenize_beginning(self, character: int, turns: int) -> list[int]:
        """Returns the tokens of the text up to a character, with the images of this number of turns."""
        text = self.text[:character]
        if not isinstance(self._processing_class, ProcessorMixin):
            return self._tokens.of(text)
        messages = prepare_multimodal_messages(self.messages[:turns])
        images = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
        kwargs = {"return_tensors": "pt", **self.template_kwargs.get("processor_kwargs", {})}
        if text.startswith(self._tokens.tokenizer.bos_token or "\0"):
            kwargs["add_special_tokens"] = False
        input_ids = self._processing_class(text=[text], images=[images] if images else None, **kwargs)["input_ids"]
        return input_ids[0].tolist()
