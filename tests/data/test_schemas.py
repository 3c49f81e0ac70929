import pytest
from datasets import Dataset, IterableDataset

from wit_trl import to_trl_format

from ..helpers import make_trainer
from .test_preparation import completions


ALPACA = {
    "instruction": "Add them.",
    "input": "1, 2",
    "output": "It is 3.",
    "text": "Below is an instruction.",
    "weight": 0.5,
}
DOLLY = {"instruction": "Add them.", "context": "1, 2", "response": "It is 3.", "category": "closed_qa"}
WIT = {"prompt": "### Instruction:\nAdd 1 and 2.\n\n### Response:\n", "response": "It is 3.###eos_token###"}
SHAREGPT = {"conversations": [{"from": "human", "value": "Add 1 and 2."}, {"from": "gpt", "value": "It is 3."}]}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("row", "chat_template"),
    [(ALPACA, True), (ALPACA, False), (DOLLY, True), (DOLLY, False), (WIT, True), (WIT, False), (SHAREGPT, True)],
)
def test_completion_is_the_answer_with_its_end_of_turn(
    row, chat_template, streaming, make_model, tokenizer, config_kwargs
):
    if not chat_template:
        tokenizer.chat_template = None
    data = Dataset.from_list([row])
    data = to_trl_format(data.to_iterable_dataset() if streaming else data, tokenizer)
    trainer = make_trainer(make_model, tokenizer, None, {**config_kwargs, "max_length": None}, train_dataset=data)
    (prepared,) = trainer.train_dataset
    end = "<|eot_id|>" if chat_template and row is not WIT else "<eos>"
    space = " " if row is WIT else ""  # with which the original scripts join prompt and response
    assert completions(trainer, tokenizer, [prepared]) == [f"{space}It is 3.{end}"]
    whole = tokenizer.decode(prepared["input_ids"])
    assert whole.endswith(f"It is 3.{end}")
    assert ("Add them.\n\n1, 2" if row in (ALPACA, DOLLY) else "Add 1 and 2.") in whole
    assert set(prepared["token_weights"]) == {row.get("weight", 1)}
    assert "Below is" not in whole


def test_empty_input_leaves_no_gap(tokenizer):
    rows = [{**ALPACA, "input": ""}, {**ALPACA, "input": None}]
    for row in to_trl_format(Dataset.from_list(rows), tokenizer):
        assert row["prompt"] == [{"role": "user", "content": "Add them."}]
    without = Dataset.from_list([{"instruction": "Add them.", "output": "3"}])
    assert to_trl_format(without, tokenizer, conversational=False)[0] == {"prompt": "Add them.\n\n", "completion": "3"}


@pytest.mark.parametrize(
    "columns", [["prompt", "completion"], ["messages"], ["conversations"], ["text"], ["input_ids"]]
)
def test_format_of_trl_is_kept(columns, tokenizer):
    data = Dataset.from_list([dict.fromkeys(columns, "a")])
    assert to_trl_format(data, tokenizer) is data


def test_unknown_schema_is_refused(tokenizer):
    message = (
        r"The columns \['answer', 'question'\] are those of no known schema\. Known are Alpaca \(instruction, input, "
        r"output\), Dolly \(instruction, context, response\), WIT \(prompt, response\), ShareGPT "
        r"\(conversations\) and TRL's own"
    )
    with pytest.raises(ValueError, match=message):
        to_trl_format(Dataset.from_list([{"question": "a", "answer": "b"}]), tokenizer)


def test_questions_and_answers_are_refused_with_their_new_names(tokenizer):
    with pytest.raises(ValueError, match="Rename `question` to `prompt` and `answer` to `completion`, and remove"):
        to_trl_format(Dataset.from_list([{"question": "a", "answer": "b", "id": 1}]), tokenizer)


