"""What conversations with the same chat template have in common."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .chat_template import tokenizer_of
from .content_spans import ContentSpans
from .token_positions import Tokens


@dataclass
class Turn:
    """What a template writes before a turn, as far as it is known."""

    tail: str | None = None  # the part that still belongs to the turn before
    head: str | None = None  # the part that does not
    opening: str | None = None  # what precedes an answer
    ends_in_next: bool | None = None  # whether the turn before ends in the token that follows it


class TemplateMemory:
    """
    Remembers what a template writes around contents, how it separates turns, and how that is tokenized. It is found in
    some conversations, and holds for the others.
    """

    def __init__(self, processing_class: PreTrainedTokenizerBase | ProcessorMixin):
        self.tokens = Tokens(tokenizer_of(processing_class))
        self._parts: dict[str, tuple[ContentSpans, dict[tuple, Turn]]] = {}

    def part(self, template_kwargs: dict[str, Any]) -> tuple[ContentSpans, dict[tuple, Turn]]:
        """Returns what is remembered of conversations with these arguments of the template."""
        key = repr({**template_kwargs, "tools": bool(template_kwargs["tools"])})
        return self._parts.setdefault(key, (ContentSpans(), {}))


def kind_of(message: dict[str, Any]) -> tuple:
    """Returns what of a message decides about what a template writes around it."""
    content = message.get("content")
    if isinstance(content, list):
        shape: Any = tuple(part["type"] if part["type"] != "text" else bool(part["text"].strip()) for part in content)
    else:
        shape = bool(content and content.strip())
    return (
        message["role"],
        shape,
        *sorted(k for k, v in message.items() if v and k not in ("role", "content", "weight")),
    )
