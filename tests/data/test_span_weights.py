"""Weights of spans, of parts of contents, of what patterns match, and which turns are completion."""

import io

import numpy as np
import pytest
import torch
from datasets import Dataset
from rich.console import Console

from wit_trl import WITSFTConfig
from wit_trl.conversation import patterns
from wit_trl.data import training_rows
from wit_trl.report.rows import show_row
from wit_trl.weights import SPANS

from .test_structure_weights import weighted


THINKING_TEMPLATE = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[call {{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
    "<|eot_id|>\n{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}"
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
AGENT = [
    {"role": "user", "content": "What is the sum?"},
    {"role": "assistant", "content": "First.", "reasoning_content": "I add.", "tool_calls": [CALL]},
    {"role": "tool", "name": "add", "content": "3"},
    {"role": "assistant", "content": "It is three.", "reasoning_content": "So it is."},
]
WEIGHTS = {"thinking": 0.0, "tool_calls": 2.0, "answer": 0.5, "end_of_turn": 3.0}


@pytest.fixture(autouse=True)
def template(tokenizer):
    tokenizer.chat_template = THINKING_TEMPLATE


def texts_of(row, tokenizer):
    """The text of each span of a row."""
    found = dict.fromkeys(SPANS[1:], "")
    codes, tokens = np.asarray(row["token_spans"]), np.asarray(row["input_ids"])
    for code in range(1, len(SPANS)):
        found[SPANS[code]] = tokenizer.decode(tokens[codes % 8 == code])
    return found


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["messages", "pairs"])
def test_spans_of_an_agent(kind, streaming, prepare, tokenizer):
    row = {"messages": AGENT} if kind == "messages" else {"prompt": AGENT[:1], "completion": AGENT[1:]}
    trainer, _ = prepare([row], streaming=streaming, span_loss_weights=WEIGHTS)
    (row,) = trainer.train_dataset
    found = texts_of(row, tokenizer)
    assert found["thinking"] == "<think>I add.</think><think>So it is.</think>"
    assert found["tool_calls"] == '[call add {"a": 1}]'
    assert found["answer"] == "First.It is three."
    weights = {
        name: set(np.asarray(row["token_weights"])[np.asarray(row["token_spans"]) == code])
        for code, name in enumerate(SPANS)
        if name
    }
    assert weights == {name: {weight} for name, weight in WEIGHTS.items()}
    assert {1.0} == set(np.asarray(row["token_weights"])[np.asarray(row["token_spans"]) == 0])


@pytest.mark.parametrize(
    "layout", [{}, {"padding_free": True}, {"packing": True, "max_length": 512}, {"max_length": 90}], ids=str
)
def test_spans_are_token_weights_by_hand(layout, prepare):
    rows = [{"messages": AGENT}, {"messages": AGENT[:2]}, {"messages": AGENT[2:]}]
    rows[2]["messages"] = [AGENT[0], AGENT[3]]
    plain, _ = prepare(rows, max_length=layout.get("max_length"))
    prepared, _ = prepare(rows, max_length=layout.get("max_length"), span_loss_weights=WEIGHTS)
    factors = np.array([1.0, *WEIGHTS.values()])
    by_hand = [
        {name: row[name] for name in ("input_ids", "completion_mask")}
        | {"token_weights": factors[np.asarray(spans["token_spans"])].tolist()}
        for row, spans in zip(plain.train_dataset, prepared.train_dataset, strict=True)
    ]
    batch = {"per_device_train_batch_size": 3}
    _, spans = prepare(rows, 1, span_loss_weights=WEIGHTS, **layout, **batch)
    _, expected = prepare(by_hand, 1, **layout, **batch)
    assert spans.logs[0]["loss"] == expected.logs[0]["loss"]
    torch.testing.assert_close(spans.gradients[0], expected.gradients[0], rtol=0, atol=0)
    assert "completion_thinking_loss" not in expected.logs[0]


def test_weights_of_one_change_nothing_but_what_is_logged(prepare):
    rows = [{"messages": AGENT}, {"messages": AGENT[:2]}]
    (_, plain), (_, ones) = (
        prepare(rows, steps=1, **kwargs) for kwargs in ({}, {"span_loss_weights": dict.fromkeys(WEIGHTS, 1)})
    )
    torch.testing.assert_close(plain.gradients, ones.gradients, rtol=0, atol=0)
    added = ones.logs[0].keys() - plain.logs[0].keys()
    assert added == {f"completion_{name}_loss" for name in WEIGHTS}
    assert {name: ones.logs[0][name] for name in plain.logs[0] if "time" not in name} == {
        name: value for name, value in plain.logs[0].items() if "time" not in name
    }


def test_losses_of_spans_add_up_to_that_of_the_completion(prepare):
    rows = [{"messages": AGENT}, {"messages": [AGENT[0], AGENT[3]]}]
    trainer, _ = prepare(rows, span_loss_weights={"thinking": 0.5})
    metrics = trainer.evaluate(Dataset.from_list(rows))
    by_row = trainer.evaluate_rows(Dataset.from_list(rows))
    for name in SPANS[1:]:
        total, count = (sum(by_row[f"completion_{name}_{what}"]) for what in ("nll", "tokens"))
        assert metrics[f"eval_completion_{name}_loss"] == pytest.approx(total / count)
    of_spans = [sum(sum(by_row[f"completion_{name}_{what}"]) for name in SPANS[1:]) for what in ("nll", "tokens")]
    assert of_spans == pytest.approx([sum(by_row["completion_nll"]), sum(by_row["completion_tokens"])])


def test_table_and_rows_tell_of_spans(prepare, tokenizer):
    messages = [*AGENT, {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So it is: 3."}]
    settings = {"span_loss_weights": {"thinking": 0.5}, "regex_loss_weights": {r"\d": 3.0}}
    trainer, _ = prepare([{"messages": messages}], **settings)
    report = trainer.weight_report()
    row = trainer.train_dataset[0]
    codes, weights = np.asarray(row["token_spans"]), np.asarray(row["token_weights"])
    digits = codes >> 3 & 1 == 1
    assert tokenizer.decode(np.asarray(row["input_ids"])[digits]) == " 3"
    factors = {"thinking": 0.5, r"/\d/": 3.0}
    for name, tokens in [*((name, codes % 8 == code) for code, name in enumerate(SPANS) if name), (r"/\d/", digits)]:
        expected = (factors.get(name, 1), tokens.sum(), pytest.approx(0.8 * weights[tokens].sum()))
        assert report.spans[name] == expected
    console = Console(file=io.StringIO(), width=120)
    console.print(report)
    table = console.file.getvalue()
    assert "  thinking" in table
    assert "x 0.5" in table
    assert r"\d" in table
    shown = show_row(row, tokenizer, (0.2, 0.8), trainer.args.structure_weights).plain
    assert "[completion thinking 0.4]" in shown
    assert r"[completion answer /\d/ 2.4]" in shown


def test_thinking_that_the_template_leaves_out_is_counted(prepare, tokenizer):
    tokenizer.chat_template = THINKING_TEMPLATE.replace(
        "{% if m.reasoning_content", "{% if loop.last and m.reasoning_content"
    )
    other = {**AGENT[3], "reasoning_content": "I know it."}
    rows = [{"messages": [AGENT[0], other, AGENT[0], AGENT[3]]}, {"messages": [AGENT[0], AGENT[3]]}]
    trainer, _ = prepare(rows, span_loss_weights={"thinking": 0.5})
    assert trainer.train_dataset["thinking_left_out"][:] == [1, 0]
    assert trainer.weight_report().thinking_left_out == 1


def test_parts_of_a_content_have_weights_and_no_weight_changes_a_token(prepare, tokenizer):
    def row(*weights):
        texts = ("It is ", "thr", "ee, of course.")
        parts = [{"type": "text", "text": text} for text in texts]
        for part, weight in zip(parts, weights, strict=False):
            part["weight"] = weight
        question = [{"type": "text", "text": "What is the sum?"}]
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": parts}]}

    trainer, _ = prepare([row(1.0, 0.25, 2.0), row(1.0, 1.0, 1.0)])
    weighed, plain = trainer.train_dataset
    assert weighed["input_ids"] == plain["input_ids"]
    assert set(plain["token_weights"]) == {1}
    text = tokenizer.decode(weighed["input_ids"])
    first, second = text.index("three"), text.index("ee, of")
    position = 0
    for token, weight in zip(weighed["input_ids"], weighed["token_weights"], strict=True):
        # A token has the weight of the part that holds its first character
        end = text.index(" course.") + len(" course.")
        assert weight == (1 if position < first or position >= end else 0.25 if position < second else 2)
        position += len(tokenizer.decode([token]))


def test_texts_may_be_lists_of_parts(prepare, tokenizer):
    prompt = [{"text": "What is "}, {"text": "the sum?", "weight": 0}]
    completion = [{"type": "text", "text": " It is"}, {"type": "text", "text": " three.", "weight": 2.0}]
    trainer, _ = prepare([{"prompt": prompt, "completion": completion}])
    plain, _ = prepare([{"prompt": "What is the sum?", "completion": " It is three."}])
    row, expected = trainer.train_dataset[0], plain.train_dataset[0]
    assert row["input_ids"] == expected["input_ids"]
    assert row["completion_mask"] == expected["completion_mask"]
    pieces = {0: "", 1: "", 2: ""}
    for token, weight in zip(row["input_ids"], row["token_weights"], strict=True):
        pieces[weight] += tokenizer.decode([token])
    assert (pieces[0], pieces[2]) == (" sum?", " three.")  # the token " the" begins in the first part


@pytest.mark.parametrize("kind", ["messages", "pairs", "texts"])
def test_patterns_multiply_in_the_completion(kind, prepare, tokenizer):
    question, answer = "What is {3}?", "It is {3} and {4}."
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    row = {
        "messages": {"messages": turns},
        "pairs": {"prompt": turns[:1], "completion": turns[1:]},
        "texts": {"prompt": question, "completion": answer},
    }[kind]
    trainer, _ = prepare([row], regex_loss_weights={r"\{.*?\}": 3.0, r"(?s)\{4.*$": 0.5, "^What": 9.0})
    found = {}
    for token, weight in zip(*(trainer.train_dataset[0][name] for name in ("input_ids", "token_weights")), strict=True):
        found[weight] = found.get(weight, "") + tokenizer.decode([token])
    assert found.pop(1.0).count("{") == 1
    assert found == {3.0: "{3}", 1.5: "{4}", 0.5: "."}


def test_pattern_that_takes_too_long_names_the_row(prepare, monkeypatch):
    monkeypatch.setattr(patterns, "_SECONDS", 0.05)
    rows = [{"prompt": "Hi", "completion": text} for text in ("Yes", "a" * 40 + "!")]
    with pytest.raises(ValueError, match=r"Row 1 of the train dataset: the pattern '\(a\|aa\).* longer than 0.05 s"):
        prepare(rows, regex_loss_weights={"(a|aa)+$": 2.0})


def test_what_matches_nothing_is_told(prepare, caplog):
    prepare([{"messages": AGENT[:1] + AGENT[3:]}], span_loss_weights={"tool_calls": 2}, regex_loss_weights={"xyz": 2})
    assert "Nothing in the first 1,000 rows of the train dataset is one of ['tool_calls', '/xyz/']" in caplog.text
    caplog.clear()
    assert training_rows._FIRST_ROWS == 1000
    prepare([{"messages": AGENT}], span_loss_weights={"tool_calls": 2}, regex_loss_weights={"three": 2})
    assert "Nothing in the first" not in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"span_loss_weights": {"thoughts": 1}}, r"names \['thoughts'\], but the spans are \['thinking', 'tool_calls'"),
        ({"span_loss_weights": {"thinking": -1}}, r"`span_loss_weights\['thinking'\]` is -1"),
        ({"regex_loss_weights": {"(a": 1}}, r"`regex_loss_weights` has '\(a', which is no pattern: missing \)"),
        ({"regex_loss_weights": {"(?au)x": 1}}, r"`regex_loss_weights` has '\(\?au\)x', which is no pattern"),
        ({"regex_loss_weights": {str(n): 1 for n in range(29)}}, "has 29 patterns, but may have 28"),
        ({"regex_loss_weights": ["a"]}, "must be a dict of patterns"),
        ({"completion_turns": "first"}, r"must be one of \['all', 'last', 'last_round'\]"),
    ],
)
def test_wrong_settings_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        WITSFTConfig(str(tmp_path), **settings)