@pytest.mark.parametrize(("columns", "name"), [(["prompt"], "completion"), ([], "messages"), (["id"], "messages")])
def test_preference_data_is_refused_with_the_trainer_for_it(columns, name, tokenizer):
    message = rf"are preference data, for TRL's `DPOTrainer`\. To .* alone, rename `chosen` to `{name}` and remove `rej"
    with pytest.raises(ValueError, match=message):
        to_trl_format(Dataset.from_list([dict.fromkeys([*columns, "chosen", "rejected"], "text")]), tokenizer)


@pytest.mark.parametrize(
    "columns",
    [
        ("instruction", "input", "response"),
        ("instruction", "context", "output"),
        ("prompt", "input", "response"),
        ("system", "instruction", "input", "output"),
        ("system", "instruction", "input", "output", "text"),
    ],
)
def test_schema_of_which_a_part_would_be_dropped_is_refused(columns, tokenizer):
    with pytest.raises(ValueError, match=r"are those of no known schema\. .* remove those that are of none or"):
        to_trl_format(Dataset.from_list([dict.fromkeys(columns, "text")]), tokenizer)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"instruction": None}, r"None\. Make it a text, or remove the row\.$"),
        ({"output": None}, r"None\. Make it a text, or remove the row\.$"),
        ({"input": ["x"]}, r"\['x'\]\. Make it a text, or remove the row\.$"),
        ({"output": 3}, r"3\. Make it a text, as `dataset\.cast_column\('output', datasets\.Value\('string'\)\)` does"),
        ({"input": 0}, r"0\. Make it a text, as `dataset.* does, or put it into quotes in JSON\.$"),
        ({"input": 0.5}, r"0\.5\. Make it a text, as `dataset\.cast_column\('input'"),
    ],
)
def test_row_without_text_is_refused(wrong, said, tokenizer):
    (column,) = wrong
    with pytest.raises(ValueError, match=rf"Row 1: `{column}` must be a text, but is {said}"):
        list(to_trl_format(IterableDataset.from_generator(lambda: iter([ALPACA, {**ALPACA, **wrong}])), tokenizer))
    stream = IterableDataset.from_generator(lambda: iter([ALPACA, {"input": "a"}]))
    with pytest.raises(ValueError, match="Row 1: `instruction` must be a text, but is None"):
        list(to_trl_format(stream, tokenizer))


def with_keys(column, **keys):
    """A row whose last message has these keys."""
    if column == "conversations":
        return {column: [SHAREGPT[column][0], {**SHAREGPT[column][1], **keys}]}
    question, answer = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2", **keys}
    if column == "messages":
        return {column: [question, answer]}
    # TRL has no turn of the assistant in a prompt, but ours may
    return {"prompt": [question, answer] * 2, "completion": [answer]}


@pytest.mark.parametrize("source", ["stored", "stream", "generator"])
@pytest.mark.parametrize("column", ["messages", "conversations", "prompt"])
@pytest.mark.parametrize(
    ("keys", "weights"),
    [
        ({"loss_weight": [0.25, 0.0, None, 1.0]}, [0.25, 0, None, 1]),
        ({"loss_scale": [2, 0, 1, None]}, [2, 0, 1, None]),
        ({"loss": [True, False, None, True]}, [1, 0, None, 1]),
        ({"train": [False, True, None, False], "training": [None, True, False, False]}, [0, 1, 0, 0]),
        ({"trainable": [1, 0, None, 0], "loss_scale": [1.0, None, 0.5, None]}, [1, 0, 0.5, 0]),
        ({"loss": [True, None, None, False], "weight": [None, 0.5, None, None]}, [1, 0.5, None, 0]),
        ({"mask": [None] * 4, "loss": [False, True, None, True]}, [0, 1, None, 1]),
    ],
)
def test_keys_of_other_libraries_become_weights(keys, weights, column, source, tokenizer):
    rows = [with_keys(column, **dict(zip(keys, values, strict=True))) for values in zip(*keys.values(), strict=True)]
    data = Dataset.from_list(rows)
    if source == "generator":  # without features
        data = IterableDataset.from_generator(lambda: iter(rows))
    elif source == "stream":
        data = data.to_iterable_dataset()
    made = [*to_trl_format(data, tokenizer)]
    for row, expected, weight in zip(made, rows, weights, strict=True):
        assert row.keys() == expected.keys()
        for name in expected:
            for turn, before in zip(row[name], expected[name], strict=True):
                wanted = {key: value for key, value in before.items() if key not in keys and value is not None}
                if keys.keys() <= before.keys() and weight is not None:
                    wanted["weight"] = weight
                assert {key: value for key, value in turn.items() if value is not None} == wanted


