"""Which characters of a rendered conversation each content became."""

import itertools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from .messages import Messages


# Around the number of a content: the first pair that no text has. Python's form of a list escapes unprintable ones
_PAIRS = (("\u2e22", "\u2e23"), ("\u2e24", "\u2e25"), ("\ue000", "\ue001"))

Span = tuple[int, int]


class ContentSpans:
    """
    Finds the contents of conversations in what a chat template makes of them.

    A conversation is rendered once more with a probe in the place of each content, which shows what the template writes
    around them. The pieces count only if together with the contents they make the real rendering again, character for
    character. What is written between two messages is remembered, so that most conversations need no probes.
    """

    def __init__(self) -> None:
        self._written: dict[tuple, str] = {}  # by the kinds of the messages before and after it

    def find(self, text: str, messages: Messages, kinds: list[tuple]) -> list[Span] | None:
        """
        Returns the span of each content, from the first to the last part that is a text, by what is remembered of
        messages of these `kinds`. An empty one for a message without text. `None` if it does not fit.
        """
        pieces = [piece for turn, message in enumerate(messages) for piece in _texts(turn, message)]
        try:
            written = [self._written[key] for key in _keys(pieces, kinds)]
        except KeyError:
            return None
        return _match(text, pieces, written, len(messages))

    def probe(
        self, text: str, messages: Messages, render: Callable[[Messages], str]
    ) -> tuple[list[Span] | None, set[int], list[str]]:
        """
        Returns the spans as `find` does; the turns of which a text is not rendered; and what is written before each
        text and after the last. It renders the conversation with probes, in which `render` may raise `ValueError`.
        """
        pieces = [piece for turn, message in enumerate(messages) for piece in _texts(turn, message)]
        before, after = next((pair for pair in _PAIRS if pair[0] not in text), _PAIRS[0])
        probes = (f"{before}{number}{after}" for number in itertools.count())
        rendered = re.split(f"{before}(\\d+){after}", render([_with_probes(message, probes) for message in messages]))
        written, order = rendered[::2], [int(number) for number in rendered[1::2]]
        missing = {turn for number, (turn, _) in enumerate(pieces) if number not in order}
        spans = None
        if order == [*range(len(pieces))]:  # each of them once
            spans = _match(text, pieces, written, len(messages))
        return spans, missing, written

    def remember(self, messages: Messages, kinds: list[tuple], written: list[str]) -> None:
        """Remembers what is written before, between and after the contents of messages of these kinds."""
        pieces = [piece for turn, message in enumerate(messages) for piece in _texts(turn, message)]
        self._written.update(zip(_keys(pieces, kinds), written, strict=True))


def _texts(turn: int, message: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """Yields the turn with its content, unless it is blank, which templates may take for none, or each text in it."""
    content = message.get("content") or ""
    if isinstance(content, list):
        yield from ((turn, part["text"]) for part in content if part["type"] == "text")
    elif content.strip():
        yield turn, content


def _with_probes(message: dict[str, Any], probes: Iterator[str]) -> dict[str, Any]:
    """Returns the message with a probe in the place of each text of `_texts`."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return {**message, "content": next(probes)} if content.strip() else message
    return {**message, "content": [{**p, "text": next(probes)} if p["type"] == "text" else p for p in content]}


def _keys(pieces: list[tuple[int, str]], kinds: list[tuple]) -> Iterator[tuple]:
    """Yields what decides about what is written before, between and after the pieces."""
    turns = [turn for turn, _ in pieces]
    number_in_turn = 0
    for before, after in itertools.pairwise([None, *turns, None]):
        number_in_turn = number_in_turn + 1 if before == after else 0
        yield before in (None, 0), after is None, number_in_turn, *kinds[before : None if after is None else after + 1]


def _match(text: str, pieces: list[tuple[int, str]], written: list[str], turns: int) -> list[Span] | None:
    """Returns the spans of the turns if the pieces, as they are or trimmed, make the text with what is written."""
    position = len(written[0])
    if not text.startswith(written[0]):
        return None
    spans: list[Span] = [(0, 0)] * turns
    for (turn, content), following in zip(pieces, written[1:], strict=True):
        for variant in _variants(content):
            end = position + len(variant)
            if text.startswith(variant, position) and text.startswith(following, end):
                break
        else:
            return None
        start = spans[turn][0] if spans[turn][1] else position
        spans[turn] = (start, end)
        position = end + len(following)
    return spans if position == len(text) else None


def _variants(content: str) -> Iterator[str]:
    """Yields what templates make of a content: nothing else, trimmed, trimmed of line breaks, or JSON."""
    yield content
    for characters in (None, "\n"):
        yield content.strip(characters)
        yield content.lstrip(characters)
        yield content.rstrip(characters)
    yield json.dumps(content, ensure_ascii=False)[1:-1]
