"""The messages of a row: read in any form, and checked."""

import copy
from collections.abc import Set
from typing import Any

from trl.data_utils import maybe_convert_to_chatml
from trl.trainer.utils import remove_none_values

from ..weights import check_weight


Messages = list[dict[str, Any]]
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
THINKING = ("reasoning_content", "reasoning", "thinking")  # of an assistant, before its answer
# Keys by which other libraries weigh a message: with a number; with true or false; and those that have no one meaning,
# because true leaves a message out in some libraries and trains it in others, or because they name characters
LOSS_NUMBERS = frozenset({"loss_weight", "loss_scale"})
LOSS_SWITCHES = frozenset({"loss", "train", "training", "trainable"})
UNCLEAR_LOSS_KEYS = frozenset({"loss_mask", "mask", "masked", "train_detail", "training_detail"})


def read_messages(row: dict[str, Any], column: str) -> Messages:
    """
    Returns the messages of a column, after the turn of a `system` column. Raises `ValueError` as `check_messages` does.

    ShareGPT has `from` and `value` in the place of role and content, and calls the user `human` and the assistant
    `gpt`. Chat templates do not know these names.
    """
    turns = row.get(column)
    is_sharegpt = column == "conversations"
    if isinstance(turns, list):
        is_sharegpt |= any(isinstance(turn, dict) and "from" in turn for turn in turns)
    if is_sharegpt:
        turns = maybe_convert_to_chatml({"conversations": copy.deepcopy(turns)})["messages"]
    messages = [_without_nulls(message) for message in check_messages(turns, column)]
    if is_sharegpt:
        messages = [{**m, "role": SHAREGPT_ROLES.get(m["role"], m["role"])} for m in messages]
    return messages if column == "completion" else _with_system(row.get("system"), messages, column)


def _without_nulls(message: dict[str, Any]) -> dict[str, Any]:
    """
    Returns a message without the nulls in it, at any depth. Arrow adds a null for each key that only other rows have.
    A template would write it.
    """
    if all(isinstance(value, str) for value in message.values()):  # most messages
        return message
    cleaned = remove_none_values(message)
    if not cleaned.get("tool_calls", True):  # an empty list, of which some templates write a header
        del cleaned["tool_calls"]
    return {**cleaned, "content": message["content"]} if message.get("content", "") is None else cleaned


def _with_system(system: Any, messages: Messages, column: str) -> Messages:
    if system is None or system == "":
        return messages
    if not isinstance(system, str):
        raise ValueError(f"`system` must be a text, but is {system!r}. Make it one, or remove the column.")
    if messages[0]["role"] in ("system", "developer"):
        raise ValueError(f"`{column}` has a turn of the system, and the row has a `system` column. Remove one of them.")
    check_unicode(system, "`system`")
    return [{"role": "system", "content": system}, *messages]


def check_messages(messages: Any, column: str) -> Messages:
    """Returns the messages of a row. Raises `ValueError` if there are none, or one lacks a role or a content."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f"`{column}` must be a list of messages, but is {messages!r}. Fill it in (parse it, if it is JSON), or "
            "remove the row."
        )
    for turn, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"turn {turn} of `{column}` must have a `role`, but is {message!r}.")
        name, content = f"turn {turn} of `{column}` ({message['role']})", message.get("content")
        may_lack_content = content is None and any(map(message.get, ("tool_calls", *THINKING)))
        if not isinstance(content, str | list) and not may_lack_content:
            raise ValueError(f"{name} must have a `content`, but it is {content!r}. Fill it in or remove the row.")
        for part in content if isinstance(content, list) else ():
            is_part = isinstance(part, dict) and part.get("type")
            if not is_part or (part["type"] == "text" and not isinstance(part.get("text"), str)):
                raise ValueError(
                    f"{name} has the part {part!r}. Write a part as `{{'type': 'text', 'text': ...}}` or "
                    "`{'type': 'image'}`."
                )
            check_weight(part.get("weight"), f"the `weight` of a part of {name}")
        for text in message_texts(message):
            check_unicode(text, name)
        if message.get("function_call"):
            raise ValueError(
                f"{name} has `function_call`, the older form of a tool call, which templates leave out. Make it "
                "`tool_calls`, a list of `{'type': 'function', 'function': function_call}`."
            )
        check_loss_keys(message, name)
        if found := _given(LOSS_NUMBERS | LOSS_SWITCHES, message):
            raise ValueError(
                f"{name} has {found}, by which other libraries weigh a turn. It has no effect here. Rename it to "
                "`weight`: 0 leaves a turn out, 1 trains it. `wit_trl.to_trl_format` does so."
            )
        check_weight(message.get("weight"), f"the `weight` of turn {turn} of `{column}`")
        if not isinstance(message.get("completion"), bool | None):
            raise ValueError(
                f"{name} has the `completion` {message['completion']!r}, but it must be true, or false for a turn that "
                "is prompt."
            )
    return messages


def check_loss_keys(message: dict[str, Any], name: str) -> None:
    """Raises `ValueError` for a key of another library that has no one meaning."""
    if found := _given(UNCLEAR_LOSS_KEYS, message):
        raise ValueError(
            f"{name} has {found}, which means different things in different libraries. Write `weight` in its place: 0 "
            "leaves a turn out, 1 trains it; or give parts of the `content` a weight: "
            "`{'type': 'text', 'text': ..., 'weight': ...}`."
        )


def _given(keys: Set[str], message: dict[str, Any]) -> list[str]:
    return sorted(key for key in keys & message.keys() if message[key] is not None)


def check_answer(messages: Messages, column: str) -> None:
    """Raises `ValueError` if no turn is the assistant's."""
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise ValueError(
            f"`{column}` has no assistant turn, so there is no completion. Its roles are {roles}. Name the one that "
            "answers `assistant`, or remove such rows."
        )


def check_unicode(text: str, name: str) -> None:
    """Raises `ValueError` for half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not valid Unicode: {error}. Decode it anew, or remove the row.") from error


def message_texts(message: dict[str, Any]) -> list[str]:
    """Returns the content of a message, or the texts among its parts."""
    content = message.get("content") or ""
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]


def missing_end(texts: list[str], rendered: str) -> str | None:
    """Returns the end of the first text that is not rendered. Templates may change whitespace and drop thinking."""
    squeezed = "".join(rendered.split())
    for text in texts:
        end = text.rpartition("</think>")[2].strip()[-20:]
        if "".join(end.split()) not in squeezed:
            return end
    return None
