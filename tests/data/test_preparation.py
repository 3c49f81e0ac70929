"""Rows of every type, weights in the data, and rows that are wrong."""

import inspect
import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from trl import SFTConfig, SFTTrainer

from wit_trl import DataCollatorForWIT
from wit_trl.conversation.turns import Conversation
from wit_trl.weights import token_weights

from ..conftest import CHAT_TEMPLATES
from ..conversation.test_turns import MISTRAL
from ..helpers import WEIGHTS, StepRecorder, make_trainer
from ..reference import formula_with_data_weights, tokenize


PLAIN_TEMPLATE = (  # no marks, not one of those that TRL knows
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ m.content }}<|eot_id|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}"
)


@pytest.fixture
def weighted_rows(prompt_completion, tokenizer):
    """Rows of uneven lengths with a weight of their own and of each token, some of them 0."""
    rows = [tokenize(tokenizer, row) for row in prompt_completion.select(range(8))]
    for index, row in enumerate(rows):
        row["weight"] = (1.0, 0.5, 2.0, 0.0)[index % 4]
        row["token_weights"] = [(1.0, 0.3, 0.0, 1.7)[t % 4] for t in range(len(row["input_ids"]))]
    return rows


def cut(rows, length):
    """Rows truncated at their end, with all that belongs to their tokens."""
    return [{key: value[:length] if isinstance(value, list) else value for key, value in row.items()} for row in rows]


def completions(trainer, tokenizer, dataset=None):
    """The text of what is completion in each row that the trainer prepared."""
    texts = []
    for row in dataset or trainer.train_dataset:
        pairs = zip(row["input_ids"], row["completion_mask"], strict=True)
        texts.append(tokenizer.decode([token for token, region in pairs if region == 1]))
    return texts


MODES = {
    "padded": {},
    "padding_free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 2048},
    "packed_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 2048},
    "packed_wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 2048},
}


