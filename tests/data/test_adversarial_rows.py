"""Random and hostile rows: either they train with the right mask, or the error names the row."""

import pytest
import torch
from datasets import IterableDataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ..conftest import SPECIAL_TOKENS, train_tokenizer
from ..helpers import make_trainer


SETTINGS = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
HOSTILE = [
    "<|eot_id|>",
    "<eos>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "{{ 1 / 0 }}",
    "\n\n",
    "word " * 99,
]
TEXTS = st.text(max_size=9) | st.sampled_from(HOSTILE)
WEIGHTS = st.sampled_from([0, 0.5, 2])
WRONG_WEIGHTS = st.sampled_from([-1, "1", float("nan"), [1, 2], 10**400])
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": TEXTS}, optional={"weight": WEIGHTS}
)
WRONG_MESSAGES = (
    st.fixed_dictionaries({}, optional={"role": st.just("user"), "weight": WEIGHTS})
    | st.fixed_dictionaries({"role": st.none() | st.just(3), "content": TEXTS})
    | st.fixed_dictionaries({"role": st.just("assistant"), "content": st.none() | st.integers()})
    | st.fixed_dictionaries({"role": st.just("user"), "content": TEXTS, "weight": WRONG_WEIGHTS})
    | st.fixed_dictionaries({"role": st.just("user"), "content": st.just([{"type": "text", "text": "parts"}])})
    | st.fixed_dictionaries({"role": st.just("assistant"), "tool_calls": st.just([{"name": "add", "arguments": {}}])})
    | st.none()
    | TEXTS
)
WRONG_TEXTS = st.just("half of a pair: \ud800") | st.none() | st.integers() | st.lists(WRONG_MESSAGES, max_size=2)


@pytest.fixture(scope="session")
def trained_tokenizer():
    """The one of all tests has no token for most characters."""
    return train_tokenizer(SPECIAL_TOKENS)


@pytest.fixture
def prepare(prompt_completion, make_model, tokenizer, config_kwargs):
    """A function that prepares a row after a good one, as a stream, checks that it gives a loss, and returns it."""
    data = prompt_completion.select(range(2))
    trainer = make_trainer(make_model, tokenizer, None, config_kwargs, train_dataset=data)

    def prepare_row(good, row):
        stream = IterableDataset.from_generator(lambda: iter([good, row]))
        prepared = list(trainer._prepare_dataset(stream, tokenizer, trainer.args, False, None, "train"))
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(prepared))
        assert torch.isfinite(loss)
        assert loss > 0
        assert len(prepared[1]["input_ids"]) <= 64
        assert not {"weight", "labels", "attention_mask"} & set(prepared[1])  # which a collator would read once more
        return prepared[1]

    return prepare_row


def region(tokenizer, row, value):
    pairs = zip(row["input_ids"], row["completion_mask"], strict=True)
    return tokenizer.decode([token for token, region in pairs if region == value])


def assert_refused(prepare, good, row):
    with pytest.raises(ValueError, match=r"^Row 1 of the train dataset: ") as error:
        prepare(good, row)
    assert len(str(error.value)) > 50


@SETTINGS
@given(prompt=TEXTS, completion=TEXTS, weight=WEIGHTS)
def test_prompt_and_completion(prompt, completion, weight, prepare, tokenizer):
    row = prepare(
        {"prompt": "What?", "completion": "That."}, {"prompt": prompt, "completion": completion, "weight": weight}
    )
    completion = completion.removesuffix("<eos>") + "<eos>"
    whole = tokenizer(prompt + completion)["input_ids"]
    assert row["input_ids"] == whole[:64]
    assert set(row["token_weights"]) == {weight}
    # A token that merges the end of the prompt with the completion is completion
    assert prompt.startswith(region(tokenizer, row, 0))
    if len(whole) <= 64:
        assert region(tokenizer, row, 1).endswith(completion)


@SETTINGS
@given(
    row=st.fixed_dictionaries({}, optional={"prompt": TEXTS, "completion": WRONG_TEXTS})
    | st.fixed_dictionaries({"prompt": WRONG_TEXTS, "completion": TEXTS})
    | st.fixed_dictionaries({"prompt": WRONG_TEXTS, "completion": WRONG_TEXTS})
    | st.fixed_dictionaries({"prompt": TEXTS, "completion": TEXTS, "weight": WRONG_WEIGHTS})
)
def test_wrong_prompt_and_completion(row, prepare):
    assert_refused(prepare, {"prompt": "What?", "completion": "That."}, row)


GOOD = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]}


@pytest.fixture(params=["marked", "rendered"])
def template(request, tokenizer):
    """A template whose marks TRL adds, or one whose turns are found by rendering. Both strip the content."""
    if request.param == "rendered":
        tokenizer.chat_template = (
            "{% set header = '<|start_header_id|>%s<|end_header_id|>\n\n' %}{% for m in messages %}"
            "{{ header % m.role }}{{ m.content | trim }}<|eot_id|>{% endfor %}"
            "{% if add_generation_prompt %}{{ header % 'assistant' }}{% endif %}"
        )


@SETTINGS
@given(messages=st.lists(MESSAGES, min_size=1, max_size=4))
def test_messages(messages, template, prepare, tokenizer):
    if not any(message["role"] == "assistant" for message in messages):
        assert_refused(prepare, GOOD, {"messages": messages})
        return
    row = prepare(GOOD, {"messages": messages})
    answers = [f"{m['content'].strip()}<|eot_id|>" for m in messages if m["role"] == "assistant"]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered.startswith(tokenizer.decode(row["input_ids"]).rstrip("\ufffd"))  # cut within a character
    if len(row["input_ids"]) < 64:
        assert region(tokenizer, row, 1) == "".join(answers)
        assert set(row["token_weights"]) == {message.get("weight", 1) for message in messages}


@SETTINGS
@given(messages=st.lists(MESSAGES, max_size=2), wrong=WRONG_MESSAGES, position=st.integers(0, 2))
def test_wrong_messages(messages, wrong, position, prepare):
    assert_refused(prepare, GOOD, {"messages": [*messages[:position], wrong, *messages[position:]]})


@SETTINGS
@given(row=st.just({}) | st.fixed_dictionaries({"messages": st.none() | st.integers() | TEXTS | st.just([])}))
def test_no_messages(row, prepare):
    assert_refused(prepare, GOOD, row)


@SETTINGS
@given(row=st.just({}) | st.fixed_dictionaries({"conversations": WRONG_TEXTS}))
def test_wrong_sharegpt(row, prepare):
    good = {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]}
    assert_refused(prepare, good, row)


@SETTINGS
@given(row=st.just({}) | st.fixed_dictionaries({"text": WRONG_TEXTS}))
def test_wrong_text(row, prepare):
    assert_refused(prepare, {"text": "What? That."}, row)
