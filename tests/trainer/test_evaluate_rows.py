"""What each row costs, against plain loops in float64 and against the evaluation of all of them."""

import pytest
import torch
from datasets import Dataset

from wit_trl import WITSFTTrainer

from ..helpers import make_trainer
from ..reference import region_sums, tokenize
from .test_subclass import OnFullLogits


REGIONS = ("prompt", "completion")


@pytest.fixture
def rows(prompt_completion, tokenizer):
    """Of uneven lengths, and one without a prompt that is a target."""
    rows = [tokenize(tokenizer, row) for row in prompt_completion.select(range(7))]
    rows = [{key: value[: 20 + 9 * i % 40] for key, value in row.items()} for i, row in enumerate(rows)]
    rows[3]["completion_mask"] = [0] + [1] * (len(rows[3]["input_ids"]) - 1)
    return rows


def expected_rows(model, rows):
    for row in rows:
        sums, counts = region_sums(model, [row])
        expected = {f"{region}_nll": float(total) for region, total in zip(REGIONS, sums, strict=True)}
        yield expected | {f"{region}_tokens": count for region, count in zip(REGIONS, counts, strict=True)}


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"per_device_eval_batch_size": 3},
        {"per_device_eval_batch_size": 3, "padding_free": True, "max_length": None},
        {"train_sampling_strategy": "group_by_length"},
        {"prompt_loss_weight": 0.0, "completion_loss_weight": 1.0, "loss_type": "dft", "loss_divisor": "weights"},
    ],
    ids=str,
)
def test_rows_equal_float64_and_add_up_to_the_evaluation(arguments, head, rows, make_model, tokenizer, config_kwargs):
    weights = (arguments.pop("prompt_loss_weight", 0.2), arguments.pop("completion_loss_weight", 0.8))
    strategy = arguments.pop("train_sampling_strategy", "sequential")
    model = make_model(max_position_embeddings=4096)
    trainer = make_trainer(make_model, tokenizer, rows, config_kwargs | arguments, weights=weights, model=model)
    trainer.args.train_sampling_strategy = strategy
    data = Dataset.from_list(rows)
    found = trainer.evaluate_rows(data)
    assert trainer.args.train_sampling_strategy == strategy
    assert trainer.state.log_history == []
    for row, expected in zip(
        found, expected_rows(make_model(max_position_embeddings=4096).double(), rows), strict=True
    ):
        assert row == pytest.approx(expected, rel=1e-6)
    metrics = trainer.evaluate(data)
    for region in REGIONS:
        mean = sum(found[f"{region}_nll"]) / sum(found[f"{region}_tokens"])
        assert metrics[f"eval_{region}_loss"] == pytest.approx(mean, rel=1e-7)


def test_rows_of_any_type_are_prepared_in_their_order(prompt_completion, make_model, tokenizer, config_kwargs):
    data = prompt_completion.select(range(6))
    trainer = make_trainer(make_model, tokenizer, None, config_kwargs | {"shuffle_dataset": True}, train_dataset=data)
    found = trainer.evaluate_rows(data)
    tokens = [tokenize(tokenizer, row) for row in data]
    rows = [{key: value[: trainer.args.max_length] for key, value in row.items()} for row in tokens]
    for row, expected in zip(found, expected_rows(make_model().double(), rows), strict=True):
        assert row == pytest.approx(expected, rel=1e-6)


def test_evaluation_sets_have_names(rows, make_model, tokenizer, config_kwargs):
    sets = {"first": Dataset.from_list(rows[:2]), "second": Dataset.from_list(rows[2:])}
    trainer = make_trainer(make_model, tokenizer, rows, config_kwargs, eval_dataset=sets)
    assert [len(trainer.evaluate_rows(name)) for name in sets] == [2, 5]
    with pytest.raises(ValueError, match=r"needs a `Dataset`, but got a `dict`\. Name one of several"):
        trainer.evaluate_rows()


def test_rows_that_cannot_be_told_apart_are_refused(rows, make_model, tokenizer, config_kwargs):
    packed = config_kwargs | {"packing": True, "eval_packing": True}
    trainer = make_trainer(make_model, tokenizer, rows, packed, eval_dataset=Dataset.from_list(rows))
    with pytest.raises(ValueError, match="cannot tell packed rows apart"):
        trainer.evaluate_rows()
    with pytest.raises(ValueError, match=r"got a `IterableDataset`.* store the rows of a stream"):
        trainer.evaluate_rows(Dataset.from_list(rows).to_iterable_dataset())


def test_loss_of_a_subclass_has_no_rows(rows, make_model, tokenizer, config_kwargs):
    trainer = make_trainer(make_model, tokenizer, rows, config_kwargs, trainer_class=OnFullLogits)
    with pytest.raises(ValueError, match="needs the loss of `WITSFTTrainer`"):
        trainer.evaluate_rows(Dataset.from_list(rows))


def test_training_goes_on_as_before(rows, make_model, tokenizer, config_kwargs):
    losses = []
    for looks in (False, True):
        trainer = make_trainer(make_model, tokenizer, rows, config_kwargs)
        assert isinstance(trainer, WITSFTTrainer)
        if looks:
            trainer.evaluate_rows(Dataset.from_list(rows))
        trainer.train()
        losses.append(torch.tensor([log["loss"] for log in trainer.state.log_history if "loss" in log]))
        assert all("eval_loss" not in log and "entropy" in log for log in trainer.state.log_history[:-1])
    assert torch.equal(*losses)