def wrap(rows):
    """The rows as one document, which wrapped packing makes of them."""
    tokens = [token for row in rows for token in row["input_ids"]]
    regions = [region for row in rows for region in row["completion_mask"]]
    weights = [row["weight"] * weight for row in rows for weight in row["token_weights"]]
    return [{"input_ids": tokens, "completion_mask": regions, "token_weights": weights}]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_data_weights_multiply_the_loss_and_its_gradient(
    head, mode, streaming, weighted_rows, make_model, tokenizer, config_kwargs
):
    batch_size = 1 if "packed" in mode else 4  # all documents are packed into one row
    accumulation = 1 if "packed" in mode else 2
    config_kwargs |= {
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        **MODES[mode],
    }
    recorder = StepRecorder()
    data = (
        IterableDataset.from_generator(lambda: iter(weighted_rows)) if streaming else Dataset.from_list(weighted_rows)
    )
    model = make_model(max_position_embeddings=4096)
    trainer = make_trainer(
        make_model, tokenizer, None, config_kwargs, model=model, train_dataset=data, callbacks=[recorder]
    )
    start = make_model(max_position_embeddings=4096).double()
    trainer.train()
    rows = wrap(weighted_rows) if mode == "packed_wrapped" else cut(weighted_rows, trainer.args.max_length)
    loss = formula_with_data_weights(start, rows, WEIGHTS)
    loss.backward()
    assert recorder.logs[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in start.named_parameters():
        gradient = recorder.gradients[0][name].double()
        assert torch.linalg.norm(gradient - parameter.grad) < 1e-6 * torch.linalg.norm(parameter.grad), name


def test_row_of_half_weight_has_half_the_gradient(prompt_completion, make_model, tokenizer, config_kwargs):
    config_kwargs |= {"gradient_accumulation_steps": 1, "max_steps": 1, "max_grad_norm": 0.0}
    rows = [
        {**row, "weight": weight} for row, weight in zip(prompt_completion.select(range(2)), (1.0, 1.0), strict=True)
    ]
    gradients = []
    for weights in ((1.0, 1.0), (0.0001, 1.0), (0.5, 1.0)):
        recorder = StepRecorder()
        data = [{**row, "weight": weight} for row, weight in zip(rows, weights, strict=True)]
        make_trainer(make_model, tokenizer, data, config_kwargs, callbacks=[recorder]).train()
        gradients.append(torch.cat([gradient.flatten() for gradient in recorder.gradients[0].values()]).double())
    whole, none, half = gradients
    first_row = (whole - none) / (1 - 0.0001)
    torch.testing.assert_close(whole - half, 0.5 * first_row, rtol=1e-4, atol=1e-7)


def test_message_of_weight_zero_leaves_both_sums(make_model, tokenizer, config_kwargs):
    first = [{"role": "user", "content": "Sum?"}, {"role": "assistant", "content": "The first"}]
    second = [{"role": "user", "content": "Mean?"}, {"role": "assistant", "content": "The second"}]
    data = [{"messages": [{**m, "weight": 0} for m in first] + [{**m, "weight": None} for m in second]}]
    config_kwargs |= {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 1, "max_steps": 1}
    trainer = make_trainer(make_model, tokenizer, data, config_kwargs)
    (row,) = trainer.train_dataset
    turn = len(tokenizer.apply_chat_template(first)["input_ids"])
    assert row["token_weights"] == [0] * turn + [1] * (len(row["input_ids"]) - turn)
    batch = trainer.data_collator([row])
    assert (batch["labels"][0, :turn] == -100).all()
    trainer.train()
    start = make_model().double()
    logits = start(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
    total = count = 0
    for t in range(turn, len(row["input_ids"])):
        total -= WEIGHTS[row["completion_mask"][t]] * logits[t - 1, row["input_ids"][t]].item()
        count += 1
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total / count, rel=1e-6)


@pytest.mark.parametrize("conversational_prompt", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("template", ["plain", "llama3"])
def test_message_weights_survive_on_any_template(
    template, streaming, conversational_prompt, make_model, tokenizer, config_kwargs
):
    if template == "plain":
        tokenizer.chat_template = PLAIN_TEMPLATE
    weights = (0.5, 2.0, 0.0, 0.3)
    messages = [
        {"role": role, "content": f"{role} {turn}", "weight": weight}
        for turn, (role, weight) in enumerate(zip(("user", "assistant") * 2, weights, strict=True))
    ]
    row = {"prompt": messages[:3], "completion": messages[3:]} if conversational_prompt else {"messages": messages}
    unweighted = {key: [{"role": m["role"], "content": m["content"]} for m in value] for key, value in row.items()}
    rows = [unweighted, {**row}]  # the first row tells nothing of the weights to come
    data = IterableDataset.from_generator(lambda: iter(rows)) if streaming else Dataset.from_list(rows)
    trainer = make_trainer(make_model, tokenizer, None, config_kwargs, train_dataset=data)
    plain, weighted = list(trainer.train_dataset)
    assert plain["input_ids"] == weighted["input_ids"]
    assert plain["completion_mask"] == weighted["completion_mask"]
    assert set(plain["token_weights"]) == {1}
    tokens = torch.tensor(weighted["input_ids"])
    for turn, weight in enumerate(weights):
        selected = tokens[torch.tensor(weighted["token_weights"]) == torch.tensor(weight)]
        assert f"{turn}<|eot_id|>" in tokenizer.decode(selected)


def test_weights_stay_in_evaluation(weighted_rows, make_model, tokenizer, config_kwargs):
    data = Dataset.from_list(weighted_rows)
    trainer = make_trainer(make_model, tokenizer, weighted_rows, config_kwargs, eval_dataset=data)
    expected = formula_with_data_weights(make_model().double(), cut(weighted_rows, 64), WEIGHTS).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weight": -1.0}, r"Row 1 of the train dataset: `weight` is -1.0, but a weight must be a finite number"),
        (
            {"weight": 1e39},
            r"Row 1 .*: `weight` is 1e\+39, but a weight must be .* 0, or 1e-12 to 1e\+38",
        ),
        ({"weight": 1e-50}, "Row 1 .*: `weight` is 1e-50, but"),
        ({"weight": math.nan}, "Row 1 of the train dataset: `weight` is nan, but"),
        ({"weight": math.inf}, "Row 1 of the train dataset: `weight` is inf, but"),
        ({"token_weights": [1.0, 1.0]}, "Row 1 .*: `token_weights` has 2 entries, but `input_ids` has 3"),
        ({"token_weights": [1.0, -0.5, 1.0]}, "Row 1 of the train dataset: `token_weights` is .*-0.5.*, but"),
        ({"token_weights": [1.0, 1e-50, 1.0]}, "Row 1 of the train dataset: `token_weights` is .*1e-50.*, but"),
        ({"token_weights": [1.0, 1e39, 1.0]}, r"Row 1 of the train dataset: `token_weights` is .*1e\+39.*, but"),
        ({"token_weights": [1.0, None, 1.0]}, "Row 1 of the train dataset: `token_weights` is .*None.*, but"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_wrong_weights_are_refused_by_row(streaming, wrong, message, make_model, tokenizer, config_kwargs):
    (column,) = wrong
    good = {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1], column: 1.0 if column == "weight" else [1.0] * 3}
    rows = [good, {**good, **wrong}]
    data = IterableDataset.from_generator(lambda: iter(rows)) if streaming else Dataset.from_list(rows)
    with pytest.raises(ValueError, match=message):
        list(make_trainer(make_model, tokenizer, None, config_kwargs, train_dataset=data).train_dataset)


def test_weight_that_is_missing_is_one(make_model, tokenizer, config_kwargs):
    rows = [{"prompt": "a", "completion": "b", "weight": weight} for weight in (0.5, None)]
    stream = IterableDataset.from_generator(lambda: iter([rows[0], {"prompt": "a", "completion": "b"}]))
    for data in (Dataset.from_list(rows), stream):
        trainer = make_trainer(make_model, tokenizer, None, config_kwargs, train_dataset=data)
        assert [set(row["token_weights"]) for row in trainer.train_dataset] == [{0.5}, {1}]
    rows = [{"input_ids": [5, 6, 7], "token_weights": weights} for weights in ([1.0, 0.5, 0.5], None)]
    trainer = make_trainer(make_model, tokenizer, rows, config_kwargs)
    assert [row["token_weights"] for row in trainer.train_dataset] == [[1, 0.5, 0.5], [1, 1, 1]]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"input_ids": None}, "`input_ids` must be a list with a number for each token, but is None"),
        ({"input_ids": "abc"}, "`input_ids` must be a list with a number for each token, but is 'abc'"),
        (
            {"input_ids": [], "completion_mask": []},
            r"`input_ids` must be the numbers of one token or more, but is \[\]",
        ),
        ({"input_ids": [5, -1, 7]}, "`input_ids` must be the numbers of one token or more, but is .*-1"),
        ({"input_ids": [5, 0.5, 7]}, "`input_ids` must be the numbers of one token or more, but is .*0.5"),
        ({"completion_mask": None}, "`completion_mask` must be a list with a number for each token, but is None"),
        ({"completion_mask": [0, None, 1]}, "`completion_mask` must be a list with a number for each token, but is"),
    ],
)
def test_wrong_tokens_are_refused_by_row(wrong, message, make_model, tokenizer, config_kwargs):
    good = {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]}
    stream = IterableDataset.from_generator(lambda: iter([good, {**good, **wrong}]))
    trainer = make_trainer(make_model, tokenizer, None, config_kwargs, train_dataset=stream)
    with pytest.raises(ValueError, match=f"^Row 1 of the train dataset: {message}"):
        list(trainer.train_dataset)


