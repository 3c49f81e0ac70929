"""Turns found by rendering, on every chat template that TRL ships."""

import itertools
import json
import random
import re

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from trl.chat_template_utils import has_generation_markers

from wit_trl.conversation.chat_template import training_chat_template
from wit_trl.conversation.messages import check_messages
from wit_trl.conversation.template_memory import TemplateMemory
from wit_trl.conversation.turn_weights import weigh_conversation
from wit_trl.conversation.turns import Conversation, logger
from wit_trl.weights import StructureWeights

from .conftest import CALLS, CHAT, EMPTY, SPECIAL_TEXT, TEMPLATES, TOOLS


pytestmark = pytest.mark.xdist_group("conversation")
MARKED = [name for name, template in TEMPLATES.items() if has_generation_markers(template)]
# What TRL's marks include of the header that the generation prompt gives, so that the model never writes it
HEADER_IN_MARKS = {
    "deepseek_r1_distill_training": "<｜Assistant｜>",
    "deepseekv3_training": "<｜Assistant｜>",
    "gptoss_training": "<|start|>assistant",
    "muse_glimmer_training": "<|start|>assistant",
    "qwen2_5_training": "\n",
}
# What stands around an answer, by the name of the template: before and after it, and after the last one
AROUND = {
    "cohere2": ("", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    "cohere": ("", "<|END_OF_TURN_TOKEN|>"),
    "deepseek": ("", "<｜end▁of▁sentence｜>"),
    "diffusion_gemma": ("", "<turn|>\n"),
    "gemma4": ("", "<turn|>\n"),
    "gemma": ("", "<end_of_turn>\n"),
    "glm4moe_training": ("\n<think></think>\n", "<|user|>"),
    "glm4moe": ("\n<think></think>\n", "<|user|>", ""),
    "gptoss": ("<|channel|>final<|message|>", "<|end|>", "<|return|>"),
    "idefics3": (" ", "<end_of_utterance>\n"),
    "lfm2": ("", "<|im_end|>\n"),
    "llama3": ("", "<|eot_id|>"),
    "llava_next": (" ", "</s> "),
    "muse": (" to=user<|message|>", "<|eot|>"),
    "nemotron": ("<think></think>", "<|im_end|>\n"),
    "phi3": ("", "<|end|>\n", "<|end|>\n<eos>"),
    "qwen2_5": ("", "<|im_end|>\n"),
    "qwen3_instruct": ("", "<|im_end|>\n"),
    "qwen3_vl": ("", "<|im_end|>\n"),
    "qwen3": ("<think>\n\n</think>\n\n", "<|im_end|>\n"),  # thinking is part of an answer
    "smolvlm": (" ", "<end_of_utterance>\n"),
}
# Templates of which TRL has a training version, that marks the turns
TWINS = [name for name in TEMPLATES if f"{name}_training" in TEMPLATES]
# They drop the thinking of earlier turns, or add an empty one to the last
REWRITING = ["qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6"]


def weights_of(conversation):
    input_ids = conversation.tokenize()["input_ids"]
    return weigh_conversation(conversation, input_ids, [0] * len(input_ids), StructureWeights())[1]


def spans(tokenizer, input_ids, masks):
    """Returns the text of each run of masked tokens."""
    pairs = zip(input_ids, masks, strict=True)
    runs = [[token for token, _ in run] for mask, run in itertools.groupby(pairs, lambda pair: pair[1]) if mask]
    return tokenizer.batch_decode(runs)


def rendered_and_marked(conversation, tokenizer):
    tokens = conversation.tokenize(return_assistant_tokens_mask=True)
    rendered = spans(tokenizer, tokens["input_ids"], conversation.assistant_masks(tokens["input_ids"]))
    return rendered, spans(tokenizer, tokens["input_ids"], tokens["assistant_masks"])


@pytest.mark.parametrize("name", MARKED)
def test_turns_found_by_rendering_are_those_that_trl_marks(name, render, template_tokenizer):
    rendered, marked = rendered_and_marked(render(name, CHAT), template_tokenizer)
    assert len(rendered) == 2
    if name == "llava_next_training":  # a space follows the end of turn, which the marks leave out
        rendered = [answer.removesuffix(" ") for answer in rendered]
    assert [HEADER_IN_MARKS.get(name, "") + answer for answer in rendered] == marked


@pytest.mark.parametrize("messages", [CHAT, EMPTY, SPECIAL_TEXT], ids=["chat", "empty", "special_text"])
@pytest.mark.parametrize("name", [name for name in TWINS if name not in REWRITING])
def test_turns_of_a_plain_template_are_those_of_its_training_twin(name, messages, render, template_tokenizer):
    twin = f"{name}_training"
    plain = render(name, messages)
    input_ids = plain.tokenize()["input_ids"]
    rendered = spans(template_tokenizer, input_ids, plain.assistant_masks(input_ids))
    tokens = render(twin, messages).tokenize(return_assistant_tokens_mask=True)
    marked = spans(template_tokenizer, tokens["input_ids"], tokens["assistant_masks"])
    if name == "glm4moe":  # the twin writes the token that ends the last answer, the plain template does not
        marked[-1] = marked[-1].removesuffix("<|user|>")
        if not marked[-1]:
            marked.pop()
    if name == "llava_next":
        rendered = [answer.removesuffix(" ") for answer in rendered]
    assert [HEADER_IN_MARKS.get(twin, "") + answer for answer in rendered] == marked


@pytest.mark.parametrize(
    "name", [name for name in MARKED if re.search("glm|gptoss|lfm2_2|lfm2_v2|muse|nemo|qwen2_5_t|qwen3", name)]
)
def test_tool_calls_found_by_rendering_are_those_that_trl_marks(name, render, template_tokenizer):
    rendered, marked = rendered_and_marked(render(name, CALLS, tools=TOOLS), template_tokenizer)
    assert [HEADER_IN_MARKS.get(name, "") + answer for answer in rendered] == marked
    assert len(rendered) == 2
    assert "add" in rendered[0]
    assert "3" in rendered[1]


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in REWRITING])
def test_answer_with_its_end_of_turn_is_all_that_is_found(name, render, template_tokenizer):
    conversation = render(name, CHAT)
    input_ids = conversation.tokenize()["input_ids"]
    answers = spans(template_tokenizer, input_ids, conversation.assistant_masks(input_ids))
    before, after, *last = next(around for start, around in AROUND.items() if name.startswith(start))
    assert answers == [f"{before}First answer.{after}", f"{before}Second answer.{(last or [after])[0]}"]


