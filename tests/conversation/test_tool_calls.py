"""Tool calls in every form that data has them, on every chat template that TRL ships and that takes calls."""

import json
import re

import pytest

from wit_trl.conversation.messages import read_messages
from wit_trl.conversation.template_memory import TemplateMemory
from wit_trl.conversation.tool_calls import null_arguments
from wit_trl.conversation.turns import Conversation, logger

from .conftest import CALLS, TEMPLATES, TOOLS
from .test_turns import spans


pytestmark = pytest.mark.xdist_group("conversation")

WITHOUT_CALLS = re.compile(
    "cohere|r1_distill|^gemma(3|_|$)|idefics|lfm2($|_training)|llama3($|_training)|llava|phi3|2_5_vl($|_t)|smolvlm"
)
TAKE_CALLS = [name for name in TEMPLATES if not WITHOUT_CALLS.search(name) or name == "lfm2_2_5_vl"]
WANTS_TEXT = "deepseekv3"


def conversation_with(arguments, content="", second=None):
    """A question, a call with these arguments, perhaps a second one, their results, and the answer."""
    calls = [{"id": "a", "type": "function", "function": {"name": "f0", "arguments": arguments}}]
    results = [{"role": "tool", "name": "f0", "tool_call_id": "a", "content": "3"}]
    if second:
        calls.append({"id": "b", "type": "function", "function": {"name": "f1", "arguments": second}})
        results.append({"role": "tool", "name": "f1", "tool_call_id": "b", "content": "4"})
    answer = {"role": "assistant", "content": "ok"}
    return [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": content, "tool_calls": calls},
        *results,
        answer,
    ]


def read(messages, **row):
    return read_messages({"messages": messages, **row}, "messages")


@pytest.mark.parametrize("name", TAKE_CALLS)
def test_arguments_as_json_are_written_as_the_object(name, render):
    arguments = {"x": 1, "text": "a “b” <c>"}
    of_text = render(name, read(conversation_with(json.dumps(arguments, ensure_ascii=False)))).text
    assert of_text == render(name, read(conversation_with(arguments))).text
    assert "a “b” <c>" in of_text
    assert '\\"x\\"' not in of_text
    assert "{{" not in of_text


def test_template_that_wants_arguments_as_text_gets_that_of_the_data(render):
    assert '\n{"x":1}\n' in render(WANTS_TEXT, read(conversation_with('{"x":1}'))).text
    assert '\n{"x": 1}\n' in render(WANTS_TEXT, read(conversation_with({"x": 1}))).text


def test_arguments_that_a_template_would_write_in_the_form_of_python(template_tokenizer):
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for call in m.tool_calls or [] %}"
        "{{ call.function.arguments }}{% endfor %}\n{% endfor %}"
    )
    messages = read(conversation_with({"x": "a"}))
    assert '{"x": "a"}' in Conversation(messages, template_tokenizer, template, {}).text


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ('{"x": ', r"turn 1 \(assistant\): the call of `f0`: `arguments` is a text, but not JSON"),
        ('"{}"', r"the call of `f0`: `arguments` must be an object, or its JSON, but is '\{\}'"),
        ([1], r"`arguments` must be an object, or its JSON, but is \[1\]"),
    ],
)
def test_arguments_that_are_no_object_are_refused(arguments, error, render):
    with pytest.raises(ValueError, match=error):
        render("qwen3", read(conversation_with(arguments)))


def test_calls_may_be_json(render):
    messages = conversation_with({"x": 1})
    expected = render("qwen3", messages).text
    messages[1]["tool_calls"] = json.dumps(messages[1]["tool_calls"])
    assert render("qwen3", read(messages)).text == expected


def test_calls_that_are_no_dicts_are_refused(render):
    messages = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "", "tool_calls": ["f0"]}]
    with pytest.raises(ValueError, match="the tool call 'f0' must be a dict with a `function`"):
        render("qwen3", read(messages))


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_calls_and_no_tools_are_none(name, render):
    messages = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "ok"}]
    plain = render(name, messages).text
    empty = [messages[0], {**messages[1], "tool_calls": []}]
    for tools in ([], "", "[]", None):
        assert render(name, read(empty), tools=tools).text == plain


def test_tools_may_be_json_one_by_one_and_have_nulls(render):
    with_null = [{**TOOLS[0], "other": None}]
    assert render("llama3_1", CALLS, tools=with_null).text == render("llama3_1", CALLS, tools=TOOLS).text
    as_json = [json.dumps(tool) for tool in TOOLS]
    assert render("llama3_1", CALLS, tools=as_json).text == render("llama3_1", CALLS, tools=TOOLS).text


