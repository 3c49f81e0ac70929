"""What conversations with the same chat template have in common."""

from dataclasses import dataclass, field
from typing import Any

from .chat_template import ProcessingClass, tokenizer_of
from .parts import thinking_in
from .token_positions import Tokens


@dataclass
class Turn:
    """What a template writes before a turn, as far as it is known."""

    tail: str | None = None  # the part that still belongs to the turn before
    head: str | None = None  # the part that does not
    opening: str | None = None  # what precedes an answer
    ends_in_next: bool | None = None  # whether the turn before ends in the token that follows it


@dataclass(frozen=True)
class Frame:
    """What a template writes around the thinking and the text of an answer, as far as this does not depend on calls."""

    before_thinking: str | None  # `None` where it leaves thinking out
    after_thinking: str  # up to what precedes the text of an answer without thinking
    before_text: str  # of an answer without thinking
    after_text: str


@dataclass
class Known:
    """What is known of a template that gets the same arguments."""

    written: dict[tuple, str] = field(default_factory=dict)  # before, between and after contents
    turns: dict[tuple, Turn] = field(default_factory=dict)
    frames: dict[tuple, Frame] = field(default_factory=dict)
    takes_parts: bool | None = None  # whether it writes a content of several parts
    complete: set[tuple] = field(default_factory=set)  # kinds of parts of messages that it does not leave out


class TemplateMemory:
    """
    Remembers what a template writes around contents, how it separates turns, and how that is tokenized. What is found
    in some conversations holds for the others.
    """

    def __init__(self, processing_class: ProcessingClass):
        self.tokens = Tokens(tokenizer_of(processing_class))
        self._known: dict[str, Known] = {}

    def of(self, template_kwargs: dict[str, Any]) -> Known:
        """Returns what is known from conversations with these arguments of the template."""
        key = repr({**template_kwargs, "tools": bool(template_kwargs["tools"])})
        return self._known.setdefault(key, Known())


def kind_of(message: dict[str, Any]) -> tuple:
    """Returns what of a message decides about what a template writes around it."""
    content = message.get("content")
    if isinstance(content, list):
        shape: Any = tuple(part["type"] if part["type"] != "text" else bool(part["text"].strip()) for part in content)
    elif found := thinking_in(content):
        shape = tuple(bool(text.strip()) for text in found.groups())
    else:
        shape = bool(content and content.strip())
    others = sorted(
        key for key, value in message.items() if value and key not in ("role", "content", "weight", "completion")
    )
    return message["role"], shape, *others
