"""Tools and calls in the form that a chat template wants: `arguments` as an object, or as the JSON text of one."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from trl.trainer.utils import remove_none_values

from .messages import Messages


_PROBE = {"\ue000": "\ue001"}  # of private use, so that no text has them


def read_tools(tools: Any) -> list[Any] | None:
    """Returns the tools of a row, which may be JSON, as a list without the nulls that Arrow adds. `None` for none."""
    tools = _parse_json(tools or "[]", "`tools`") if isinstance(tools, str | None) else remove_none_values(tools)
    return [_parse_json(tool, "`tools`") for tool in tools or ()] or None


def arguments_as_objects(messages: Messages) -> Messages:
    """
    Returns messages in which the `arguments` of every call are an object. OpenAI's API has them as JSON text, of which
    most templates write a text once more.
    """
    return _convert_arguments(messages, _as_object)


def render_calls(messages: Messages, render: Callable[[Messages], str]) -> tuple[Messages, str]:
    """
    Returns messages with the `arguments` of every call in the form that a template wants, and their text. Most
    templates want an object. Some want JSON text (DeepSeek-V3): they raise an error, or write an object in Python's
    form. JSON text is that of the data, if this has one.
    """
    if not any(map(calls_of, messages)):
        return messages, render(messages)
    of_objects = arguments_as_objects(messages)
    try:
        text = render(of_objects)
        if not _is_written_as_python(of_objects, text, render):
            return of_objects, text
    except ValueError:
        text = ""
    try:
        of_texts = _convert_arguments(messages, _as_text)
        return of_texts, render(of_texts)
    except ValueError:
        return of_objects, text or render(of_objects)


def _is_written_as_python(messages: Messages, text: str, render: Callable[[Messages], str]) -> bool:
    of_calls = (function_of(call).get("arguments") for message in messages for call in calls_of(message))
    if not any(str(arguments) in text for arguments in of_calls if arguments):
        return False
    # The text may have it elsewhere, so a probe tells
    return str(_PROBE) in render(_convert_arguments(messages, lambda _: _PROBE))


def calls_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the tool calls of a message."""
    return message.get("tool_calls") or []


def function_of(call: dict[str, Any]) -> dict[str, Any]:
    """Returns the name and the arguments of a call, which stand in a `function` or in the call itself."""
    return call.get("function") or call


def null_arguments(messages: Messages) -> Iterator[tuple[int, Any, str]]:
    """Yields the turn, the function and the name of every argument that is null. Nobody checked the messages."""
    for turn, message in enumerate(messages):
        calls = message.get("tool_calls") if isinstance(message, dict) else None
        for call in calls if isinstance(calls, list) else ():
            function = function_of(call) if isinstance(call, dict) else None
            if isinstance(function, dict) and isinstance(arguments := function.get("arguments"), dict):
                yield from ((turn, function.get("name"), key) for key, value in arguments.items() if value is None)


def _convert_arguments(messages: Messages, convert: Callable[[Any], Any]) -> Messages:
    converted = []
    for turn, message in enumerate(messages):
        if calls_of(message):
            try:
                calls = [_convert_call(call, convert) for call in _parse_json(calls_of(message), "`tool_calls`")]
            except ValueError as error:
                raise ValueError(f"turn {turn} ({message['role']}): {error}") from error
            message = {**message, "tool_calls": calls}
        converted.append(message)
    return converted


def _convert_call(call: Any, convert: Callable[[Any], Any]) -> dict[str, Any]:
    if not isinstance(call, dict) or not isinstance(function_of(call), dict):
        raise ValueError(
            f"the tool call {call!r} must be a dict with a `function`, which has a `name` and `arguments`. Write it "
            "so, or remove the row."
        )
    function = function_of(call)
    if "arguments" not in function:
        return call
    try:
        function = {**function, "arguments": convert(function["arguments"])}
    except ValueError as error:
        raise ValueError(f"the call of `{function.get('name')}`: {error}") from error
    return {**call, "function": function} if "function" in call else function


def _as_object(arguments: Any) -> dict[str, Any]:
    arguments = _parse_json(arguments or "{}", "`arguments`")
    if not isinstance(arguments, dict):
        raise ValueError(f"`arguments` must be an object, or its JSON, but is {arguments!r}.")
    return arguments


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _parse_json(value: Any, name: str) -> Any:
    """Returns what a text is the JSON of, and what is no text as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is a text, but not JSON: {error}. Repair it, or remove the row.") from error