@pytest.mark.parametrize("name", TAKE_CALLS)
def test_second_call_of_a_turn_is_written_or_refused(name, render):
    messages = read(conversation_with({"x": 1}, second={"y": 2}))
    if re.match("gptoss", name):
        with pytest.raises(ValueError, match=r"leaves out the call of `f1`, number 1 of .*in turn 1\."):
            render(name, messages)
    elif re.match("llama3_", name):  # its template says itself that it takes one
        with pytest.raises(ValueError, match="single tool-calls"):
            render(name, messages)
    else:
        text = render(name, messages).text
        assert text.index("f0") < text.rindex("f1")


def test_what_is_said_beside_calls_and_left_out_is_told(render, caplog):
    logger.warning_once.cache_clear()
    render("qwen2_5", read(conversation_with({"x": 1}, content="A moment.")))
    assert "leaves out" not in caplog.text
    render("llama3_1", read(conversation_with({"x": 1}, content="A moment.")))
    assert "leaves out what is said beside tool calls: it is not trained" in caplog.text


def test_thinking_before_a_call_that_is_left_out_is_told(render, caplog):
    logger.warning_once.cache_clear()
    messages = conversation_with({"x": 1})
    messages[1]["reasoning"] = "I should call."
    render("qwen2_5", read(messages))
    assert "leaves out what an assistant thinks" in caplog.text


def test_probes_of_parts_are_not_repeated(template_tokenizer, monkeypatch):
    memory, rendered = TemplateMemory(template_tokenizer), []
    original = Conversation.render
    monkeypatch.setattr(Conversation, "render", lambda *args, **kwargs: rendered.append(1) or original(*args, **kwargs))
    counts = []
    for _ in range(3):
        messages = read(conversation_with({"x": 1}, second={"y": 2}))
        Conversation(messages, template_tokenizer, TEMPLATES["qwen3"], {"tools": TOOLS}, memory)
        counts.append(len(rendered))
    assert counts[2] - counts[1] == 1


def test_null_arguments_of_arrow_are_not_written(render):
    calls = conversation_with({"x": 1, "text": None})
    calls[1]["tool_calls"][0]["custom"] = None
    assert render("qwen3", read(calls)).text == render("qwen3", conversation_with({"x": 1})).text
    kept = render("qwen3", read(conversation_with('{"x": null}'))).text
    assert '{"x": null}' in kept


@pytest.mark.parametrize("content", ["missing", None])
def test_call_without_content_names_the_remedy(content, template_tokenizer):
    messages = conversation_with({"x": 1})
    if content is None:
        messages[1]["content"] = None
    else:
        del messages[1]["content"]
    with pytest.raises(ValueError, match=r"supports tools.*qwen2_5.jinja.*an empty `content`"):
        Conversation(
            read(messages), template_tokenizer, "{% for m in messages %}{{ m.role + m.content }}{% endfor %}", {}
        )


def test_tool_result_that_is_left_out_is_refused_though_its_text_is_elsewhere(template_tokenizer):
    template = (
        "{% for m in messages %}{% if m.role != 'tool' %}{{ m.role }}: {{ m.content }}"
        "{{ m.tool_calls | tojson if m.tool_calls }}\n{% endif %}{% endfor %}"
    )
    messages = conversation_with({"x": 3})
    with pytest.raises(ValueError, match=r"leaves out turn 2 \(tool\), which ends in '3'"):
        Conversation(read(messages), template_tokenizer, template, {})


def test_text_that_quotes_the_arguments_in_the_form_of_python(render):
    messages = conversation_with({"x": "a"})
    messages[0] = {"role": "user", "content": "Call f0 with {'x': 'a'}"}
    assert '"arguments": {"x": "a"}' in render("qwen2_5", read(messages)).text


@pytest.mark.parametrize("call", [None, "f0", {"function": None, "name": "f0", "arguments": {}}, {"function": "f0"}])
def test_calls_that_nobody_checked_have_no_null_arguments(call):
    assert [*null_arguments([None, {"tool_calls": [call]}, {"tool_calls": "[]"}])] == []
    known = {"name": "f0", "arguments": {"x": None}}
    assert [*null_arguments([{"tool_calls": [{"function": None, **known}]}])] == [(0, "f0", "x")]


def test_turn_ends_inside_an_added_token(template_tokenizer):
    template_tokenizer.add_tokens(["\n", "\n\n"])
    template = (
        "{% for m in messages %}{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant\n{% endif %}"
    )
    messages = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "\nHi"}]
    conversation = Conversation(messages, template_tokenizer, template, {})
    input_ids = conversation.tokenize()["input_ids"]
    (answer,) = spans(template_tokenizer, input_ids, conversation.assistant_masks(input_ids))
    assert answer.strip() == "Hi<|im_end|>"
