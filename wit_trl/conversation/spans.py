"""
What lies inside the assistant's turns: thinking, tool calls, the answer itself, and what ends the turn.

An answer of a probe shows what the template writes around thinking and text. With it, what the template wrote is read
from both ends: thinking first, the end of the turn last, and calls are what is left beside the text.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from .messages import THINKING, missing_end
from .parts import Span, thinking_in, thinking_of, variants
from .template_memory import Frame
from .tool_calls import calls_of
from .turns import Conversation


_PROBES = ("\ue000", "\ue001")  # of private use, so that no text has them
_REMEDY = "Choose another template (`chat_template_path`), or leave `span_loss_weights` unset"


class TurnSpan(NamedTuple):
    """A span of a turn, in characters of the conversation."""

    name: str
    start: int
    end: int


def spans_of_turn(conversation: Conversation, turn: int) -> tuple[list[TurnSpan], bool]:
    """
    Returns the spans of a turn of the assistant, and whether the template left out its thinking.

    Raises:
        `ValueError`: the template does not let them be told apart.
    """
    if conversation.contents is None:
        raise ValueError(f"the chat template changes what messages say, so spans cannot be found. {_REMEDY}.")
    start, end = conversation.start_of_answer(turn), conversation.start_of_turn(turn + 1)
    text, message = conversation.text, conversation.messages[turn]
    texts = [content for content in conversation.contents[turn] if not content.is_thinking]
    text_start, text_end = (texts[0].start, texts[-1].end) if texts else (0, 0)
    if texts and not start <= text_start <= text_end <= end:
        raise ValueError(f"the chat template writes the text of turn {turn} outside of the turn. {_REMEDY}.")
    spans, left_out = [], turn in conversation.without_thinking
    thinking, calls = thinking_of(message), calls_of(message)
    position, ending = start, text_end or start
    if thinking or calls or not texts:
        frame = _frame(conversation, turn)
        if thinking:
            found = _end_of_thinking(text, start, thinking, frame)
            if found is None and missing_end([thinking], text[start : text_start if texts else end]) is None:
                raise ValueError(f"where the thinking of turn {turn} ends cannot be told. {_REMEDY}.")
            left_out, position = found is None, found or start
            if found:
                spans.append(TurnSpan("thinking", start, position))
        if calls or not texts:  # else all that follows the text ends the turn
            ending = end - len(frame.after_text) if text.endswith(frame.after_text, position, end) else end
        if calls:
            spans.append(TurnSpan("tool_calls", *_calls(text, position, ending, text_start, text_end, frame)))
    if thinking_in(message.get("content")) and not left_out:
        inside = [content.start for content in conversation.contents[turn] if content.is_thinking]
        first, end_of_it = text.rfind("<think>", start, (inside or [text_start or ending])[0]), text_start or ending
        if first >= 0:  # with its tags, and with the whitespace that a template writes after it
            spans.append(TurnSpan("thinking", first, end_of_it))
    if texts:
        if "</think>" in text[text_start:text_end]:
            raise ValueError(
                f"turn {turn} has `</think>` inside its answer, so its thinking cannot be told. Put it first in the "
                "`content`, between `<think>` and `</think>`, or into `reasoning_content`."
            )
        spans.append(TurnSpan("answer", text_start, text_end))
    return [*spans, TurnSpan("end_of_turn", ending, end)], left_out


def _end_of_thinking(text: str, start: int, thinking: str, frame: Frame) -> int | None:
    """Returns the character after it and its tags. `None` if it is not there."""
    if frame.before_thinking is None or not text.startswith(frame.before_thinking, start):
        return None
    start += len(frame.before_thinking)
    for variant in variants(thinking):
        if text.startswith(variant + frame.after_thinking, start):
            return start + len(variant + frame.after_thinking)
    return None


def _calls(text: str, start: int, end: int, text_start: int, text_end: int, frame: Frame) -> tuple[int, int]:
    """Returns the calls, which follow the text or precede it."""
    if text_end and text[text_end:end].strip():
        return text_end, end
    if text.startswith(frame.before_text, start):
        start += len(frame.before_text)
    return start, text_start if text_end else end


def _frame(conversation: Conversation, turn: int) -> Frame:
    """Returns what the template writes around an answer of probes in the place of a turn."""
    message = conversation.messages[turn]
    keys = [key for key in THINKING if isinstance(message.get(key), str) and message[key].strip()]
    blank = {key: message[key] for key in THINKING if key in message and key not in keys}
    known, key = conversation.frames, (*blank, *conversation.kind_of_turn(turn))
    if key not in known:
        text_probe, thinking_probe = _PROBES
        answer = conversation.plain_answer(turn, text_probe) | blank
        before_text, found, after_text = _render_answer(conversation, turn, answer).partition(text_probe)
        if not found:
            raise ValueError(f"the chat template leaves out the text of turn {turn}. {_REMEDY}.")
        before_thinking, after_thinking = None, ""
        if keys:
            written = _render_answer(conversation, turn, {**answer, **dict.fromkeys(keys, thinking_probe)})
            before, found, after = written.partition(thinking_probe)
            following = before_text
            if found:
                after = after.partition(text_probe)[0]
            elif calls_of(message):  # some templates write it only before calls
                of_turn = {**message, **dict.fromkeys(keys, thinking_probe)}
                before, found, after = _render_answer(conversation, turn, of_turn).partition(thinking_probe)
                following = _render_answer(conversation, turn, {**of_turn, **dict.fromkeys(keys)})
            if found:
                before_thinking, after_thinking = before, after.removesuffix(following)
        known[key] = Frame(before_thinking, after_thinking, before_text, after_text)
    return known[key]


def _render_answer(conversation: Conversation, turn: int, answer: dict[str, Any]) -> str:
    """Returns what follows the header of an answer that is in the place of a turn, and the last one."""
    start, rendered = conversation.start_of_answer(turn), conversation.render([*conversation.messages[:turn], answer])
    if not rendered.startswith(conversation.text[:start]):
        raise ValueError(f"the chat template renders the turns before turn {turn} differently when others follow.")
    return rendered[start:]


def contents_of(conversation: Conversation, turn: int) -> list[Span]:
    """Returns the characters of each content of a turn, which may be one of several parts."""
    found = [content[:2] for content in (conversation.contents or [])[turn]]
    content = conversation.messages[turn].get("content")
    if isinstance(content, list) or not found:
        return found
    start = found[0][0]
    if (inside := thinking_in(content)) and inside[1].strip():  # from its tag on
        start = max(conversation.text.rfind("<think>", 0, start), 0)
    return [(start, found[-1][1])]


def weighed_characters(conversation: Conversation) -> Iterator[tuple[int, int, int, float]]:
    """
    Yields the turn, the characters and the weight of each part of the contents that have weights.

    Raises:
        `ValueError`: the template changes what a turn says.
    """
    for turn, weights in conversation.part_weights.items():
        written = [] if conversation.contents is None else contents_of(conversation, turn)
        content = conversation.messages[turn].get("content")
        if isinstance(content, str) and not content.strip():
            continue
        if isinstance(content, str) and written:  # all of them are in one text, which may be trimmed
            start, end = written[0]
            trimmed = content.find(conversation.text[start:end])
            ends = [*itertools.accumulate((length for length, _ in weights), initial=start - trimmed)]
            inside = [min(max(position, start), end) for position in ends]
            written = [*itertools.pairwise(inside)] if trimmed >= 0 else []
        if len(written) != len(weights):
            raise ValueError(
                f"the chat template changes what turn {turn} says, so its parts cannot have a `weight`. Choose another "
                "template (`chat_template_path`), or weigh the message."
            )
        yield from ((turn, *span, weight) for span, (_, weight) in zip(written, weights, strict=True))
