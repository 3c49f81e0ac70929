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