def test_settings_that_have_nothing_to_weigh_are_refused(prepare):
    with pytest.raises(ValueError, match="train dataset has no messages"):
        prepare([{"prompt": "Hi", "completion": "Yes"}], span_loss_weights={"thinking": 0.5})
    with pytest.raises(ValueError, match="tokenized, so `regex_loss_weights` has no text to search"):
        prepare([{"input_ids": [5, 6, 7]}], regex_loss_weights={"a": 0.5})


AFTER = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So it is."}]


@pytest.mark.parametrize(
    ("which", "row", "kept"),
    [
        ("last_round", {}, ["I add.", "So it is."]),
        ("last", {}, ["So it is."]),
        ("all", {}, ["No.", "I add.", "So it is."]),
        ("all", {"completion_turns": "last_round"}, ["I add.", "So it is."]),
        ("last", {"completion_turns": "all"}, ["No.", "I add.", "So it is."]),
    ],
)
def test_which_turns_are_completion(which, row, kept, prepare, tokenizer):
    messages = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "No."}, *AGENT]
    trainer, _ = prepare([{"messages": messages, **row}], completion_turns=which)
    found = weighted(trainer.train_dataset[0], tokenizer, 1)
    assert [next(text for text in ("No.", "I add.", "So it is.") if text in run) for run in found] == kept


