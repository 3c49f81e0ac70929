"""What a message has beside its content, which a chat template may leave out without an error."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from .messages import THINKING, Messages, message_texts
from .tool_calls import calls_of, function_of


class Part(NamedTuple):
    """A tool call, the thinking before an answer, or the content beside calls."""

    turn: int
    kind: str  # `"call"`, `"thinking"` or `"content"`
    number: int  # of a call in its turn
    name: str  # what messages call it
    without: dict[str, Any]  # the message without it


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
            name = f"the call of `{function_of(call).get('name')}`"
            others = [*calls[:number], *calls[number + 1 :]]
            yield Part(turn, "call", number, name, {**message, "tool_calls": others or None, "content": content})
        if calls and has_text:
            yield Part(turn, "content", 0, "what is said beside tool calls", {**message, "content": ""})
        if any(map(message.get, THINKING)) and (turn > last_question or not (calls or has_text)):
            name = "what an assistant thinks before its last answer"
            without = {key: value for key, value in message.items() if key not in THINKING}
            yield Part(turn, "thinking", 0, name, {**without, "content": content})