@pytest.mark.parametrize("name", REWRITING)
def test_template_that_rewrites_earlier_turns_is_refused(name, render):
    conversation = render(name, CHAT)
    with pytest.raises(
        ValueError, match=r"turn 1 \(assistant\) differently when other turns follow.*chat_template_path"
    ):
        conversation.assistant_masks(conversation.tokenize()["input_ids"])
    single = render(name, CHAT[2:])  # nothing is rewritten
    assert sum(single.assistant_masks(single.tokenize()["input_ids"])) > 0


def test_template_to_train_with(template_tokenizer):
    assert training_chat_template(template_tokenizer) is None
    for name, expected in {"qwen3": "qwen3_training", "lfm2_2_5": "lfm2_2_5", "gemma4": "gemma4"}.items():
        for template in (TEMPLATES[name], {"default": TEMPLATES[name], "tool_use": "{{ messages }}"}):
            template_tokenizer.chat_template = template
            assert training_chat_template(template_tokenizer) == TEMPLATES[expected]
        assert training_chat_template(template_tokenizer, tools=True) == "{{ messages }}"


@pytest.mark.parametrize("name", ["llama3", "qwen3_training", "gemma3", "phi3", "gptoss", "deepseekv3", "mistral"])
def test_each_token_has_the_weight_of_its_message(name, render, template_tokenizer, monkeypatch):
    # System merged into the user's turn, no header of the assistant, no line breaks
    mistral = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    monkeypatch.setitem(TEMPLATES, "mistral", mistral)
    weighted = [{**message, "weight": weight} for message, weight in zip(CHAT, (0.5, 2, 0, None), strict=True)]
    conversation = render(name, weighted)
    input_ids = conversation.tokenize()["input_ids"]
    weights = weights_of(conversation).tolist()
    assert len(weights) == len(input_ids)
    assert set(weights) == {0.5, 2, 0, 1}
    for weight, message in zip((0.5, 2, 0, 1), CHAT, strict=True):
        (turn,) = spans(template_tokenizer, input_ids, [w == weight for w in weights])
        assert message["content"] in turn
        assert not any(other["content"] in turn for other in CHAT if other is not message)
    assert set(weights_of(render(name, CHAT)).tolist()) == {1}