def test_a_message_may_be_prompt(prepare, tokenizer):
    messages = [*AGENT, *AFTER]
    messages[1] = {**messages[1], "completion": False}
    trainer, _ = prepare([{"messages": messages}])
    found = weighted(trainer.train_dataset[0], tokenizer, 1)
    assert len(found) == 2
    assert "It is three." in found[0]
    with pytest.raises(ValueError, match="has the `completion` 'no', but it must be true, or false"):
        prepare([{"messages": [AGENT[0], {**AGENT[3], "completion": "no"}]}])
    with pytest.raises(ValueError, match="`completion_turns` is 'first', but must be one of"):
        prepare([{"messages": AGENT, "completion_turns": "first"}])


def test_pattern_that_is_called_as_a_span(prepare):
    settings = {"span_loss_weights": {"answer": 0.5}, "regex_loss_weights": {"answer": 3.0}}
    messages = [AGENT[0], {"role": "assistant", "content": "The answer is three."}]
    trainer, _ = prepare([{"messages": messages}], **settings)
    row = trainer.train_dataset[0]
    assert set(np.asarray(row["token_weights"])[np.asarray(row["token_spans"]) % 8 == 3]) == {0.5, 1.5}
    assert {"answer", "/answer/"} <= trainer.weight_report().spans.keys()


