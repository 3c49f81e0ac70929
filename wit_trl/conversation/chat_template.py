"""Which chat template conversations are rendered with, and the tokenizer of a processor."""

from pathlib import Path
from typing import TypeAlias

import trl
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging
from trl.chat_template_utils import (
    get_training_chat_template,
    has_generation_markers,
    is_chat_template_stop_token_trained,
)


logger = logging.get_logger(__name__)

ProcessingClass: TypeAlias = PreTrainedTokenizerBase | ProcessorMixin
_OF_TRL = Path(trl.__file__).parent / "chat_templates"
TOOLS_REMEDY = (
    "Choose a template that supports tools: set `chat_template_path` to a model that has one, or to a file such as "
    f"llama3_1.jinja, qwen2_5.jinja or glm4moe.jinja of those that TRL brings (in {_OF_TRL})"
)


def tokenizer_of(processing_class: ProcessingClass) -> PreTrainedTokenizerBase:
    """Returns the tokenizer, which may be part of a processor."""
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def training_chat_template(processing_class: ProcessingClass, tools: bool = False) -> str | None:
    """
    Returns the chat template to train with, `None` if there is none. Where the own one has no `{% generation %}` marks
    and TRL has a training version of it, it is this version. Of named variants, rows with `tools` may have another.
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


def chosen_chat_template(processing_class: ProcessingClass) -> str:
    """Returns `training_chat_template`, with warnings of what it changes. Raises `ValueError` if there is none."""
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
    has_marks = has_generation_markers(chat_template)
    if has_marks and not is_chat_template_stop_token_trained(processing_class, chat_template=chat_template):
        logger.warning_once(
            "The chat template leaves the end-of-turn token out of the assistant's turn. It counts as prompt, so the "
            "model may not learn to stop. Move it inside `{% generation %}` in the template."
        )
    return chat_template


def check_marks(regions: list[int]) -> None:
    """Raises `ValueError` if a chat template with `{% generation %}` marks leaves no token in the completion."""
    if 1 not in regions:
        raise ValueError(
            "the chat template marks no token of the assistant's turns. Put `{% generation %}` around what it renders "
            "for them, or remove these marks from the template."
        )