def test_prompt_that_the_template_renders_otherwise_is_refused(make_model, tokenizer, config_kwargs):
    tokenizer.chat_template = MISTRAL.replace("[/INST]", "[/INST]{{ '' if loop.last else ' ' ~ system }}")
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Sum?"}]
    rows = [{"prompt": prompt, "completion": [{"role": "assistant", "content": "It is 3."}]}]
    with pytest.raises(ValueError, match=r"^Row 0 of the train dataset: .* renders turn 1 \(user\) differently"):
        make_trainer(make_model, tokenizer, rows, config_kwargs)


def test_message_weights_with_the_template_of_assistant_only_loss(make_model, tokenizer, config_kwargs):
    tokenizer.chat_template = (CHAT_TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8")
    turns = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "2"}] * 2
    row = {"prompt": turns[:3], "completion": [{**turns[3], "weight": 0.5}]}
    config_kwargs |= {"assistant_only_loss": True, "max_length": None}
    (prepared,) = make_trainer(make_model, tokenizer, [row], config_kwargs).train_dataset
    halved = [t for t, weight in zip(prepared["input_ids"], prepared["token_weights"], strict=True) if weight == 0.5]
    header, answer = "<|im_start|>assistant\n", "<think>\n\n</think>\n\n2<|im_end|>\n"
    assert tokenizer.decode(halved) == tokenizer.decode(tokenizer(header + answer)["input_ids"])
    assert completions(None, tokenizer, [prepared]) == [tokenizer.decode(tokenizer(answer)["input_ids"])]


def test_other_tokens_than_those_of_the_own_template_are_told(messages, make_model, tokenizer, config_kwargs, caplog):
    inspect.getmodule(Conversation).logger.warning_once.cache_clear()
    make_trainer(make_model, tokenizer, None, config_kwargs, train_dataset=messages)
    assert "rendered with TRL's training version of the chat template" in caplog.text
    caplog.clear()
    inspect.getmodule(Conversation).logger.warning_once.cache_clear()
    tokenizer.chat_template = PLAIN_TEMPLATE
    make_trainer(make_model, tokenizer, None, config_kwargs, train_dataset=messages)
    assert "training version" not in caplog.text


def test_images_to_evaluate_alone_are_refused(prompt_completion, make_model, tokenizer, config_kwargs):
    data = {"train_dataset": prompt_completion, "eval_dataset": Dataset.from_list([{"prompt": "a", "images": []}])}
    with pytest.raises(ValueError, match="The eval dataset has images, which the train dataset has not"):
        make_trainer(make_model, tokenizer, None, config_kwargs, **data)