def test_keys_beside_contents_of_two_types_become_weights(tokenizer):
    """Such messages are read as JSON. The features do not name their keys."""
    rows = [with_keys("messages"), with_keys("messages", content=[{"type": "text", "text": "2"}], loss=False)]
    data = Dataset.from_list(rows, on_mixed_types="use_json")
    made = to_trl_format(data, tokenizer)[1]["messages"][1]
    assert made == {"role": "assistant", "content": [{"type": "text", "text": "2"}], "weight": 0}


def test_keys_of_later_rows_become_weights(tokenizer):
    rows = [with_keys("messages")] * 1500 + [with_keys("messages", loss=False)]
    made = to_trl_format(Dataset.from_list(rows), tokenizer)
    assert [message.get("weight") for row in (made[0], made[-1]) for message in row["messages"]] == [None] * 3 + [0]
    assert made.features["messages"].feature.keys() == {"role", "content", "weight"}


@pytest.mark.parametrize(
    "row",
    [with_keys("messages"), with_keys("messages", weight=0.5), {"messages": "a"}, {"prompt": "a", "completion": "b"}],
)
def test_data_without_such_keys_is_kept(row, tokenizer):
    data = Dataset.from_list([row])
    assert to_trl_format(data, tokenizer) is data
    stream = data.to_iterable_dataset()
    assert to_trl_format(stream, tokenizer) is stream


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"loss": "last_round"}, r"has the `loss` 'last_round', but it must be true or false"),
        ({"trainable": 0.5}, r"has the `trainable` 0\.5, but it must be true or false"),
        ({"loss_weight": "high"}, r"has the `loss_weight` 'high', but a weight must be a finite number"),
        ({"loss_weight": True}, r"has the `loss_weight` True, but a weight must be"),
        ({"loss_scale": -1.0}, r"has the `loss_scale` -1\.0, but a weight must be"),
        (
            {"loss": True, "loss_scale": 0.5},
            r"has \{'loss': 1\.0, 'loss_scale': 0\.5\}\. Leave one of them, best the `weight`",
        ),
        ({"loss": True, "weight": 1.0}, r"has \{'loss': 1\.0, 'weight': 1\.0\}\. Leave one of them"),
        ({"mask": 1}, r"has \['mask'\], which .* Write `weight` in its place: 0 leaves .* or .*\{'type': 'text', 'tex"),
        ({"loss_mask": False, "loss": False}, r"has \['loss_mask'\], which"),
        ({"training_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}, r"has \['training_detail'\]"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_keys_of_other_libraries_without_one_meaning_are_refused(keys, said, streaming, tokenizer):
    for column in ("messages", "conversations", "prompt"):
        rows = [with_keys(column, **dict.fromkeys(keys)), with_keys(column, **keys)]
        data = IterableDataset.from_generator(lambda rows=rows: iter(rows)) if streaming else Dataset.from_list(rows)
        with pytest.raises(ValueError, match=rf"^Row 1: turn 1 of `{column}` {said}"):
            list(to_trl_format(data, tokenizer))


def test_numbers_of_other_libraries_train_as_weights(make_model, tokenizer, config_kwargs):
    rows = [with_keys("messages", loss_weight=weight) for weight in (0.5, 2.0)]
    data = to_trl_format(Dataset.from_list(rows), tokenizer)
    trainer = make_trainer(make_model, tokenizer, None, {**config_kwargs, "max_length": None}, train_dataset=data)
    for row, weight in zip(trainer.train_dataset, (0.5, 2.0), strict=True):
        weights = [w for w, region in zip(row["token_weights"], row["completion_mask"], strict=True) if region == 1]
        assert {*weights} == {weight}
