"""
Which tokens of a rendered conversation belong to which turn.

1. Where a turn starts follows from what the template writes before it, else from the rendering of the turns before.
2. `TokenPositions` tells the token of a character.
"""

from typing import Any

from transformers import ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from .._upstream import common_prefix_length
from .parts import Span
from .rendering import RenderedConversation
from .template_memory import Turn
from .token_positions import TokenPositions


_PROBE = "\ue000"  # of private use, so that no text has it


class Conversation(RenderedConversation):
    """
    A conversation as the chat template renders it, and what each turn adds to it.

    Where a template does not mark the assistant's turns, they are found by rendering. A turn is what it adds to the
    rendering of the turns before it. The assistant's answer begins after the generation prompt. With a `memory`, a
    template needs this once for each two roles that follow each other.
    """

    def assistant_masks(self, input_ids: list[int], only_last: bool = False) -> list[int]:
        """Returns 1 for the tokens of all answers, or of the last one, with their end-of-turn tokens, else 0."""
        masks = [0] * len(input_ids)
        positions = self.positions(input_ids)
        for turn in self.answers()[-1:] if only_last else self.answers():
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
        return positions.at(self._start_of_answer(turn), turn), self.end_of_turn(turn, positions)

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

    def _text_before(self, turn: int) -> str:
        """Returns the rendering of the turns before. Raises `ValueError` unless the whole begins with it."""
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
        """Returns the position after its last token. A token that merges its end with the next turn is the next's."""
        end = positions.at(self.start_of_turn(turn + 1), turn + 1)
        # Some answers end in the special token that begins the next turn, as they have no end-of-turn token (GLM-4)
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