def test_tools_choose_the_named_template(make_model, tokenizer, config_kwargs):
    tokenizer.chat_template = {"default": PLAIN_TEMPLATE, "tool_use": "{{ tools | tojson }}" + PLAIN_TEMPLATE}
    messages = [{"role": "user", "content": "Sum?"}, {"role": "assistant", "content": "It is 3."}]
    rows = [{"messages": messages, "tools": tools} for tools in ([{"name": "add"}], None)]
    trainer = make_trainer(make_model, tokenizer, rows, config_kwargs)
    texts = [tokenizer.decode(row["input_ids"]) for row in trainer.train_dataset]
    assert texts[0] == '[{"name": "add"}]' + texts[1]


@pytest.mark.parametrize("packing", [False, "bfd", "wrapped"])
def test_shuffled_data_set_has_the_order_of_trl(packing, prompt_completion, make_model, tokenizer, config_kwargs):
    config_kwargs |= {"shuffle_dataset": True}
    if packing:
        config_kwargs |= {"packing": True, "packing_strategy": packing, "padding_free": packing == "bfd"}
    trainer = make_trainer(make_model, tokenizer, None, config_kwargs, train_dataset=prompt_completion)
    args = SFTConfig(completion_only_loss=False, **config_kwargs)
    expected = SFTTrainer(make_model(), args, processing_class=tokenizer, train_dataset=prompt_completion)
    assert trainer.train_dataset["input_ids"][:] == expected.train_dataset["input_ids"][:]


def test_formatting_func_that_returns_no_text_is_refused(make_model, tokenizer, config_kwargs):
    with pytest.raises(
        ValueError, match=r"`formatting_func` must return a text, but returned None for the row \{'a': 1"
    ):
        make_trainer(make_model, tokenizer, [{"a": 1}], config_kwargs, formatting_func=lambda row: None)


def test_prompt_beside_a_text_is_left_out(make_model, tokenizer, config_kwargs):
    trainer = make_trainer(make_model, tokenizer, [{"prompt": "a", "text": "b c"}], config_kwargs)
    assert completions(trainer, tokenizer) == ["b c<eos>"]


@pytest.mark.parametrize("later", [{"weight": 0.5}, {"token_weights": [0.5] * 3}])
def test_weights_that_begin_later_in_a_stream_count_once(later, make_model, tokenizer, config_kwargs):
    row = {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]}
    later = {**row, **later, "attention_mask": [1, 1, 1]}
    stream = IterableDataset.from_generator(lambda: iter([row, later]))
    trainer = make_trainer(make_model, tokenizer, None, config_kwargs | {"max_length": 2}, train_dataset=stream)
    batch = trainer.data_collator(list(trainer.train_dataset))
    torch.testing.assert_close(batch["token_weights"], torch.tensor([[0, 0.8], [0, 0.4]]))


def test_completion_without_an_answer_is_refused(make_model, tokenizer, config_kwargs):
    question = [{"role": "user", "content": "Hm?"}]
    with pytest.raises(ValueError, match=r"Row 0 .*: `completion` has no assistant turn.* Its roles are \['user'\]"):
        make_trainer(make_model, tokenizer, [{"prompt": question, "completion": question}], config_kwargs)


def test_column_that_was_meant_as_a_weight_is_told(make_model, tokenizer, config_kwargs, caplog):
    rows = [{"prompt": "a", "completion": "b", "loss_weight": 0.5}]
    make_trainer(make_model, tokenizer, rows, config_kwargs)
    assert "has ['loss_weight'], which is ignored. Rename it to `weight`" in caplog.text


def test_token_weights_in_rows_are_refused():
    with pytest.raises(ValueError, match="`token_weights` has 1 x 3 entries, but `input_ids` has 3"):
        token_weights({"input_ids": [5, 6, 7], "token_weights": [[1.0] * 3]})


def test_text_is_no_weight(make_model, tokenizer, config_kwargs):
    rows = [{"prompt": "a", "completion": "b", "weight": "0.5"}]
    with pytest.raises(ValueError, match=r"Row 0 of the train dataset: `weight` is '0\.5', but"):
        make_trainer(make_model, tokenizer, rows, config_kwargs)
    rows = [{"prompt": "a", "completion": "b", "token_weights": [0.5]}]
    with pytest.raises(ValueError, match=r"Row 0 .* has `token_weights` but no `input_ids` that they"):
        make_trainer(make_model, tokenizer, rows, config_kwargs)


@pytest.mark.parametrize("format_name", ["numpy", "torch", "pandas", "arrow"])
def test_data_in_another_format(format_name, messages, make_model, tokenizer, config_kwargs):
    trainers = [
        make_trainer(make_model, tokenizer, None, config_kwargs, train_dataset=messages.with_format(name))
        for name in (None, format_name)
    ]
    plain, formatted = (trainer.train_dataset.with_format(None) for trainer in trainers)
    assert plain.to_list() == formatted.to_list()