def test_28_patterns(prepare):
    names = [f"t{'h' * n}" for n in range(27)] + ["three"]
    trainer, _ = prepare([{"messages": [AGENT[0], AGENT[3]]}], regex_loss_weights=dict.fromkeys(names, 2.0))
    row = trainer.train_dataset[0]
    assert max(row["token_weights"]) == 2.0**3  # "t", "th" and "three"


def test_thinking_that_is_left_out_and_ends_as_another(prepare, tokenizer):
    tokenizer.chat_template = THINKING_TEMPLATE.replace(
        "{% if m.reasoning_content", "{% if loop.last and m.reasoning_content"
    )
    trainer, _ = prepare([{"messages": [AGENT[0], AGENT[3]] * 2}], span_loss_weights={"thinking": 0.5})
    assert texts_of(trainer.train_dataset[0], tokenizer)["thinking"] == "<think>So it is.</think>"
    assert trainer.train_dataset[0]["thinking_left_out"] == 1


@pytest.mark.parametrize("before", ["", "\n", "  "])
def test_thinking_in_a_content(before, prepare, tokenizer):
    answer = {"role": "assistant", "content": f"{before}<think>I add.</think>It is three."}
    trainer, _ = prepare([{"messages": [AGENT[0], answer]}], span_loss_weights={"thinking": 0.5})
    found = texts_of(trainer.train_dataset[0], tokenizer)
    assert (found["thinking"], found["answer"]) == ("<think>I add.</think>", "It is three.")
    for content in ("Well. <think>I add.</think>3", "<think>a</think>b<think>c</think>d", "a</think>b"):
        with pytest.raises(ValueError, match="turn 1 has `</think>` inside its answer"):
            prepare(
                [{"messages": [AGENT[0], {"role": "assistant", "content": content}]}],
                span_loss_weights={"thinking": 0.5},
            )


def test_rows_without_a_completion_are_prompts(prepare):
    messages = [AGENT[0], {**AGENT[3], "completion": False}]
    trainer, _ = prepare([{"messages": messages}, {"messages": [AGENT[0], AGENT[3]]}])
    assert set(trainer.train_dataset[0]["completion_mask"]) == {0}


def test_prepared_rows_are_prepared_again(prepare):
    trainer, _ = prepare([{"messages": AGENT}], span_loss_weights={"thinking": 0.5})
    again, _ = prepare(trainer.train_dataset.to_list(), steps=1, max_length=20)
    assert len(again.train_dataset[0]["input_ids"]) == 20


def test_column_that_texts_do_not_have_is_told(prepare, caplog):
    prepare([{"prompt": "Hi", "completion": "Yes", "completion_turns": "last"}])
    assert "dataset has ['completion_turns'], which is ignored" in caplog.text
