"""Weights of roles, of what the chat template writes, and of turns."""

import io

import pytest
import torch
from rich.console import Console

from wit_trl import WITSFTConfig

from ..helpers import WEIGHTS
from ..reference import formula_with_data_weights
from .test_preparation import MODES, PLAIN_TEMPLATE, completions, wrap


SYSTEM = {"role": "system", "content": "Be kind."}
TURNS = [
    SYSTEM,
    {"role": "user", "content": "What is the sum of one and two?"},
    {"role": "assistant", "content": "It is three."},
    {"role": "user", "content": "And the mean?"},
    {"role": "assistant", "content": "It is one and a half."},
]
ROWS = {
    "messages": [{"messages": TURNS}, {"messages": TURNS[:3]}],
    "pairs": [{"prompt": TURNS[:4], "completion": TURNS[4:]}, {"prompt": TURNS[:2], "completion": TURNS[2:3]}],
    "sharegpt": [
        {"conversations": [{"from": m["role"], "value": m["content"]} for m in turns]} for turns in (TURNS, TURNS[:3])
    ],
}
ROLES = {"role_loss_weights": {"system": 0, "user": 0.5}}
TEMPLATES = {
    "marked": None,  # TRL's training version of Llama 3's
    "unmarked": PLAIN_TEMPLATE,
}


@pytest.fixture(params=TEMPLATES)
def template(request, tokenizer):
    tokenizer.chat_template = TEMPLATES[request.param] or tokenizer.chat_template
    return request.param


def weighted(row, tokenizer, region=None):
    """The text of each run of tokens with a weight, of one region or of both."""
    text, before = [], False
    for token, mask, weight in zip(row["input_ids"], row["completion_mask"], row["token_weights"], strict=True):
        if weight and region in (None, mask):
            text = [*text, []] if not before else text
            text[-1].append(token)
        before = bool(weight) and region in (None, mask)
    return [tokenizer.decode(tokens) for tokens in text]


@pytest.mark.parametrize("kind", ROWS)
def test_role_of_weight_zero_is_a_message_of_weight_zero(kind, template, prepare):
    by_message = {"system": 0, "user": 0.5}

    def weigh(turns):
        return [{**turn, "weight": by_message.get(turn.get("role", turn.get("from")), 1.0)} for turn in turns]

    explicit = [{column: weigh(turns) for column, turns in row.items()} for row in ROWS[kind]]
    if kind == "sharegpt":  # which has no weights of messages
        explicit = [{"messages": weigh(turns["messages"])} for turns in ROWS["messages"]]
    (trainer, roles), (other, messages) = (
        prepare(rows, steps=1, **structure) for rows, structure in ((ROWS[kind], ROLES), (explicit, {}))
    )
    assert {0, 0.5, 1} == set(trainer.train_dataset[0]["token_weights"])
    assert trainer.train_dataset["token_weights"][:] == other.train_dataset["token_weights"][:]
    assert roles.logs[0]["loss"] == messages.logs[0]["loss"]
    for name, gradient in messages.gradients[0].items():
        assert torch.equal(roles.gradients[0][name], gradient)