def test_columns_of_trl_in_the_words_of_sharegpt(make_model, tokenizer, config_kwargs):
    question, answer = ("human", "What?"), ("gpt", "That.")
    rows = [
        {"conversations": [{"from": role, "value": content} for role, content in (question, answer)]},
        {"messages": [{"from": role, "value": content} for role, content in (question, answer)]},
        {column: [{"from": role, "value": content}] for column, (role, content) in
         (("prompt", question), ("completion", answer))},
    ]  # fmt: skip
    prepared = [make_trainer(make_model, tokenizer, [row], config_kwargs).train_dataset[0] for row in rows]
    first, *others = ([row["input_ids"], row["completion_mask"]] for row in prepared)
    assert others == [first, first]
    assert "user" in tokenizer.decode(first[0])


def test_rows_without_weight_left_are_dropped(make_model, tokenizer, config_kwargs):
    rows = [{"prompt": "a", "completion": "b", "weight": weight} for weight in (1.0, 0.0)]
    assert len(make_trainer(make_model, tokenizer, rows, config_kwargs).train_dataset) == 1
    with pytest.raises(ValueError, match="No row of the train dataset has a token left to train on"):
        make_trainer(make_model, tokenizer, rows[1:], config_kwargs)


def test_conversations_on_a_template_that_trl_refuses(messages, make_model, tokenizer, config_kwargs):
    tokenizer.chat_template = PLAIN_TEMPLATE
    config_kwargs |= {"max_length": None, "assistant_only_loss": True}
    trainer = make_trainer(make_model, tokenizer, None, config_kwargs, weights=(0, 1), train_dataset=messages)
    expected = [
        "".join(f"{m['content']}<|eot_id|>\n" for m in row["messages"] if m["role"] == "assistant") for row in messages
    ]
    assert completions(trainer, tokenizer) == expected
    trainer.train()
    assert trainer.state.log_history[0]["completion_loss"] > 0


def test_tool_calls_and_rows_with_their_own_template_arguments(make_model, tokenizer, config_kwargs):
    tokenizer.chat_template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{{ style }}{% for m in messages %}<|start_header_id|>{{ m.role }}"
        "<|end_header_id|>{{ m.content or '' }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}"
    )
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    conversation = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    ]
    tools = [{"type": "function", "function": {"name": "add", "description": "Adds."}}]
    rows = [
        {"messages": conversation, "tools": tools, "chat_template_kwargs": {"style": "curt"}},
        {"messages": conversation, "tools": json.dumps(tools), "chat_template_kwargs": {"style": "kind"}},
    ]
    data = IterableDataset.from_generator(lambda: iter(rows))  # rows of different types
    trainer = make_trainer(make_model, tokenizer, None, {**config_kwargs, "max_length": None}, train_dataset=data)
    prepared = list(trainer.train_dataset)
    for row, style in zip(prepared, ("curt", "kind"), strict=True):
        assert tokenizer.decode(row["input_ids"]).startswith(f"{json.dumps(tools)}{style}")
    answer = f"{json.dumps([call])}<|eot_id|>It is 2.<|eot_id|>"
    assert completions(trainer, tokenizer, prepared) == [answer, answer]


def test_text_column_beside_prompt_and_completion(make_model, tokenizer, config_kwargs):
    rows = [{"prompt": "a\n", "completion": "b", "text": "a\nb"}]  # TRL would add the EOS token to the text instead
    trainer = make_trainer(make_model, tokenizer, rows, config_kwargs)
    assert completions(trainer, tokenizer) == ["b<eos>"]


def test_collator_takes_weights_of_rows_and_tokens():
    examples = [
        {
            "input_ids": [11, 12, 13, 14],
            "completion_mask": [0, 0, 1, 1],
            "token_weights": [1, 0.5, 0, 3],
            "weight": 0.5,
        },
        {"input_ids": [15, 16], "completion_mask": [0, 1], "weight": 2, "token_weights": [1, 1]},
    ]
    expected = torch.tensor([[0, 0.05, 0, 1.2], [0, 1.6, 0, 0]])
    batch = DataCollatorForWIT(pad_token_id=0)(examples)
    torch.testing.assert_close(batch["token_weights"], expected)
    assert batch["labels"].tolist() == [[-100, 12, -100, 14], [-100, 16, -100, -100]]
    flat = DataCollatorForWIT(pad_token_id=0, padding_free=True, pad_to_multiple_of=4)(examples)
    torch.testing.assert_close(flat["token_weights"], torch.tensor([[0, 0.05, 0, 1.2, 0, 1.6, 0, 0]]))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("columns", [["prompt", "completion"], ["messages"], ["text"]])