def test_turns_are_found_where_tokens_merge_across_them(tokenizer):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    messages = [{**message, "content": "If the two arguments"} for message in CHAT]
    conversation = Conversation(messages, tokenizer, template, {})
    input_ids = conversation.tokenize()["input_ids"]
    assert tokenizer.decode(input_ids) == conversation.render(messages)
    answers = spans(tokenizer, input_ids, conversation.assistant_masks(input_ids))
    assert answers == ["If the two arguments", "If the two arguments "]  # the first space is in " us", of the user


def test_weights_need_only_the_turns_between_which_they_change(render):
    system = {"role": "system", "content": "Be kind.", "weight": 0.5}  # cannot be rendered without the user's turn
    weighted = [system, {**CHAT[0], "weight": 0.5}, CHAT[1]]
    assert set(weights_of(render("qwen3_8_training", weighted)).tolist()) == {0.5, 1}
    with pytest.raises(ValueError, match="the chat template cannot render its first 1 turns: No user"):
        weights_of(render("qwen3_8_training", [system, CHAT[0], CHAT[1]]))


@pytest.mark.parametrize("name", ["llama3", "lfm2", "smolvlm", "qwen2_5_vl"])
def test_template_that_leaves_out_tool_calls_is_refused(name, render):
    with pytest.raises(
        ValueError, match=r"leaves out the tool calls of the assistant\. Choose a template that supports"
    ):
        render(name, CALLS, tools=TOOLS)


def test_template_that_leaves_out_content_is_refused(template_tokenizer):
    messages = [{"role": "user", "content": "text"}, {"role": "assistant", "content": "text"}]
    with pytest.raises(ValueError, match=r"leaves out turn 0 \(user\), which ends in 'text'"):
        Conversation(messages, template_tokenizer, TEMPLATES["smolvlm"], {})


@pytest.mark.parametrize("name", ["llama3", "lfm2", "qwen3_training"])
def test_texts_of_a_content_are_joined_where_a_template_writes_one(name, template_tokenizer):
    def conversation(*contents):
        roles = itertools.cycle(["user", "assistant"])
        messages = [{"role": next(roles), "content": content} for content in contents]
        return Conversation(messages, template_tokenizer, TEMPLATES[name], {})

    parts = [{"type": "text", "text": "Some "}, {"type": "text", "text": "text."}]
    assert conversation("Hi", parts).text == conversation("Hi", "Some text.").text
    with pytest.raises(ValueError, match=r"prints a `content` of several parts|cannot render|leaves out turn 1"):
        conversation("Hi", [*parts, {"type": "image"}])


@pytest.mark.parametrize(
    ("name", "messages", "row", "error"),
    [
        ("qwen2_5", [CHAT[0], {"role": "observation", "content": "It is 3."}, CHAT[1]], {}, r"leaves out turn 1 \(obs"),
        ("phi3", [CHAT[0], {"role": "tool", "content": "It is 3."}, CHAT[1]], {}, r"leaves out turn 1 \(tool"),
        ("llama3", CHAT, {"tools": TOOLS}, "leaves out the `tools`. Choose a template"),
        ("gemma", [CHAT[0], {"role": "assistant", "content": "", "thinking": "Hm."}], {}, r"leaves out turn 1 \(assis"),
    ],
)
def test_template_that_leaves_out_or_misprints_what_it_does_not_know_is_refused(name, messages, row, error, render):
    with pytest.raises(ValueError, match=error):
        render(name, messages, **row)


