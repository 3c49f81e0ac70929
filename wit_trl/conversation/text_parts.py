"""Contents of several texts, each of which may have a weight."""

import contextlib
from collections.abc import Callable
from typing import Any

from ..weights import check_weight
from .messages import Messages, message_texts
from .template_memory import Known


_PROBE = "\ue000"  # of private use, so that no text has it


def _takes_parts(known: Known, render: Callable[[Messages], str]) -> bool:
    """Whether a template writes a content of several parts."""
    if known.takes_parts is None:
        with contextlib.suppress(ValueError):
            rendered = render([{"role": "user", "content": [{"type": "text", "text": _PROBE}]}])
            known.takes_parts = _PROBE in rendered and '"text": "' not in rendered
    return bool(known.takes_parts)


def part_weights(message: dict[str, Any]) -> list[tuple[int, float]]:
    """Returns the length and the weight of each text of a content of several parts, or nothing if none has a weight."""
    content = message.get("content")
    parts = [part for part in content if part["type"] == "text"] if isinstance(content, list) else []
    weights = [(len(part["text"]), check_weight(part.get("weight"), "`weight`")) for part in parts]
    return weights if any(weight != 1 for _, weight in weights) else []


def without_weights(messages: Messages) -> Messages:
    """Returns messages without the weights of parts, which a template might write."""
    return [
        {**message, "content": [{k: v for k, v in part.items() if k != "weight"} for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def join_parts(messages: Messages, known: Known, render: Callable[[Messages], str]) -> Messages:
    """
    Returns messages with one text in the place of several, where the template does not write these. It does not depend
    on weights: no weight changes a token.
    """
    joined = []
    for message in messages:
        content = message.get("content")
        if (
            isinstance(content, list)
            and all(part["type"] == "text" for part in content)
            and not _takes_parts(known, render)
        ):
            message = {**message, "content": "".join(message_texts(message))}
        joined.append(message)
    return joined