def test_columns_of_tokens_beside_rows_without_tokens_mean_nothing(
    columns, streaming, prompt_completion, messages, make_model, tokenizer, config_kwargs
):
    data = messages if columns == ["messages"] else prompt_completion
    if columns == ["text"]:
        data = prompt_completion.map(lambda row: {"text": row["completion"]}).select_columns("text")
    data = data.select(range(4))
    stray = data.to_list()
    for number, row in enumerate(stray):
        row |= {"completion_mask": [1], "attention_mask": [0, 1], "turn_weights": [2.0], "truncated": True}
        row |= {"labels": number, "assistant_masks": None} if number else {}
    stream = IterableDataset.from_generator(lambda: iter(stray))
    prepared = []
    for dataset in (data, stream if streaming else Dataset.from_list(stray)):
        trainer = make_trainer(make_model, tokenizer, None, config_kwargs, train_dataset=dataset)
        names = ("input_ids", "completion_mask", "token_weights", "truncated")
        prepared.append([[np.asarray(row[name]).tolist() for name in names] for row in trainer.train_dataset])
    assert prepared[0] == prepared[1]


@pytest.mark.parametrize("name", ["test", "train"])
def test_assistant_only_loss_holds_for_an_evaluation_set_of_pairs(name, messages, make_model, tokenizer, config_kwargs):
    turns = [{"role": "user", "content": "Sum?"}, {"role": "assistant", "content": "It is 3."}]
    pairs = Dataset.from_list([{"prompt": turns[:1], "completion": [turns[1], *turns]}])
    config_kwargs |= {"assistant_only_loss": True, "max_length": None}
    trainer = make_trainer(
        make_model, tokenizer, None, config_kwargs, (0, 1), train_dataset=messages, eval_dataset={name: pairs}
    )
    expected = "It is 3.<|eot_id|>" * 2  # without the question in between
    assert completions(trainer, tokenizer, trainer.eval_dataset[name]) == [expected]
    assert "<|start_header_id|>" not in completions(trainer, tokenizer)[0]


def test_training_set_that_is_evaluated_too_keeps_its_rows_there(make_model, tokenizer, config_kwargs):
    data = Dataset.from_list([{"prompt": "a" * 200, "completion": "b"}, {"prompt": "a", "completion": "b"}])
    config_kwargs |= {"max_length": 20}
    trainer = make_trainer(
        make_model, tokenizer, None, config_kwargs, (0, 1), train_dataset=data, eval_dataset={"train": data}
    )
    assert (len(trainer.train_dataset), len(trainer.eval_dataset["train"])) == (1, 2)
    trainer.evaluate(trainer.train_dataset)
    assert trainer.weight_report().dropped == 1


def test_empty_stream_is_refused(make_model, tokenizer, config_kwargs):
    empty = IterableDataset.from_generator(lambda: iter(()))
    with pytest.raises(ValueError, match=r"`train_dataset` is empty\. Check the file"):
        make_trainer(make_model, tokenizer, None, config_kwargs, train_dataset=empty)


def test_tool_call_without_content_on_a_template_without_tools_is_explained(make_model, tokenizer, config_kwargs):
    tokenizer.chat_template = PLAIN_TEMPLATE.replace("{{ m.content }}", "{{ m.content + '' }}")
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}]}
    rows = [{"messages": [{"role": "user", "content": "Sum?"}, call]}]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(
        ValueError, match=r"tool calls.* (`chat_template_path`).*|Choose a template that supports tools"
    ):
        list(make_trainer(make_model, tokenizer, None, config_kwargs, train_dataset=stream).train_dataset)


@pytest.mark.parametrize("streaming", [False, True])
def test_formatting_func_may_read_any_column(streaming, make_model, tokenizer, config_kwargs):
    rows = [{"sentence": "It rains", "labels": "weather", "truncated": True}] * 2
    data = IterableDataset.from_generator(lambda: iter(rows)) if streaming else Dataset.from_list(rows)
    trainer = make_trainer(
        *(make_model, tokenizer, None, config_kwargs),
        train_dataset=data,
        formatting_func=lambda row: f"{row['sentence']} is {row['labels']}",
    )
    for row in trainer.train_dataset:
        assert tokenizer.decode(row["input_ids"]) == "It rains is weather<eos>"
        assert set(row["completion_mask"]) == {1}
        assert not row["truncated"]


