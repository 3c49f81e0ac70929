"""
What each turn says (its texts, thinking and tool calls), and where a chat template writes it.

1. `find_contents` returns which characters of the rendered text each text of a content is. The conversation is
   rendered once more with a probe in the place of each text. This shows what the template writes around them. It is
   remembered, so that most conversations need no probes. The texts and what is written around them must make the real
   rendering again, character for character.
2. `parts` lists what stands beside contents. A template may leave it out without an error, which shows where the
   conversation without it is rendered the same.
"""

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from .chat_template import TOOLS_REMEDY
from .messages import THINKING, Messages, message_texts, missing_end
from .tool_calls import calls_of, function_of


# Around the number of a text: the first pair that the conversation has not. Python's form of a list escapes the last
_PAIRS = (("\u2e22", "\u2e23"), ("\u2e24", "\u2e25"), ("\ue000", "\ue001"))

_THINKING = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)

Span = tuple[int, int]

_ONE_CALL = "Make a turn of each call, choose a template that writes all (`chat_template_path`), or remove such rows"
_NO_THINKING = "Choose a template that renders it (`chat_template_path`), or take the turn out of the data"


class Content(NamedTuple):
    """Where a text of a turn is in the rendered conversation."""

    start: int
    end: int
    is_thinking: bool = False  # whether it stood between `<think>` and `</think>`


def find_contents(
    text: str,
    messages: Messages,
    kinds: list[tuple],  # of the messages: what decides about what is written around them
    known: dict[tuple, str],  # what is written before, between and after texts; it grows
    render: Callable[[Messages], str],
    in_parts: bool,  # whether it renders contents of several parts
) -> tuple[list[list[Content]] | None, set[int]]:
    """
    Returns where the texts of each turn are, and the turns of which a text is not rendered. It is not known where texts
    are (`None`) if the template changes what messages say.

    Raises:
        `ValueError`: the template prints contents of several parts as they stand.
    """
    texts = _texts(messages)
    keys = [*_keys(texts, kinds)]
    with contextlib.suppress(KeyError):
        contents = _match(text, texts, [known[key] for key in keys], len(messages))
        if contents is not None:
            return contents, set()
    before, after = next((pair for pair in _PAIRS if pair[0] not in text), _PAIRS[0])
    probes = (f"{before}{number}{after}" for number in itertools.count())
    try:
        rendered = render([_with_probes(message, probes) for message in messages])
    except ValueError:  # the template takes no such content
        return None, {*range(len(messages))}
    pieces = re.split(f"{before}(\\d+){after}", rendered)
    written, order = pieces[::2], [int(number) for number in pieces[1::2]]
    if in_parts and any(each.endswith(("'text': '", '"text": "')) for each in written):
        raise ValueError(
            "the chat template prints a `content` of several parts as it stands. Make every `content` a text, or "
            "choose another template (`chat_template_path`)."
        )
    contents = None
    if order == [*range(len(texts))]:  # each of them once
        contents = _match(text, texts, written, len(messages))
    if contents is not None:
        known.update(zip(keys, written, strict=True))
    return contents, {turn for number, (turn, *_) in enumerate(texts) if number not in order}


def thinking_in(content: Any) -> re.Match[str] | None:
    """Returns the thinking with which a content begins, and what follows it."""
    return _THINKING.match(content) if isinstance(content, str) else None


def _texts(messages: Messages) -> list[tuple[int, str, bool]]:
    """
    Returns each text with its turn, and whether it is thinking inside a content. A blank content is none: templates may
    omit it.
    """
    texts = []
    for turn, message in enumerate(messages):
        content = message.get("content")
        found = thinking_in(content)
        pairs = [(found[1], True), (found[2], False)] if found else [(text, False) for text in message_texts(message)]
        texts += [(turn, text, kind) for text, kind in pairs if text.strip() or isinstance(content, list)]
    return texts


def _with_probes(message: dict[str, Any], probes: Iterator[str]) -> dict[str, Any]:
    """Returns the message with a probe in the place of each of its `_texts`."""
    content = message.get("content") or ""
    if found := thinking_in(content):
        thinking, answer = (next(probes) if text.strip() else text for text in found.groups())
        return {**message, "content": f"{content[: found.start(1)]}{thinking}</think>{answer}"}
    if isinstance(content, str):
        return {**message, "content": next(probes)} if content.strip() else message
    return {**message, "content": [{**p, "text": next(probes)} if p["type"] == "text" else p for p in content]}


def _keys(texts: list[tuple[int, str, bool]], kinds: list[tuple]) -> Iterator[tuple]:
    """Yields what decides about what is written before the first text, between two texts, and after the last one."""
    number_in_turn = 0
    for before, after in itertools.pairwise([None, *(turn for turn, *_ in texts), None]):
        number_in_turn = number_in_turn + 1 if before == after else 0
        yield before in (None, 0), after is None, number_in_turn, *kinds[before : None if after is None else after + 1]