@pytest.mark.parametrize("kind", ROWS)
def test_without_the_template_only_contents_and_answers_weigh(kind, template, prepare, tokenizer):
    trainer, _ = prepare(ROWS[kind], chat_template_loss_weight=0)
    contents = [turn["content"] for turn in TURNS if turn["role"] != "assistant"]
    row = trainer.train_dataset[0]
    answers = [turn["content"] + "<|eot_id|>" + "\n" * (template == "unmarked") for turn in TURNS[2::2]]
    in_prompt = [contents[0], contents[1], answers[0], contents[2]] if kind == "pairs" else contents
    assert weighted(row, tokenizer, 0) == in_prompt
    assert weighted(row, tokenizer, 1) == (answers[1:] if kind == "pairs" else answers)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_loss_and_gradient_without_the_template_in_every_mode(mode, streaming, prepare, make_model, tokenizer):
    """Against plain loops in float64 over the tokens of contents and answers, told here by their texts."""
    structure = {**ROLES, "chat_template_loss_weight": 0, "completion_turns": "last"}
    whole = []
    for turns in (TURNS, TURNS[:3]):
        ids, regions, weights = [], [], []
        for number, turn in enumerate(turns):
            is_answer = turn["role"] == "assistant"
            header = "<|start_header_id|>" + turn["role"] + "<|end_header_id|>\n\n"
            header = "<|begin_of_text|>" * (number == 0) + header
            parts = [(header, 0), (turn["content"], 1), ("<|eot_id|>", int(is_answer))]
            for text, weighs in parts:
                tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
                ids += tokens
                in_answer = is_answer and weighs and number == len(turns) - 1
                regions += [int(bool(in_answer))] * len(tokens)
                weights += [weighs * {"system": 0, "user": 0.5}.get(turn["role"], 1)] * len(tokens)
        whole.append({"input_ids": ids, "completion_mask": regions, "token_weights": weights, "weight": 1})
    max_length = 60
    rows = [{key: v if key == "weight" else v[:max_length] for key, v in row.items()} for row in whole]
    mode_kwargs = {"max_length": max_length, **MODES[mode]}
    if mode == "padding_free":
        rows = whole
    if "packed" in mode:
        rows = wrap(whole) if mode == "packed_wrapped" else whole
    _, recorder = prepare(ROWS["messages"], steps=1, streaming=streaming, **structure, **mode_kwargs)
    start = make_model(max_position_embeddings=4096).double()
    loss = formula_with_data_weights(start, rows, WEIGHTS)
    loss.backward()
    assert recorder.logs[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in start.named_parameters():
        gradient = recorder.gradients[0][name].double()
        assert torch.linalg.norm(gradient - parameter.grad) < 1e-6 * torch.linalg.norm(parameter.grad), name


@pytest.mark.parametrize("kind", ROWS)
def test_only_the_last_turn_is_completion(kind, template, prepare, tokenizer):
    rows = [{"prompt": TURNS[:2], "completion": TURNS[2:]}] if kind == "pairs" else ROWS[kind]
    trainer, _ = prepare(rows, completion_turns="last")
    assert completions(trainer, tokenizer)[0].strip() == "It is one and a half.<|eot_id|>"
    assert trainer.train_dataset[0]["prompt_length"] > trainer.train_dataset[0]["completion_length"]


TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds."}}]
TOOL_TEMPLATE = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ m.content }}"
    "{% if loop.first and tools %}<|eot_id|>Tools: {{ tools | tojson }}.{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}"
)


def test_schemas_of_tools_are_a_role(prepare, tokenizer):
    tokenizer.chat_template = TOOL_TEMPLATE
    rows = [{"messages": TURNS[:3], "tools": TOOLS}]
    structure = {"role_loss_weights": {"system": 0.5, "tools": 0.25}, "chat_template_loss_weight": 0}
    trainer, _ = prepare(rows, **structure)
    (row,) = trainer.train_dataset
    tools = [t for t, weight in zip(row["input_ids"], row["token_weights"], strict=True) if weight == 0.25]
    assert tokenizer.decode(tools).startswith("<|eot_id|>Tools: [{")
    assert tokenizer.decode(tools).endswith('"Adds."}}].')
    system = [t for t, weight in zip(row["input_ids"], row["token_weights"], strict=True) if weight == 0.5]
    assert tokenizer.decode(system) == "Be kind."


def test_template_that_changes_contents_is_refused(prepare, tokenizer):
    tokenizer.chat_template = PLAIN_TEMPLATE.replace("m.content", "m.content | replace('e', 'E')")
    with pytest.raises(ValueError, match=r"Row 0 .*: the chat template changes what messages say, so what it writes"):
        prepare(ROWS["messages"], chat_template_loss_weight=0)


def test_role_inside_the_next_turn_is_refused(prepare, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ messages[0].content if loop.index0 == 1 }}"
        "{{ m.content }} [/INST]{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"renders turn 0 \(system\) inside the next one, .* a role weight of its own"):
        prepare(ROWS["messages"], role_loss_weights={"system": 0})