@pytest.mark.parametrize("weights", [(0.2, 0.8), (0.0, 1.0)])
def test_stream_without_end_is_not_read_to_its_end(weights, make_model, tokenizer, config_kwargs):
    """Of its first rows none keeps its completion, but there are others."""
    config_kwargs |= {"max_length": 15, "report_to": "none"}
    long, short = ({"input_ids": [7] * n, "completion_mask": [0] * (n - 5) + [1] * 5} for n in (20, 10))
    stream = IterableDataset.from_generator(
        lambda: itertools.chain(itertools.repeat(long, 1200), itertools.repeat(short))
    )
    trainer = make_trainer(make_model, tokenizer, None, config_kwargs, weights, train_dataset=stream)
    assert 1 in next(iter(trainer.train_dataset.skip(1200 if weights[0] else 0)))["completion_mask"]


SAID = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "ok"}]


@pytest.mark.parametrize(
    "row",
    [
        {"system": "BE KIND", "messages": SAID},
        {"system": "BE KIND", "conversations": [{"from": "human", "value": "go"}, {"from": "gpt", "value": "ok"}]},
        {"system": "BE KIND", "prompt": SAID[:1], "completion": SAID[1:]},
    ],
    ids=["messages", "sharegpt", "pair"],
)
def test_system_column_is_the_first_turn(row, make_model, tokenizer, config_kwargs):
    tokenizer.chat_template = (CHAT_TEMPLATES / "qwen2_5.jinja").read_text(encoding="utf-8")
    config_kwargs |= {"max_length": None}
    (prepared,) = make_trainer(make_model, tokenizer, [row], config_kwargs).train_dataset
    system = {"role": "system", "content": "BE KIND"}
    turns = {"messages": [system, *SAID]}
    if "prompt" in row:
        turns = {"prompt": [system, SAID[0]], "completion": SAID[1:]}
    (expected,) = make_trainer(make_model, tokenizer, [turns], config_kwargs).train_dataset
    for name in ("input_ids", "completion_mask", "token_weights"):
        assert prepared[name] == expected[name]
    (plain,) = make_trainer(make_model, tokenizer, [{**row, "system": None}], config_kwargs).train_dataset
    assert plain["input_ids"] != prepared["input_ids"]


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (
            {"system": "B", "messages": [{"role": "system", "content": "A"}, *SAID]},
            "`messages` has a turn of the system",
        ),
        ({"system": ["B"], "messages": SAID}, r"`system` must be a text, but is \['B'\]"),
        ({"messages": [SAID[0], {**SAID[1], "loss": 0}]}, r"turn 1 of `messages` \(assistant\) has \['loss'\]"),
        (
            {"messages": [{**SAID[0], "trainable": False}, SAID[1]]},
            r"turn 0 of `messages` \(user\) has \['trainable'\]",
        ),
        (
            {"messages": [SAID[0], {**SAID[1], "function_call": {"name": "f", "arguments": "{}"}}]},
            r"turn 1 of `messages` \(assistant\) has `function_call`, .* Make it `tool_calls`",
        ),
        (
            {"prompt": SAID[:1], "completion": [{**SAID[1], "loss_mask": 1}]},
            r"turn 0 of `completion` .* \['loss_mask'\], which means .* Write `weight` in its place: 0 leaves",
        ),
        (
            {"messages": [SAID[0], {**SAID[1], "loss_weight": 1.0}]},
            r"turn 1 of `messages` \(assistant\) has \['loss_weight'\], .* `wit_trl\.to_trl_format` does so\.$",
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "train": False}]},
            r"turn 1 of `conversations` \(gpt\) has \['train'\], by which other libraries .* Rename it to `weight`",
        ),
    ],
)
def test_system_twice_and_keys_of_other_libraries_are_refused(row, error, make_model, tokenizer, config_kwargs):
    with pytest.raises(ValueError, match=f"^Row 0 of the train dataset: {error}"):
        make_trainer(make_model, tokenizer, [row], config_kwargs)


