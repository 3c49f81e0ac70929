"""
The text of a conversation, as a chat template renders it. It may leave out nothing.

1. The whole conversation is rendered, with the arguments of tool calls in the form that the template wants.
2. `find_contents` finds the characters of each content.
3. Tool calls, thinking and tools count as rendered if the text without them is another one.
"""

import functools
import itertools
from typing import Any

from transformers import ProcessorMixin
from transformers.utils import logging
from trl.data_utils import prepare_multimodal_messages

from .._upstream import tokenize_messages
from .chat_template import TOOLS_REMEDY, ProcessingClass
from .messages import Messages, message_texts, missing_end
from .parts import find_contents, parts
from .template_memory import TemplateMemory, kind_of
from .tool_calls import calls_of, read_tools, render_calls


logger = logging.get_logger(__name__)


class RenderedConversation:
    """
    The messages of a conversation, its text, and where each content is in it.

    Raises:
        `ValueError`: the template cannot render the conversation, or leaves out a part of it.
    """

    def __init__(
        self,
        messages: Messages,
        processing_class: ProcessingClass,
        chat_template: str | None,  # by default the own one
        row: dict[str, Any],  # its `"tools"` (a list or JSON) and `"chat_template_kwargs"` go to the template
        memory: TemplateMemory | None = None,  # what other conversations told of the template
    ):
        self._processing_class = processing_class
        template_kwargs = row.get("chat_template_kwargs")
        if not isinstance(template_kwargs, dict | None):
            raise ValueError(f"`chat_template_kwargs` must be a dict, but is {template_kwargs!r}.")
        tools = read_tools(row.get("tools"))
        self.template_kwargs = {"chat_template": chat_template, "tools": tools, **(template_kwargs or {})}
        self.messages = messages  # `render` reads their number
        self.messages, self.text = render_calls(messages, self.render)
        self._memory = memory = memory or TemplateMemory(processing_class)
        self._tokens = memory.tokens
        self._known = memory.of(self.template_kwargs)
        self._kinds = [kind_of(message) for message in self.messages]
        in_parts = isinstance(processing_class, ProcessorMixin)  # for which `render` makes parts
        in_parts = in_parts or any(isinstance(message.get("content"), list) for message in self.messages)
        # The characters of each content; `None` where the template changes what messages say
        self.spans, missing = find_contents(
            self.text, self.messages, self._kinds, self._known.written, self.render, in_parts
        )
        for turn in sorted(missing):
            self._check_is_rendered(turn)
        self._check_parts()

    def render(self, messages: Messages, **kwargs: Any) -> str:
        """Returns the text of some of the turns. Raises `ValueError` if the template does."""
        if isinstance(self._processing_class, ProcessorMixin):
            messages = prepare_multimodal_messages(messages)
        try:
            return self._processing_class.apply_chat_template(
                messages, **{**self.template_kwargs, "tokenize": False, **kwargs}
            )
        except Exception as error:  # whatever a template raises
            what = "this conversation" if len(messages) == len(self.messages) else f"its first {len(messages)} turns"
            remedy = ""
            if any(message.get("content") is None for message in messages):
                remedy = f". {TOOLS_REMEDY}, or give each message that has only `tool_calls` an empty `content`"
            raise ValueError(f"the chat template cannot render {what}: {error}{remedy}") from error

    def tokenize(self, **kwargs: Any) -> dict[str, list[int]]:
        """Returns `"input_ids"` and, with `return_assistant_tokens_mask=True`, the template's `"assistant_masks"`."""
        return tokenize_messages(self._processing_class, self.messages, **{**self.template_kwargs, **kwargs})

    def _check_parts(self) -> None:
        """Checks what stands beside contents. A template that leaves it out raises no error."""
        complete, last = self._known.complete, len(self.messages) - 1
        for part in parts(self.messages):
            key: tuple = (part.key, self._kinds[part.turn], *self._around[part.turn], part.turn == last)
            if key not in complete and self._renders_the_same_with(part.without, part.turn):
                if part.remedy:
                    raise ValueError(f"the chat template leaves out {part.name}. {part.remedy}.")
                logger.warning_once(f"The chat template leaves out {part.name}: it is not trained.")
            complete.add(key)
        key = ("tools", self._kinds[0])
        if self.template_kwargs["tools"] and key not in complete:
            if self._renders_the_same(self.messages, tools=None):
                raise ValueError(f"the chat template leaves out the `tools`. {TOOLS_REMEDY}, or remove the column.")
            complete.add(key)

    def _check_is_rendered(self, turn: int) -> None:
        message = self.messages[turn]
        texts = message_texts(message)
        left_out = missing_end(texts, self.text)
        if left_out is None and any(texts) and self._renders_the_same_with({**message, "content": ""}, turn):
            left_out = texts[-1][-20:]  # what stands in the text is of another turn
        # Some templates (gpt-oss) leave out what is said beside a tool call
        if left_out is not None and not calls_of(message):
            raise ValueError(
                f"the chat template leaves out turn {turn} ({message['role']}), which ends in {left_out!r}. Choose "
                "a template that renders all of the conversation (`chat_template_path`), name the role as the "
                "template does, or take the turn out of the data."
            )

    def _renders_the_same_with(self, message: dict[str, Any], turn: int) -> bool:
        return self._renders_the_same([*self.messages[:turn], message, *self.messages[turn + 1 :]])

    def _renders_the_same(self, messages: Messages, **kwargs: Any) -> bool:
        try:
            return self.render(messages, **kwargs) == self.text
        except ValueError:  # it misses something
            return False

    @functools.cached_property
    def _around(self) -> list[tuple[frozenset, frozenset]]:
        """The kinds of the messages before and from each turn: templates drop thinking before the last question."""
        none: frozenset[tuple] = frozenset()
        before, after = (
            [*itertools.accumulate(kinds, lambda known, kind: known | {kind}, initial=none)]
            for kinds in (self._kinds, self._kinds[::-1])
        )
        return [*zip(before[:-1], after[:0:-1], strict=True)]