def test_tools_in_two_places_of_a_header(prepare, tokenizer):
    """As in Llama 3.1 without a system message, which writes one where there are tools."""
    tokenizer.chat_template = "{% if tools %}Env{% endif %}<|eot_id|>{% if tools %}{{ tools | tojson }}{% endif %}" + (
        PLAIN_TEMPLATE
    )
    trainer, _ = prepare([{"messages": TURNS[1:3], "tools": TOOLS}], role_loss_weights={"tools": 0.25})
    (row,) = trainer.train_dataset
    tools = [t for t, weight in zip(row["input_ids"], row["token_weights"], strict=True) if weight == 0.25]
    assert tokenizer.decode(tools).startswith('Env[{"')


def test_content_of_an_answer_that_the_template_does_not_mark(prepare, tokenizer):
    """Templates that mark the last answer alone make the earlier ones prompt, of which the contents weigh."""
    tokenizer.chat_template = (
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
        "{% if loop.last %}{% generation %}{{ m.content }}<|eot_id|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|eot_id|>{% endif %}{% endfor %}"
    )
    trainer, _ = prepare(ROWS["messages"][:1], chat_template_loss_weight=0)
    assert weighted(trainer.train_dataset[0], tokenizer, 0) == [turn["content"] for turn in TURNS[:-1]]


PACKED = {"input_ids": [5, 6], "seq_lengths": [2], "completion_mask": [0, 1], "token_weights": [1.0, 1.0]}


@pytest.mark.parametrize(
    "rows", [[{"prompt": "a", "completion": "b"}], [{"input_ids": [5, 6]}], [{"text": "a b"}], [PACKED]]
)
def test_data_without_conversations_is_refused(rows, prepare):
    with pytest.raises(ValueError, match=r"train dataset has no messages: `role_loss_weights`, .* Leave them unset"):
        prepare(rows, completion_turns="last")


def test_unprepared_data_is_refused(prepare):
    rows = [{"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]}]
    with pytest.raises(ValueError, match=r"which `skip_prepare_dataset` skips\. Give the rows `token_weights` instead"):
        prepare(rows, dataset_kwargs={"skip_prepare_dataset": True}, completion_turns="last")


def test_role_that_no_message_has_is_told(prepare, caplog):
    prepare(ROWS["messages"], role_loss_weights={"sytem": 0})
    assert "names ['sytem'], but the first 1,000 rows of the train dataset have only" in caplog.text


@pytest.mark.parametrize(
    ("structure", "error"),
    [
        ({"role_loss_weights": {"system": -1}}, r"`role_loss_weights\['system'\]` is -1, but a weight must be"),
        ({"role_loss_weights": ["system"]}, r"`role_loss_weights` is \['system'\], but must be a dict of roles"),
        ({"chat_template_loss_weight": float("nan")}, "`chat_template_loss_weight` is nan, but a weight must be"),
        ({"completion_turns": "first"}, "`completion_turns` is 'first', but must be one of"),
    ],
)
def test_settings_that_mean_nothing_are_refused(structure, error, tmp_path):
    with pytest.raises(ValueError, match=error):
        WITSFTConfig(str(tmp_path), use_cpu=True, **structure)


def test_roles_may_be_json(tmp_path):
    config = WITSFTConfig(str(tmp_path), use_cpu=True, role_loss_weights='{"system": 0}')
    assert config.structure_weights.role_loss_weights == {"system": 0}


def test_table_and_rows_show_what_was_set(prepare, tokenizer):
    trainer, _ = prepare(ROWS["messages"], chat_template_loss_weight=0, completion_turns="last", **ROLES)
    console = Console(width=100, file=io.StringIO())
    console.print(trainer.weight_report())
    lines = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
    shown = ["weight of the role system 0", "weight of the role user 0.5", "weight of what the template writes 0"]
    assert [*shown, "turns that are completion last"] == lines[lines.index(shown[0]) :][:4]