@pytest.mark.parametrize("name", ["gemma4", "gemma4_v3", "gemma4_v4", "gemma4_v5"])
def test_every_tool_call_is_an_answer_where_none_is_prompted(name, render, template_tokenizer):
    second = [{"type": "function", "function": {"name": "mul", "arguments": {"a": 7}}}]
    more = [{**CALLS[2], "tool_calls": second}, {**CALLS[3], "name": "mul", "content": "9"}, CALLS[4]]
    conversation = render(name, [*CALLS[1:4], *more], tools=TOOLS)
    input_ids = conversation.tokenize()["input_ids"]
    first, second, last = spans(template_tokenizer, input_ids, conversation.assistant_masks(input_ids))
    assert first.startswith("<|tool_call>call:add{")
    assert second.startswith("<|tool_call>call:mul{a:7}")
    assert last == "It is 3.<turn|>\n"


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_training", "llama3_1", "glm4moe"])
def test_data_of_tools_that_looks_like_a_part(name, render):
    call = {"type": "function", "function": {"name": "add", "arguments": {"type": "text", "body": "hi"}}}
    render(name, [*CALLS[:2], {**CALLS[2], "tool_calls": [call]}, *CALLS[3:]], tools=TOOLS)


def test_tool_answer_that_is_written_as_json_is_not_left_out(render):
    quoted = {**CALLS[3], "content": 'It says "3".'}
    render("gptoss", [*CALLS[:3], quoted, CALLS[4]], tools=TOOLS)


def test_thinking_that_the_template_leaves_out_is_told(render, caplog):
    logger.warning_once.cache_clear()
    render("llama3", [CHAT[0], {**CHAT[1], "reasoning_content": "Hm."}])
    assert "leaves out what an assistant thinks" in caplog.text


def test_weight_of_a_turn_whose_end_cannot_be_told_is_refused(render):
    messages = [CALLS[0], {**CHAT[0], "weight": 0.0}, CHAT[1]]
    conversation = render("qwen3_6", messages)
    with pytest.raises(ValueError, match=r"turn 0 has another `weight` than the next one, but .* Give both the same"):
        weights_of(conversation)


def test_what_is_said_beside_a_tool_call_may_be_left_out(render):
    said = [{**message, "content": message["content"] or "Let me compute that."} for message in CALLS]
    for name in ("llama3_1", "gptoss", "muse_glimmer"):
        conversation = render(name, said, tools=TOOLS)
        assert "Let me compute" not in conversation.render(said)


@pytest.mark.parametrize("name", ["glm4moe", "nemotron_3_nano"])
def test_earlier_thinking_may_be_left_out(name, render):
    thinking = [{**CHAT[1], "content": "<think>\nHm, let me see.\n</think>"}, *CHAT[2:]]
    assert "Hm, let me" not in render(name, [CHAT[0], *thinking]).render([CHAT[0], *thinking])


def test_text_that_looks_like_a_part(template_tokenizer):
    text = 'What does {"type": "text"} mean?'
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role in ("user", "assistant")]
    assert text in Conversation(messages, template_tokenizer, TEMPLATES["qwen2_5_vl"], {}).render(messages)