def _match(text: str, texts: list[tuple[int, str, bool]], written: list[str], turns: int) -> list[list[Content]] | None:
    """
    Returns where the texts of each turn are. `None` if the texts and what is `written` around them do not make the
    `text`.
    """
    position = len(written[0])
    if not text.startswith(written[0]):
        return None
    contents: list[list[Content]] = [[] for _ in range(turns)]
    for (turn, content, is_thinking), following in zip(texts, written[1:], strict=True):
        for variant in variants(content):
            if text.startswith(variant + following, position):
                break
        else:
            return None
        contents[turn].append(Content(position, position + len(variant), is_thinking))
        position += len(variant + following)
    return contents if position == len(text) else None


def variants(content: str) -> Iterator[str]:
    """Yields what templates make of a content: they keep it, trim it, trim its line breaks, or write it as JSON."""
    yield content
    for characters in (None, "\n"):
        yield content.strip(characters)
        yield content.lstrip(characters)
        yield content.rstrip(characters)
    yield json.dumps(content, ensure_ascii=False)[1:-1]


def thinking_of(message: dict[str, Any]) -> str | None:
    """Returns what is thought before an answer, `None` for nothing."""
    return next((said for key in THINKING if isinstance(said := message.get(key), str) and said.strip()), None)


def thinks(message: dict[str, Any]) -> bool:
    """Whether it has thinking, which may be in its content."""
    found = thinking_in(message.get("content"))
    return thinking_of(message) is not None or (found is not None and bool(found[1].strip()))


def as_written(messages: Messages, text: str, last_round_only: bool) -> Messages:
    """
    Returns messages without what is not in the text: what is said beside calls, and thinking, which has a key of its
    own or stands in a content. Some templates leave its tags. With `last_round_only`, all thinking before the last
    question goes, and that of no characters.
    """
    read = []
    last_question = max((turn for turn, message in enumerate(messages) if message["role"] == "user"), default=0)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            if calls_of(message) and missing_end(message_texts(message), text) is not None:
                message = {**message, "content": ""}
            found = thinking_in(message.get("content"))
            keys = [key for key in THINKING if isinstance(message.get(key), str)]
            said = [found[1] if found else "", *(message[key] for key in keys)]
            is_blank = not "".join(said).strip()
            goes = last_round_only and turn < last_question and not is_blank
            if goes or missing_end(said, text) is not None:
                message = {key: value for key, value in message.items() if key not in keys}
                if isinstance(content := message.get("content") or "", str):
                    answer = found[2] if found else content
                    tags = "<think></think>\n" if answer.strip() else "<think></think>"
                    message["content"] = (tags if tags + answer.strip() in text else "") + answer
            elif last_round_only and is_blank:
                message = {key: value for key, value in message.items() if key not in keys}
        read.append(message)
    return read


class Part(NamedTuple):
    """A tool call, the thinking before an answer, or the content beside calls."""

    turn: int
    key: tuple  # tells it from the other parts of its turn
    without: dict[str, Any]  # the message without it
    name: str
    remedy: str = ""  # what to do where a template leaves it out; none where the template may


def parts(messages: Messages) -> Iterator[Part]:
    """
    Yields what a template has to write, each part once. Thinking before the last question is not among them: templates
    leave it out on purpose.
    """
    last_question = max((turn for turn, message in enumerate(messages) if message["role"] == "user"), default=0)
    for turn, message in enumerate(messages):
        calls, has_text = calls_of(message), any(message_texts(message))
        content = message.get("content") or ""
        for number, call in enumerate(calls):
            name, remedy = "the tool calls of the assistant", f"{TOOLS_REMEDY}, or remove such rows"
            if number:
                function, remedy = function_of(call).get("name"), _ONE_CALL
                name = f"the call of `{function}`, number {number} of the tool calls in turn {turn}"
            others = [*calls[:number], *calls[number + 1 :]]
            without = {**message, "tool_calls": others or None, "content": content}
            yield Part(turn, ("call", number, len(calls)), without, name, remedy)
        if calls and has_text:
            without = {**message, "content": ""}
            yield Part(turn, ("content", len(calls)), without, "what is said beside tool calls")
        if any(map(message.get, THINKING)):
            without = {key: value for key, value in message.items() if key not in THINKING} | {"content": content}
            key = ("thinking", len(calls))
            if not calls and not has_text:
                name = f"turn {turn} ({message['role']}), which has thinking alone"
                yield Part(turn, key, without, name, _NO_THINKING)
            elif turn > last_question:
                yield Part(turn, key, without, "what an assistant thinks before its last answer")
