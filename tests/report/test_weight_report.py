"""The numbers of the report against plain loops, and what it is printed for."""

import io
import math
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets
from rich.console import Console

from wit_trl.data.prepared_rows import RowLengths
from wit_trl.report.rows import plot_lengths
from wit_trl.report.weight_report import weigh


@pytest.fixture
def rows():
    """Rows of 1 to 40 tokens with prompts of any length; some end with padding."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in [1, 2, 3, 16, 17, 40, 40, *torch.randint(1, 41, (30,), generator=generator).tolist()]:
        prompt = int(torch.randint(0, length + 1, (), generator=generator))
        row = {
            "input_ids": torch.randint(6, 500, (length,), generator=generator).tolist(),
            "completion_mask": [0] * prompt + [1] * (length - prompt),
            "attention_mask": [1] * length,
        }
        if length > 20:
            row["attention_mask"][-2:] = [0, 0]
        rows.append(row)
    # A completion of which `keep_end` leaves one token, which then nothing predicts
    rows.append({"input_ids": [9] * 18, "completion_mask": [0, 1, 1] + [0] * 15, "attention_mask": [1] * 18})
    assert {0, 1} == {mask for row in rows for mask in row["completion_mask"]}
    return rows


def loops(trainer):
    """The counts of the summary, from what the collator returns for each row that is trained on."""
    tokens, nonzero, weight = {0: 0, 1: 0, -100: 0}, {0: 0, 1: 0, -100: 0}, {0: 0.0, 1: 0.0, -100: 0.0}
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        regions, weights = batch["completion_mask"][0].tolist(), batch["token_weights"][0].tolist()
        for region, token_weight in zip(regions, weights, strict=True):
            tokens[region] += 1
            nonzero[region] += token_weight != 0
            weight[region] += token_weight
    return tokens, nonzero, weight


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode:FutureWarning")
@pytest.mark.parametrize("weights", [(0.2, 0.8), (0.0, 0.7), (0.3, 0.0), (1.0, 1.0)])
@pytest.mark.parametrize(
    "arguments",
    [
        {"max_length": None},
        {"max_length": 16},
        {"max_length": 16, "truncation_mode": "keep_end"},
        {"max_length": 16, "packing": True},
        {"max_length": 16, "packing": True, "packing_strategy": "bfd_split"},
        {"max_length": 16, "packing": True, "packing_strategy": "wrapped"},
        {"max_length": 16, "packing": True, "truncation_mode": "keep_end"},
    ],
)
def test_counts_equal_plain_loops(arguments, weights, rows, trainer_on):
    prompt_weight, completion_weight = weights
    trainer = trainer_on(
        Dataset.from_list(rows), prompt_loss_weight=prompt_weight, completion_loss_weight=completion_weight, **arguments
    )
    summary = trainer.weight_report()

    tokens, nonzero, weight = loops(trainer)
    assert (summary.rows, summary.partial) == (len(trainer.train_dataset), False)
    assert summary.tokens == tokens
    assert summary.nonzero == nonzero
    assert summary.weight == pytest.approx(weight, rel=1e-6)
    # The gradient of a completion token: its weight over the divisor, here and with the weights (0, 1)
    assert summary.gradient_scale == pytest.approx((completion_weight / sum(nonzero.values())) / (1 / tokens[1]))

    truncated = lost = with_target = completion_cut = answers_cut = answers_lost = 0
    limit = arguments["max_length"] or 10**9
    for row in rows:
        regions = [m for m, a in zip(row["completion_mask"], row["attention_mask"], strict=True) if a]  # no padding
        kept = regions
        if arguments.get("packing_strategy") is None and len(regions) > limit:
            truncated += 1
            keeps_end = arguments.get("truncation_mode") == "keep_end" and not arguments.get("packing")
            kept = regions[-limit:] if keeps_end else regions[:limit]
        lost += 1 in regions[1:] and 1 not in kept[1:]
        completion_cut += regions.count(1) - kept.count(1)
        if 1 in regions:
            at_end = kept == regions[len(regions) - len(kept) :]
            end = max(position for position, region in enumerate(regions) if region == 1)
            # The last answer goes from behind the last other token before its end
            start = max([-1, *(position for position in range(end) if regions[position] != 1)]) + 1
            left = [p for p in range(start, end + 1) if at_end or p < len(kept)]
            left = [p for p in left if not at_end or p >= len(regions) - len(kept)]
            answers_cut += end not in left
            answers_lost += not left
        with_target += any(weights[region] for region in kept[1:] if region != -100)
    assert (summary.truncated, summary.without_completion) == (truncated, lost)
    assert summary.completion_cut == completion_cut
    assert (summary.answers_cut, summary.answers_lost) == (answers_cut, answers_lost)
    if limit == 16 and "packing_strategy" not in arguments:
        assert truncated > 5
        assert lost > 0 or "truncation_mode" in arguments
    if arguments.get("packing") or arguments["max_length"] is None:
        assert summary.dropped == 0
    else:
        assert summary.dropped == len(rows) - with_target > 0


@pytest.mark.parametrize("weights", [(0.2, 0.8), (0.0, 0.8)])
def test_weights_in_the_data_multiply(weights, rows, trainer_on):
    for row in rows:
        del row["attention_mask"]
        row["token_weights"] = [(0.0, 0.5, 2.0)[token % 3] for token in row["input_ids"]]
    arguments = {"prompt_loss_weight": weights[0], "completion_loss_weight": weights[1], "max_length": None}
    summary = trainer_on(Dataset.from_list(rows), **arguments).weight_report()
    targets = [
        (region, weight)
        for row in rows
        for region, weight in list(zip(row["completion_mask"], row["token_weights"], strict=True))[1:]
    ]
    for region in (0, 1):
        of_region = [weights[region] * weight for r, weight in targets if r == region]
        assert summary.tokens[region] == len(of_region)
        assert summary.nonzero[region] == sum(weight != 0 for weight in of_region)
        assert summary.weight[region] == pytest.approx(math.fsum(of_region))
    divisor = sum(weights[region] * weight != 0 for region, weight in targets)
    conventional = sum(region * weight != 0 for region, weight in targets)
    assert summary.gradient_scale == pytest.approx(weights[1] * conventional / divisor)
    assert (summary.truncated, summary.without_completion, summary.dropped) == (0, 0, 0)


def test_of_a_stream_the_first_rows_are_counted(rows, trainer_on):
    dataset = IterableDataset.from_generator(lambda: (row for _ in range(50) for row in rows))
    trainer = trainer_on(dataset, max_length=16)
    summary = trainer.weight_report()
    assert (summary.rows, summary.partial, summary.dropped) == (1000, True, None)
    first = list(trainer.train_dataset.take(1000))
    assert sum(summary.tokens.values()) == sum(len(row["input_ids"]) for row in first)
    rows = [row for row in rows if len(row["input_ids"]) > 1]  # the others have no target, and are dropped
    whole = [rows[i % len(rows)] for i in range(1000)]
    assert summary.truncated == sum(len(row["input_ids"]) > 16 for row in whole)
    assert "the first 1,000 rows" in text_of(summary)


def text_of(renderable):
    console = Console(file=io.StringIO(), width=80)
    console.print(renderable)
    return console.file.getvalue()


def with_weights(*masks):
    """A data set of rows of these regions, as the trainer prepares it."""
    return Dataset.from_dict({"completion_mask": masks, "token_weights": [[1.0] * len(mask) for mask in masks]})


def test_table():
    lengths = RowLengths(
        *map(np.array, ([5, 2], [5, 2], *[[True, False]] * 2, [4, 0], [True, False], [False, False], [1, 0]))
    )
    cut = with_weights([0] * 5, [0, 0, 1, 1])
    lines = [line.split() for line in text_of(replace(weigh(cut, (0.25, 0.5), lengths), dropped=0)).splitlines()]
    for line in (
        "prompt 0.25 5 55.6% 55.6%",
        "completion 0.5 2 22.2% 44.4%",
        "never a target 0 2 22.2% 0.0%",
        "all 9 100.0% 100.0%",
        "of zero weight 2 22.2% 0.0%",
        "completion tokens to a prompt token 0.4",
        "gradient of the completion against conventional tuning * x 0.143",  # 0.5 * 2 / 7
        "weights in the data none",
        "rows truncated 1",
        "completion tokens cut off 4",
        "rows whose last answer lost its end 1",
        "rows whose last answer is cut off whole 0",
        "rows with no completion left 1",
        "rows dropped 0",
    ):
        assert line.split() in lines


def test_data_set_without_prompt_or_completion():
    for region in (0, 1):
        summary = weigh(with_weights([region] * 2, [], [region]), (0.2, 0.8))
        assert summary.tokens == {0: 0, 1: 0, -100: 2} | {region: 1}
        assert summary.gradient_scale == (0.8 if region else None)
        assert "-" in text_of(summary)


def test_training_starts_with_the_table_in_plain_text(rows, trainer_on, capsys):
    trainer = trainer_on(Dataset.from_list(rows), max_steps=1, max_length=16)
    assert "What is weighted" not in capsys.readouterr().out
    trainer.train()
    output = capsys.readouterr().out
    assert output.count(f"What is weighted in {len(trainer.train_dataset)} rows") == 1
    assert "\x1b" not in output
    assert output.index("rows truncated") < output.index("'loss'")


def test_rows_without_completion_and_weights_in_the_data_are_told(trainer_on, capsys, caplog):
    rows = [{"prompt": "What? " * length, "completion": "That.", "weight": 0.5 * length} for length in (1, 2, 30)]
    trainer = trainer_on(Dataset.from_list(rows), max_steps=1, max_length=16)
    trainer.train()
    assert "Rows with no completion left within `max_length=16`: 1. They train" in caplog.text
    assert re.search(r"weights in the data +0\.5 to 15", capsys.readouterr().out)


def test_answers_that_truncation_takes_are_told(trainer_on, tokenizer, capsys, caplog):
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Call a tool."}]
    rows = [
        [*turns, {"role": "user", "content": "Its result. " * n}, {"role": "assistant", "content": "This is that."}]
        for n in (1, 20)
    ]
    tokens = [tokenizer.apply_chat_template(row, return_dict=False) for row in rows]
    max_length = len(tokens[0]) - 2
    trainer = trainer_on(Dataset.from_list([{"messages": row} for row in rows]), max_steps=1, max_length=max_length)
    report = trainer.weight_report()
    assert (report.truncated, report.without_completion) == (2, 0)
    assert (report.answers_cut, report.answers_lost) == (2, 1)
    answer = len(tokenizer("This is that.<|eot_id|>", add_special_tokens=False)["input_ids"])
    assert report.completion_cut == 2 + answer
    trainer.train()
    assert f"lost its end to `max_length={max_length}`: 2; all of it: 1. They do not teach" in caplog.text
    assert re.search("rows whose last answer is cut off whole +1", capsys.readouterr().out)


def test_names_in_the_data_are_printed_as_they_are(messages, trainer_on, capsys, caplog):
    names = ["[red]", "[/x]", "\x1b[31m", "système"]
    trainer = trainer_on(messages, max_steps=1, role_loss_weights=dict.fromkeys(names, 0.5))
    trainer.train()
    output = capsys.readouterr().out
    for name in names:
        assert f"weight of the role {repr(name)[1:-1]}" in output

    def weight_report():
        raise ValueError("\x1b[31m[/x]")

    trainer.weight_report = weight_report
    trainer.train()
    assert "There is no table of what is weighted: \\x1b[31m[/x]" in caplog.text


def test_training_on_an_output_that_encodes_ascii_alone(rows, trainer_on, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    trainer_on(Dataset.from_list(rows), max_steps=1).train()
    sys.stdout.flush()
    assert b"What is weighted" in sys.stdout.buffer.getvalue()


def test_no_table_where_the_weights_or_the_tokens_are_not_known(rows, trainer_on, capsys):
    trainer = trainer_on(Dataset.from_list(rows), max_steps=1)
    collator = trainer.data_collator
    trainer.data_collator = lambda examples: collator(examples)
    trainer.train()

    def transform(batch):
        return {"input_ids": [[7, 8, 9]] * len(batch["index"]), "completion_mask": [[0, 0, 1]] * len(batch["index"])}

    dataset = Dataset.from_dict({"index": range(8)}).with_transform(transform)
    kwargs = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
    trainer_on(dataset, max_steps=1, **kwargs).train()
    assert "What is weighted" not in capsys.readouterr().out


@pytest.mark.parametrize("as_type", [int, bool])
def test_rows_that_nobody_prepared_are_counted_as_they_are_trained_on(as_type, rows, trainer_on):
    """Behind padding, the first token of the text has no prediction either."""
    for number, row in enumerate(rows):
        padding = number % 3
        row["input_ids"] = [0] * padding + row["input_ids"] + [0]
        row["completion_mask"] = [as_type(m) for m in [0] * padding + row["completion_mask"] + [0]]
        row["attention_mask"] = [as_type(a) for a in [0] * padding + [1] * (len(row["input_ids"]) - padding - 1) + [0]]
    trainer = trainer_on(Dataset.from_list(rows), dataset_kwargs={"skip_prepare_dataset": True})
    texts = [[m for m, a in zip(row["completion_mask"], row["attention_mask"], strict=True) if a][1:] for row in rows]
    expected = {region: sum(text.count(region) for text in texts) for region in (0, 1)}
    assert {region: trainer.weight_report().tokens[region] for region in (0, 1)} == expected
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert {region: int((batch["completion_mask"] == region).sum()) for region in (0, 1)} == expected


def test_lengths_by_region_and_their_histogram(rows):
    prompt, completion = weigh(with_weights(*(row["completion_mask"] for row in rows)), (0.2, 0.8)).lengths
    assert prompt.tolist() == [row["completion_mask"].count(0) for row in rows]
    assert completion.tolist() == [row["completion_mask"].count(1) for row in rows]
    packed = with_weights([0, 1, 0, 0, 1]).add_column("seq_lengths", [[2, 3]])
    assert [lengths.tolist() for lengths in weigh(packed, (0.2, 0.8)).lengths] == [[1, 2], [1, 1]]
    assert plot_lengths(prompt, completion).startswith(b"\x89PNG")


@pytest.fixture
def prepared(rows, trainer_on):
    """A trainer whose rows are truncated, and of whose rows some were dropped."""
    trainer = trainer_on(Dataset.from_list(rows), max_steps=1, max_length=16)
    assert trainer.weight_report().dropped > 0
    return trainer


def labelled(rows):
    """The same rows with labels in the place of the mask."""
    return [
        {
            "input_ids": row["input_ids"],
            "labels": [t if m else -100 for t, m in zip(row["input_ids"], row["completion_mask"], strict=True)],
        }
        for row in rows
    ]


REPLACEMENTS = {
    "as many rows": lambda dataset, rows: dataset.select([3] * len(dataset)),
    "selection": lambda dataset, rows: dataset.select(range(3, 20)),
    "concatenation": lambda dataset, rows: concatenate_datasets([dataset, dataset.select(range(5))]),
    "prepared stream": lambda dataset, rows: dataset.to_iterable_dataset(),
    "stream": lambda dataset, rows: IterableDataset.from_generator(lambda: iter(labelled(rows))),
    "list": lambda dataset, rows: rows,
    "labels": lambda dataset, rows: Dataset.from_list(labelled(rows)),
    "completion_mask": lambda dataset, rows: Dataset.from_list(rows),
}


@pytest.mark.parametrize("kind", REPLACEMENTS)
def test_replaced_training_set_is_counted_as_it_is(kind, prepared, rows, capsys):
    rows = [row for row in rows if len(row["input_ids"]) > 1]
    for row in rows:
        del row["attention_mask"]
    dataset = prepared.train_dataset = REPLACEMENTS[kind](prepared.train_dataset, rows)
    tokens, nonzero, weight = loops(prepared)
    report = prepared.weight_report()
    assert (report.tokens, report.nonzero) == (tokens, nonzero)
    assert report.weight == pytest.approx(weight, rel=1e-6)
    assert report.rows == len(list(dataset))
    assert report.partial == isinstance(dataset, IterableDataset)
    assert report.dropped is None  # nobody knows of any
    if kind in ("as many rows", "selection", "concatenation", "prepared stream"):
        assert report.truncated == sum(row["truncated"] for row in dataset) > 0
    else:
        assert report.truncated is None
        assert re.search("rows truncated +unknown", text_of(report))
    prepared.train()
    assert "What is weighted" in capsys.readouterr().out


@pytest.mark.parametrize("switched_off", [False, True])
def test_table_never_ends_a_training_and_can_be_switched_off(switched_off, rows, trainer_on, capsys, caplog):
    arguments = {"max_steps": 1, "print_weight_report": not switched_off}
    trainer_on(Dataset.from_list(rows), **arguments).train()
    assert ("What is weighted" in capsys.readouterr().out) != switched_off

    def weight_report():
        raise LookupError("cannot be read")

    trainer = trainer_on(Dataset.from_list(rows), **arguments)
    trainer.weight_report = weight_report
    trainer.train()
    assert trainer.state.global_step == 1
    assert ("There is no table of what is weighted: cannot be read" in caplog.text) != switched_off


def test_rows_that_are_not_tokenized_are_told(prepared):
    prepared.train_dataset = [{"prompt": "a", "completion": "b"}]
    with pytest.raises(ValueError, match="`input_ids` must be"):
        prepared.weight_report()


@pytest.mark.parametrize(("weights", "told"), [((1.5e9, 0.8), "completion"), ((1e-9, 1), "prompt"), ((0.01, 1), None)])
def test_region_of_hardly_any_weight_is_told(weights, told, rows, trainer_on, caplog):
    prompt_loss_weight, completion_loss_weight = weights
    arguments = {"prompt_loss_weight": prompt_loss_weight, "completion_loss_weight": completion_loss_weight}
    trainer_on(Dataset.from_list(rows), max_steps=1, **arguments).train()
    assert re.findall(r"The (\w+) has less than 0\.1% of the weight", caplog.text) == ([told] if told else [])


def test_start_says_what_compares_and_what_messages_were(messages, prompt_completion, trainer_on, capsys):
    for dataset, arguments, told in (
        (messages, {}, True),
        (messages, {"assistant_only_loss": True, "prompt_loss_weight": 0}, False),
        (messages, {"prompt_loss_weight": 1, "completion_loss_weight": 1}, False),
        (prompt_completion, {}, False),
    ):
        trainer_on(dataset.select(range(4)), max_steps=1, **arguments).train()
        output = capsys.readouterr().out
        assert "loss is weighted; prompt_loss and completion_loss compare between runs." in output
        assert ("SFTTrainer trains messages with (1, 1), unless assistant_only_loss is set." in output) == told
