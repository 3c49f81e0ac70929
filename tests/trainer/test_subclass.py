"""A loss of one's own, in a subclass, as docs/weights.md says."""

import pytest
import torch
from datasets import Dataset

from wit_trl import WITSFTTrainer, wit_loss

from ..helpers import WEIGHTS, make_trainer
from ..reference import formula, tokenize


@pytest.fixture
def rows(prompt_completion, tokenizer):
    rows = [tokenize(tokenizer, row) for row in prompt_completion.select(range(7))]
    return [{key: value[:64] for key, value in row.items()} for row in rows]


@pytest.fixture
def make(rows, make_model, tokenizer, config_kwargs):
    """A function that returns a trainer of a class, which evaluates in batches of uneven weight."""
    config_kwargs["per_device_eval_batch_size"] = 3

    def make(trainer_class, **arguments):
        data = Dataset.from_list(rows)
        return make_trainer(
            make_model, tokenizer, rows, config_kwargs | arguments, trainer_class=trainer_class, eval_dataset=data
        )

    return make


class Regularised(WITSFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        returned = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        extra = 0.5 * model.lm_head.weight.square().mean()
        return (returned[0] + extra, returned[1]) if return_outputs else returned + extra


class OnFullLogits(WITSFTTrainer):
    """The same loss without `super()`."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        weights, labels = inputs.pop("token_weights"), inputs.pop("labels")
        inputs.pop("completion_mask")
        outputs = model(**inputs)
        loss = wit_loss(outputs.logits, labels, weights, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


class Watching(WITSFTTrainer):
    """Changes nothing."""

    def prediction_step(self, *args, **kwargs):
        return super().prediction_step(*args, **kwargs)


def batch_losses(make_model, rows):
    """The losses of the evaluation's batches, repeated as `Trainer` weighs them."""
    losses = []
    for batch in (rows[:3], rows[3:6], rows[6:]):
        losses += [formula(make_model().double(), batch, WEIGHTS)[0].item()] * len(batch)
    return losses


def test_regulariser_is_in_both_losses_and_leaves_the_regions_exact(make, make_model, rows):
    trainer = make(Regularised)
    metrics = trainer.evaluate()
    extra = 0.5 * make_model().lm_head.weight.square().mean().item()
    losses = batch_losses(make_model, rows)
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / len(losses) + extra, rel=1e-6)
    _, (prompt_loss, completion_loss) = formula(make_model().double(), rows, WEIGHTS)
    assert metrics["eval_prompt_loss"] == pytest.approx(prompt_loss, rel=1e-6)
    assert metrics["eval_completion_loss"] == pytest.approx(completion_loss, rel=1e-6)
    trainer.train()
    # `Trainer` adds up the losses of the two micro-batches, of which each has the regulariser
    expected = formula(make_model().double(), rows[:4], WEIGHTS)[0].item() + 2 * extra
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert "completion_loss" in trainer.state.log_history[0]


def test_loss_that_is_replaced_on_the_trainer_is_evaluated(make):
    trainer = make(WITSFTTrainer)
    expected = trainer.evaluate()["eval_loss"]
    own = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: own(*args, **kwargs) + 100
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected + 100, abs=0.1)


@pytest.mark.parametrize("trainer_class", [Regularised, OnFullLogits])
def test_predictions_and_metrics_of_a_subclass(trainer_class, make):
    trainer = make(trainer_class)
    predicted = trainer.predict(trainer.eval_dataset)
    assert predicted.predictions.shape[-1] == 500
    assert predicted.metrics["test_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)


def test_loss_without_super_evaluates_as_trainer_does(make, make_model, rows):
    trainer = make(OnFullLogits)
    metrics = trainer.evaluate()
    losses = batch_losses(make_model, rows)
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert not any("prompt_loss" in name or "accuracy" in name for name in metrics)
    trainer.train()
    expected = formula(make_model().double(), rows[:4], WEIGHTS)[0].item()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_subclass_that_changes_nothing_keeps_the_exact_evaluation_loss(make, make_model, rows):
    expected = formula(make_model().double(), rows, WEIGHTS)[0].item()
    losses = batch_losses(make_model, rows)
    assert abs(sum(losses) / len(losses) - expected) > 1e-4  # which it could be confused with
    assert make(Watching).evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_best_model_is_chosen_by_the_loss_of_the_subclass(make, tmp_path):
    trainer = make(
        OnFullLogits,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="best",
        load_best_model_at_end=True,
        learning_rate=1e-2,
    )
    trainer.train()
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert len(set(losses)) == 3
    assert trainer.state.best_metric == min(losses) > 0
    assert torch.isfinite(torch.tensor(losses)).all()


def test_factors_that_replace_the_method_of_the_class_are_used(make, monkeypatch):
    def twice(self, nll, entropy):
        return torch.full_like(nll, 2)

    losses = []
    for replaced in (False, True):
        if replaced:
            monkeypatch.setattr(WITSFTTrainer, "token_factors", twice)
        trainer = make(WITSFTTrainer, max_steps=1)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-5)
