"""Every chat template that TRL ships, a tokenizer that knows their tokens, and conversations."""

import re

import pytest
from transformers import PreTrainedTokenizerFast

from wit_trl.conversation.turns import Conversation

from ..conftest import CHAT_TEMPLATES, train_tokenizer


TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(CHAT_TEMPLATES.glob("*.jinja"))}
SPECIAL = (
    r"</?tool_call>|"
    r"<\|[A-Za-z_/]+\|?>|<｜[^｜<>\s]+｜>|<[a-z_]+_of_[a-z_]+>|<[a-z_]+\|>|</?think>|</s>|\[/?INST\]|\[gMASK\]|<sop>"
)
SPECIAL_TOKENS = sorted({token for template in TEMPLATES.values() for token in re.findall(SPECIAL, template)})

CHAT = [
    {"role": "user", "content": "First question?"},
    {"role": "assistant", "content": "First answer."},
    {"role": "user", "content": "Second question?"},
    {"role": "assistant", "content": "Second answer."},
]
EMPTY = [CHAT[0], {"role": "assistant", "content": ""}, *CHAT[2:]]
SPECIAL_TEXT = [CHAT[0], {"role": "assistant", "content": "Ends in a token: <tool_call>"}, *CHAT[2:]]
CALLS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "What is 1 + 2?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}],
    },
    {"role": "tool", "name": "add", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
]
PARAMETERS = {
    "type": "object",
    "properties": {"a": {"type": "integer", "description": "A summand."}},
    "required": ["a"],
}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": PARAMETERS}}]


@pytest.fixture(scope="session")
def byte_tokenizer():
    return train_tokenizer([], vocab_size=300)


@pytest.fixture
def template_tokenizer(byte_tokenizer):
    """A tokenizer that knows the special tokens of all templates."""
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer,
        eos_token="<eos>",
        bos_token="<bos>",
        additional_special_tokens=SPECIAL_TOKENS,
    )


@pytest.fixture
def render(template_tokenizer):
    """A function that renders a conversation with a template of TRL's."""

    def make(name, messages, **row):
        if "gptoss" in name:
            template_tokenizer.eos_token = "<|return|>"
        if re.search("vl|idefics|llava", name):
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        return Conversation(messages, template_tokenizer, TEMPLATES[name], row)

    return make