MISTRAL = (  # the system message goes into the last user turn, if nothing follows
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last and system is defined %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def test_template_that_drops_a_turn_is_refused(template_tokenizer):
    with pytest.raises(ValueError, match=r"leaves out turn 0 \(system\), which ends in 'Be kind\.'"):
        Conversation([CALLS[0], *CHAT], template_tokenizer, MISTRAL, {})
    # What does not end in the text that is dropped
    keeping = MISTRAL.replace("[/INST]", "[/INST]{{ '' if loop.last else ' ' ~ system }}")
    conversation = Conversation([CALLS[0], *CHAT], template_tokenizer, keeping, {})
    with pytest.raises(ValueError, match=r"renders turn 1 \(user\) differently when other turns follow"):
        conversation.assistant_masks(conversation.tokenize()["input_ids"])
    conversation = Conversation(CHAT, template_tokenizer, MISTRAL, {})
    input_ids = conversation.tokenize()["input_ids"]
    answers = spans(template_tokenizer, input_ids, conversation.assistant_masks(input_ids))
    assert [answer.strip() for answer in answers] == ["First answer.<eos>", "Second answer.<eos>"]


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.mark.parametrize("template", [CHATML + CHATML_PROMPT, CHATML])
@pytest.mark.parametrize("first", [0, 1])
def test_answer_is_found_without_a_turn_or_a_generation_prompt_before(first, template, template_tokenizer):
    conversation = Conversation(CHAT[first:], template_tokenizer, template, {})
    input_ids = conversation.tokenize()["input_ids"]
    answers = spans(template_tokenizer, input_ids, conversation.assistant_masks(input_ids))
    expected = ["First answer.<|im_end|>\n", "Second answer.<|im_end|>\n"]
    assert answers == expected


@pytest.mark.parametrize("content", ["A", "s", "is", "assistant"])
@pytest.mark.parametrize("header", ["<|im_start|>assistant\n", "### Response:\n", "ASSISTANT: ", ""])
def test_answer_that_occurs_in_its_header(header, content, template_tokenizer):
    template = (
        f"{{% for m in messages %}}{{{{ {header!r} if m.role == 'assistant' else '' }}}}{{{{ m.content }}}}<|im_end|>"
    )
    template += "{% endfor %}"
    messages = [CHAT[0], {"role": "assistant", "content": content}, CHAT[2], {"role": "assistant", "content": content}]
    conversation = Conversation(messages, template_tokenizer, template, {})
    input_ids = conversation.tokenize()["input_ids"]
    answers = spans(template_tokenizer, input_ids, conversation.assistant_masks(input_ids))
    assert [answer.strip() for answer in answers] == [f"{content}<|im_end|>"] * 2


@pytest.mark.parametrize("scheme", ["bytes", "metaspace"])
@pytest.mark.parametrize("header", ["### Response:\n", "ASSISTANT: "])
def test_header_is_no_answer_where_its_tokens_depend_on_what_precedes(header, scheme):
    tokenizer = Tokenizer(models.BPE())
    if scheme == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    alphabet = [*pre_tokenizers.ByteLevel.alphabet(), "▁"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["USER: hi ", header, "ho"] * 50, trainer)
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% else %}"
        f"{{{{ {header!r} }}}}{{{{ m.content }}}}{{{{ eos_token }}}}{{% endif %}}{{% endfor %}}"
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}] * 2
    conversation = Conversation(messages, fast, template, {})
    input_ids = conversation.tokenize()["input_ids"]
    answers = spans(fast, input_ids, conversation.assistant_masks(input_ids))
    assert [answer.strip() for answer in answers] == ["ho</s>"] * 2


