"""Which tokens of a rendered conversation belong to which turn."""

import itertools
import json
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging
from trl.chat_template_utils import (
    get_training_chat_template,
    has_generation_markers,
    is_chat_template_stop_token_trained,
)
from trl.data_utils import prepare_multimodal_messages

from ._upstream import common_prefix_length, tokenize_messages
from .messages import THINKING, Messages, message_texts


logger = logging.get_logger(__name__)

_PROBE = "\ue000"  # of private use, so that no text has it


def training_chat_template(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin, tools: bool = False
) -> str | None:
    """
    Returns the chat template to train with: TRL's training version of the own one, where that has no
    `{% generation %}` marks and TRL has such a version, else the own one. `None` if there is none. Of named variants,
    the one for rows with `tools` may be another.
    """
    own = processing_class.chat_template
    if isinstance(own, dict):
        if tools and "tool_use" in own:
            return own["tool_use"]
        own = own.get("default")
    if own is None or has_generation_markers(own):
        return own
    try:
        return get_training_chat_template(processing_class) or own
    except ValueError:  # TRL does not know the template
        return own


def chosen_chat_template(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> str:
    """
    Returns `training_chat_template`, with warnings of what it changes or leaves out. Raises `ValueError` if there is
    none.
    """
    own, chat_template = processing_class.chat_template, training_chat_template(processing_class)
    if chat_template is None:
        raise ValueError(
            "The data set holds conversations, but there is no chat template, or no default one. Set "
            "`chat_template_path` to a template file or to a model that has one."
        )
    if chat_template != (own["default"] if isinstance(own, dict) else own):
        logger.warning_once(
            "The conversations are rendered with TRL's training version of the chat template, as with "
            "`assistant_only_loss=True`, so their tokens may differ from those of the own template."
        )
    if has_generation_markers(chat_template) and not is_chat_template_stop_token_trained(
        processing_class, chat_template=chat_template
    ):
        logger.warning_once(
            "The chat template leaves the end-of-turn token out of the assistant's turn. It counts as prompt, so the "
            "model may not learn to stop. Move it inside `{% generation %}` in the template."
        )
    return chat_template


class Conversation:
    """
    A conversation as the chat template renders it, and what each turn adds to it.

    Where a template does not mark the assistant's turns, they are found by rendering the conversation up to each turn:
    a turn is what it adds to the rendering before it, and the assistant's answer begins after the generation prompt.

    Args:
        messages (`list[dict]`):
            The turns.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            What renders and tokenizes them.
        chat_template (`str`, *optional*):
            The template to render with. Defaults to the own one.
        row (`dict`):
            Row of the data set. Its `"tools"` (a list or JSON) and `"chat_template_kwargs"` go to the template.

    Raises:
        `ValueError`: the template cannot render the conversation, or renders a turn differently once others follow.
    """

    def __init__(
        self,
        messages: Messages,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        chat_template: str | None,
        row: dict[str, Any],
    ):
        self.messages = messages
        self._processing_class = processing_class
        tools, template_kwargs = row.get("tools"), row.get("chat_template_kwargs")
        if isinstance(tools, str):
            try:
                tools = json.loads(tools)
            except json.JSONDecodeError as error:
                raise ValueError(f"`tools` is a text, but not JSON: {error}") from error
        if not isinstance(template_kwargs, dict | None):
            raise ValueError(f"`chat_template_kwargs` must be a dict, but is {template_kwargs!r}.")
        self._template_kwargs = {"chat_template": chat_template, "tools": tools, **(template_kwargs or {})}
        self.text = self.render(messages)
        self._check_nothing_is_left_out()

    def render(self, messages: Messages, **kwargs: Any) -> str:
        """Returns the text of some of the turns. Raises `ValueError` if the template does."""
        if isinstance(self._processing_class, ProcessorMixin):
            messages = prepare_multimodal_messages(messages)
        try:
            return self._processing_class.apply_chat_template(
                messages, **{**self._template_kwargs, "tokenize": False, **kwargs}
            )
        except Exception as error:  # whatever a template raises
            what = "this conversation" if len(messages) == len(self.messages) else f"its first {len(messages)} turns"
            remedy = ""
            if any("content" not in message for message in messages):
                remedy = (
                    ". Choose a template that supports tools (`chat_template_path`), or give each message that has "
                    "only `tool_calls` an empty `content`"
                )
            raise ValueError(f"the chat template cannot render {what}: {error}{remedy}") from error

    def tokenize(self, **kwargs: Any) -> dict[str, list[int]]:
        """Returns `"input_ids"` and, with `return_assistant_tokens_mask=True`, the template's `"assistant_masks"`."""
        return tokenize_messages(self._processing_class, self.messages, **{**self._template_kwargs, **kwargs})

    def assistant_masks(self, input_ids: list[int]) -> list[int]:
        """Returns 1 for the tokens of the assistant's answers, with their end-of-turn tokens, and 0 for all others."""
        masks = [0] * len(input_ids)
        for turn, message in enumerate(self.messages):
            if message["role"] == "assistant":
                start, end = self._start_of_answer(turn, input_ids), self._end_of_turn(turn, input_ids)
                masks[start:end] = [1] * (end - start)
        return masks

    def turn_weights(self, input_ids: list[int] | None = None) -> np.ndarray:
        """
        Returns for each token the `"weight"` of the message that adds it, if any message has one that is not 1, else
        nothing. What precedes the first message belongs to it.
        """
        weights = [1.0 if message.get("weight") is None else message["weight"] for message in self.messages]
        if set(weights) == {1}:
            return np.zeros(0, np.float32)
        if input_ids is None:
            input_ids = self.tokenize()["input_ids"]
        token_weights = np.full(len(input_ids), weights[-1], np.float32)
        start = 0
        for turn, (weight, following) in enumerate(itertools.pairwise(weights)):
            if weight != following:  # else it does not matter which of the two a token belongs to
                try:
                    rendered, end = self.text_before(turn + 1), self._end_of_turn(turn, input_ids)
                except ValueError as error:
                    raise ValueError(
                        f"turn {turn} has another `weight` than the next one, but where it ends cannot be told. Give "
                        f"both the same. The reason: {error}"
                    ) from error
                if _missing_end(message_texts(self.messages[turn]), rendered) is not None:
                    raise ValueError(
                        f"the chat template renders turn {turn} ({self.messages[turn]['role']}) inside the next one, "
                        "so it cannot have a `weight` of its own. Give both the same."
                    )
                token_weights[start:end] = weight
                start = end
        return token_weights

    def _check_nothing_is_left_out(self) -> None:
        """A template may print nothing of what it does not know, and Python's form of a list, without an error."""
        markers = ("'type': 'text'", '"type": "text"')
        in_parts = any(isinstance(message.get("content"), list) for message in self.messages)
        in_parts = in_parts or isinstance(self._processing_class, ProcessorMixin)  # for which `render` makes parts
        printed = in_parts and any(marker in self.text for marker in markers)
        for turn, message in enumerate(self.messages):
            texts = message_texts(message)
            printed = printed and not any(marker in text for text in texts for marker in markers)
            thinking = [text for key in THINKING if isinstance(text := message.get(key), str)]
            if message is self.messages[-1] and _missing_end(thinking, self.text) is not None:
                logger.warning_once(
                    "The chat template leaves out what an assistant thinks before its last answer: it is not trained."
                )
            if not any(texts):
                texts = thinking
            # Some templates (gpt-oss) leave out what is said beside a tool call
            left_out = None if message.get("tool_calls") else _missing_end(texts, self.text)
            if left_out is not None and message["role"] not in ("system", "user", "assistant"):
                # A tool's answer may be written in another form, as JSON
                probe = [*self.messages[:turn], self._with_probe(message), *self.messages[turn + 1 :]]
                left_out = left_out if self._renders_the_same(probe) else None
            if left_out is not None:
                raise ValueError(
                    f"the chat template leaves out turn {turn} ({message['role']}), which ends in {left_out!r}. Choose "
                    "a template that renders all of the conversation (`chat_template_path`), name the role as the "
                    "template does, or take the turn out of the data."
                )
        if printed:
            raise ValueError(
                "the chat template prints a `content` of several parts as it stands. Make every `content` a text, or "
                "choose another template (`chat_template_path`)."
            )
        without_calls = [
            {**message, "tool_calls": None, "content": message.get("content") or ""} for message in self.messages
        ]
        if any(message.get("tool_calls") for message in self.messages) and self._renders_the_same(without_calls):
            raise ValueError(
                "the chat template leaves out the tool calls of the assistant. Choose a template that supports tools "
                "(`chat_template_path`), or remove such rows."
            )
        if self._template_kwargs["tools"] and self._renders_the_same(self.messages, tools=None):
            raise ValueError(
                "the chat template leaves out the `tools`. Choose a template that supports tools "
                "(`chat_template_path`), or remove the column."
            )

    def _renders_the_same(self, messages: Messages, **kwargs: Any) -> bool:
        try:
            return self.render(messages, **kwargs) == self.text
        except ValueError:  # it misses something
            return False

    def check_prompt(self, prompt: Messages) -> None:
        """Raises `ValueError` where TRL would take the end of the prompt, which begins the messages, for completion."""
        if not self.text.startswith(self.render(prompt, add_generation_prompt=True)):
            self.text_before(len(prompt))

    def _start_of_answer(self, turn: int, input_ids: list[int]) -> int:
        before = self.text_before(turn)
        turns = self.messages[:turn]
        prompt, prompt_ids = self._render_and_tokenize(turns, add_generation_prompt=True) if turns else ("", [])
        # Thinking belongs to the answer, also where the generation prompt opens it, as in TRL's training templates
        opening = prompt.find("<think>", len(before))
        if opening < 0 and (prompt == before or not self.text.startswith(prompt)):
            # No generation prompt, or one that is not this turn's header: what the template puts before any answer
            probe_text, prompt_ids = self._render_and_tokenize([*turns, self._plain_answer(turn)])
            header = self.text[len(before) : common_prefix_length(list(self.text), list(probe_text))]
            if not header.strip():  # a mere space belongs to the answer, as in TRL's training templates
                _, prompt_ids = self._render_and_tokenize(turns) if turns else ("", [])
        start = common_prefix_length(prompt_ids, input_ids)
        if opening >= 0:
            thinking = self._tokenizer(prompt[opening:], add_special_tokens=False)["input_ids"]
            start = min(start, len(prompt_ids) - len(thinking))
        return start

    def text_before(self, turn: int) -> str:
        """Returns the rendering of the turns before. Raises `ValueError` unless the whole begins with it."""
        if turn == 0:
            return ""
        text = self.render(self.messages[:turn])
        # Some templates end every rendering with the EOS token (Phi-3), or the last turn (gpt-oss)
        before = text.removesuffix(self._tokenizer.eos_token or "")
        if not self.text.startswith(before):
            raise ValueError(
                f"the chat template renders turn {turn - 1} ({self.messages[turn - 1]['role']}) differently when other "
                "turns follow, as templates of thinking models do, so the completion cannot be told from the prompt. "
                "Set `chat_template_path` to a template that keeps earlier turns as they are, or that marks the "
                "assistant's turns with `{% generation %}`; or make a prompt/completion row of each answer."
            )
        return text if self.text.startswith(text) else before

    def _end_of_turn(self, turn: int, input_ids: list[int]) -> int:
        if turn == len(self.messages) - 1:
            return len(input_ids)
        self.text_before(turn + 1)
        _, turn_ids = self._render_and_tokenize(self.messages[: turn + 1])
        # A token that merges the end of the turn with the next one belongs to the next
        end = common_prefix_length(turn_ids, input_ids)
        is_answer = self.messages[turn]["role"] == "assistant"
        if is_answer and end < len(input_ids) and self._ends_in(input_ids[end], turn):
            end += 1
        return end

    def _ends_in(self, following: int, turn: int) -> bool:
        """Whether a turn ends in the token that follows it: a special one, as it has no end-of-turn token itself."""
        if following not in self._tokenizer.get_added_vocab().values():
            return False
        answer = self.render([*self.messages[:turn], self._plain_answer(turn)])
        if not self.text.startswith(self.render(self.messages[: turn + 1])):  # it ends in the EOS token, as above
            answer = answer.removesuffix(self._tokenizer.eos_token or "")
        return answer.rstrip().endswith(_PROBE)

    def _plain_answer(self, turn: int) -> dict[str, Any]:
        """Returns an answer in the place of the turn, without its thinking and tool calls, which may come first."""
        return self._with_probe({"role": "assistant", "content": self.messages[turn].get("content")})

    @staticmethod
    def _with_probe(message: dict[str, Any]) -> dict[str, Any]:
        """Returns the message with another content, to see what the template puts around it."""
        in_parts = isinstance(message.get("content"), list)
        return {**message, "content": [{"type": "text", "text": _PROBE}] if in_parts else _PROBE}

    def _render_and_tokenize(self, messages: Messages, **kwargs: Any) -> tuple[str, list[int]]:
        text = self.render(messages, **kwargs)
        input_ids = tokenize_messages(self._processing_class, messages, **{**self._template_kwargs, **kwargs})[
            "input_ids"
        ]
        return text, [int(token) for token in input_ids]  # some processors only return tensors

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if isinstance(self._processing_class, ProcessorMixin):
            return self._processing_class.tokenizer
        return self._processing_class


def _missing_end(texts: list[str], rendered: str) -> str | None:
    """Returns the end of the first text that is not rendered. Templates change whitespace, and leave out thinking."""
    squeezed = "".join(rendered.split())
    for text in texts:
        end = text.rpartition("</think>")[2].strip()[-20:]
        if "".join(end.split()) not in squeezed:
            return end
    return None