@pytest.mark.parametrize(
    ("row", "ignored"),
    [
        ({"messages": SAID, "history": [["a", "b"]]}, r"\['history'\]"),
        ({"messages": SAID, "system_prompt": "Be kind.", "functions": "[]"}, r"\['functions', 'system_prompt'\]"),
        ({"prompt": "a", "completion": " b", "system": "c", "tools": "[]"}, r"\['system', 'tools'\]"),
        ({"messages": SAID, "loss_weight": 0.5}, r"\['loss_weight'\]"),
        ({"messages": SAID, "loss_scale": 0.5, "train": True}, r"\['loss_scale', 'train'\], by which other .*, and"),
        ({"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}, r"\['loss_mask'\], by which other libraries weigh .*, and"),
    ],
)
def test_columns_of_other_formats_that_are_ignored_are_named(
    row, ignored, make_model, tokenizer, config_kwargs, caplog
):
    make_trainer(make_model, tokenizer, [row], config_kwargs)
    assert re.search(f"The train dataset has {ignored},? which is ignored", caplog.text)


@pytest.mark.parametrize("streaming", [False, True])
def test_null_arguments_that_arrow_adds_are_left_out_and_told(streaming, make_model, tokenizer, config_kwargs, caplog):
    tokenizer.chat_template = (CHAT_TEMPLATES / "qwen3_training.jinja").read_text(encoding="utf-8")
    config_kwargs |= {"max_length": None}
    rows = []
    for arguments in ({"x": 1}, {"te\x1bxt": "hi"}):
        call = {"type": "function", "function": {"name": "f0", "arguments": arguments}}
        rows.append({"messages": [SAID[0], {"role": "assistant", "content": "", "tool_calls": [call]}]})
    assert Dataset.from_list(rows)[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {
        "x": 1,
        "te\x1bxt": None,
    }
    data = Dataset.from_list(rows)
    data = data.to_iterable_dataset() if streaming else data
    prepared = make_trainer(make_model, tokenizer, data, config_kwargs).train_dataset
    assert (
        "Row 0 of the train dataset: in turn 1 of `messages`, the argument 'te\\x1bxt' of the call of 'f0' is"
        in caplog.text
    )
    texts = [tokenizer.decode(row["input_ids"]) for row in prepared]
    assert '"arguments": {"x": 1}}' in texts[0]
    assert '"arguments": {"te\\u001bxt": "hi"}}' in texts[1]


@pytest.mark.parametrize("as_turns", [False, True])
def test_assistant_only_loss_with_a_weight_on_prompts_is_refused(as_turns, make_model, tokenizer, config_kwargs):
    turns = [{"from": "human", "value": "go"}, {"from": "gpt", "value": "ok"}]
    rows = [{"conversations": turns} if as_turns else {"messages": SAID}]
    config_kwargs |= {"assistant_only_loss": True}
    with pytest.raises(ValueError, match=r"`assistant_only_loss=True` contradicts `prompt_loss_weight=0\.2`"):
        make_trainer(make_model, tokenizer, rows, config_kwargs)
    make_trainer(make_model, tokenizer, rows, config_kwargs, weights=(0, 1))


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated")
@pytest.mark.parametrize("max_length", [-1, 0])
def test_length_that_is_none_is_refused(max_length, prompt_completion, make_model, tokenizer, config_kwargs):
    config_kwargs |= {"max_length": max_length, "truncation_mode": "keep_end"}
    with pytest.raises(ValueError, match=f"`max_length` is {max_length}, but must be a number of tokens, or None"):
        make_trainer(make_model, tokenizer, prompt_completion, config_kwargs)


PADDED = {
    "input_ids": [0, 0, 0, 5, 9, 17, 2, 0],
    "attention_mask": [0, 0, 0, 1, 1, 1, 1, 0],
    "completion_mask": [0, 0, 0, 0, 1, 1, 1, 0],
}
TEXT = {name: values[3:7] for name, values in PADDED.items()}


@pytest.mark.parametrize("skip", [False, True])
def test_padding_of_tokenized_rows_is_no_text(skip, make_model, tokenizer, config_kwargs):
    config_kwargs |= {"dataset_kwargs": {"skip_prepare_dataset": skip}, "per_device_train_batch_size": 1}
    batches, losses = [], []
    for row in (PADDED, TEXT):
        trainer = make_trainer(make_model, tokenizer, [row], config_kwargs, weights=(1, 1))
        batches.append(next(iter(trainer.get_train_dataloader())))
        losses.append(trainer.evaluate(eval_dataset=trainer.train_dataset)["eval_loss"])
    assert batches[0].keys() == batches[1].keys()
    assert all(batches[0][name].tolist() == batches[1][name].tolist() for name in batches[0])
    logits = make_model()(torch.tensor([TEXT["input_ids"]])).logits[0].double()
    expected = [-logits[i].log_softmax(-1)[token].item() for i, token in enumerate(TEXT["input_ids"][1:])]
    assert losses[0] == losses[1] == pytest.approx(sum(expected) / len(expected), rel=1e-5)


@pytest.mark.parametrize("mask", [[0, 0, 0, 0], [1, 0, 1, 1]])
def test_mask_that_leaves_out_tokens_of_the_text_is_refused(mask, make_model, tokenizer, config_kwargs):
    with pytest.raises(ValueError, match=r"^Row 0 of the train dataset: `attention_mask` must be 1 for the tokens"):
        make_trainer(make_model, tokenizer, [{**TEXT, "attention_mask": mask}], config_kwargs)


def test_number_in_the_place_of_a_text_is_named(make_model, tokenizer, config_kwargs):
    with pytest.raises(ValueError, match=r"Row 0 .*`completion` must be a text, but is the number 3\. Cast the column"):
        make_trainer(make_model, tokenizer, [{"prompt": "1 + 2?", "completion": 3}], config_kwargs)