def test_answers_in_a_row(template_tokenizer):
    template = (  # of OLMo 2: a line break before every turn but the first
        "{% for m in messages %}{{ '' if loop.first else '\n' }}<|{{ m.role }}|>\n{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    conversation = Conversation([*CHAT[:2], CHAT[3]], template_tokenizer, template, {})
    input_ids = conversation.tokenize()["input_ids"]
    answers = spans(template_tokenizer, input_ids, conversation.assistant_masks(input_ids))
    assert answers == ["First answer.<eos>", "Second answer.<eos>"]


def test_whitespace_that_a_template_changes(template_tokenizer):
    template = "{% for m in messages %}{{ m.content | replace('\n\n', '\n') }}<|im_end|>{% endfor %}"
    messages = [{"role": role, "content": "So:\n\nyes"} for role in ("user", "assistant")]
    Conversation(messages, template_tokenizer, template, {})


def test_content_is_found_where_the_template_trims_it_and_then_writes_the_same_whitespace(template_tokenizer):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
    messages = [{"role": "user", "content": "Hi\n"}, {"role": "assistant", "content": "\nYes \n"}]
    conversation = Conversation(messages, template_tokenizer, template, {})
    assert [conversation.text[start:end] for start, end in conversation.spans] == ["Hi", "Yes"]


def test_weight_of_a_message_that_is_rendered_inside_the_next_is_refused(template_tokenizer):
    template = (
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}"
        "{% endif %}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ system if loop.first }}{{ m.content }} "
        "[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    messages = [{**CALLS[0], "weight": 0}, *CHAT]
    with pytest.raises(ValueError, match=r"renders turn 0 \(system\) inside the next one.* Give both the same"):
        weights_of(Conversation(messages, template_tokenizer, template, {}))
    both = [messages[0], {**CHAT[0], "weight": 0}, *CHAT[1:]]
    assert set(weights_of(Conversation(both, template_tokenizer, template, {})).tolist()) == {0, 1}


def test_empty_answer_without_a_generation_prompt(template_tokenizer):
    messages = [CHAT[0], {"role": "assistant", "content": " "}, CHAT[2]]
    conversation = Conversation(messages, template_tokenizer, CHATML, {})
    input_ids = conversation.tokenize()["input_ids"]
    assert spans(template_tokenizer, input_ids, conversation.assistant_masks(input_ids)) == [" <|im_end|>\n"]


def test_tools_and_template_arguments_of_the_row(render):
    as_list, as_json = (render("qwen3", CALLS, tools=tools) for tools in (TOOLS, json.dumps(TOOLS)))
    assert as_list.tokenize() == as_json.tokenize()
    assert "A summand." in as_list.render(CALLS)
    thinking = [render("qwen3", CHAT, chat_template_kwargs={"enable_thinking": on}) for on in (True, False)]
    texts = [conversation.render(CHAT[:1], add_generation_prompt=True) for conversation in thinking]
    assert texts[1] == texts[0] + "<think>\n\n</think>\n\n"
    with pytest.raises(ValueError, match="`tools` is a text, but not JSON: Expecting value"):
        render("qwen3", CALLS, tools="add")
    with pytest.raises(ValueError, match="`chat_template_kwargs` must be a dict, but is 'fast'"):
        render("qwen3", CHAT, chat_template_kwargs="fast")
    # Arrow gives `None` to rows that have none
    assert render("qwen3", CHAT, chat_template_kwargs=None).text == render("qwen3", CHAT).text
    assert render("llama3", CHAT, chat_template_kwargs={"add_generation_prompt": False}).assistant_masks([]) == []


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        (None, "`messages` must be a list of messages, but is None"),
        ([], r"`messages` must be a list of messages, but is \[\]"),
        (["Hello"], "turn 0 of `messages` must have a `role`, but is 'Hello'"),
        ([{"content": "Hello"}], "turn 0 of `messages` must have a `role`"),
        ([{"role": None, "content": "Hello"}], "turn 0 of `messages` must have a `role`"),
        ([CHAT[0], {"role": "assistant"}], r"turn 1 of `messages` \(assistant\) must have a `content`, but it is None"),
        (
            [{**CHAT[0], "weight": -1}],
            "the `weight` of turn 0 of `messages` is -1, but a weight must be a finite number",
        ),
        ([{**CHAT[0], "weight": "much"}], "the `weight` of turn 0 of `messages` is 'much', but"),
        ([{**CHAT[0], "weight": float("inf")}], "the `weight` of turn 0 of `messages` is inf, but"),
        ([{**CHAT[0], "weight": float("nan")}], "the `weight` of turn 0 of `messages` is nan, but"),
    ],
)
def test_incomplete_messages_are_refused(messages, error):
    with pytest.raises(ValueError, match=error):
        check_messages(messages, "messages")


CONTENTS = [
    "Hi.",
    "",
    " ",
    " leading",
    "trailing \n",
    "Ünïcödé 😀",
    "<|im_end|>",
    "<think>\nHm.\n</think>\n\nYes",
    'say "x"\n',
]


def random_conversation(choose):
    """Turns with or without a system prompt, thinking, tool calls, weights, and whatever a content may hold."""
    messages = [{"role": "system", "content": choose.choice(CONTENTS)}] if choose.random() < 0.4 else []
    for _ in range(choose.randint(1, 3)):
        messages.append({"role": "user", "content": choose.choice(CONTENTS)})
        if choose.random() < 0.3:
            messages += [{**CALLS[2], "content": choose.choice(["", "Let me see."])}, CALLS[3]]
        thinking = {"reasoning_content": "Hm."} if choose.random() < 0.2 else {}
        messages.append({"role": "assistant", "content": choose.choice(CONTENTS), **thinking})
    return [{**message, "weight": choose.choice([0, 0.5, 1])} for message in messages]


def outcome(messages, *args):
    """The spans and weights of a conversation, or what refuses it."""
    try:
        conversation = Conversation(messages, *args)
        input_ids = conversation.tokenize()["input_ids"]
        return conversation.assistant_masks(input_ids), weights_of(conversation).tolist()
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_remembered_of_a_template_changes_no_verdict(name, template_tokenizer):
    choose, memory = random.Random(name), TemplateMemory(template_tokenizer)
    outcomes = []
    for _ in range(8):
        messages = random_conversation(choose)
        args = (template_tokenizer, TEMPLATES[name], {"tools": TOOLS} if choose.random() < 0.3 else {})
        outcomes.append(outcome(messages, *args))
        assert outcome(messages, *args, memory) == outcomes[-1], messages
    assert len({str(each) for each in outcomes}) > 1
