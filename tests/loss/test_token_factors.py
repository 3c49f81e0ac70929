"""Losses that depend on what the model predicts, and their divisors, against plain loops in float64."""

import pytest
import torch
from datasets import Dataset

from wit_trl import WITSFTConfig, WITSFTTrainer
from wit_trl.loss.lm_head import weighted_forward as forward
from wit_trl.loss.token_factors import TOKEN_FACTORS

from ..helpers import WEIGHTS, StepRecorder, make_trainer
from ..reference import formula, formula_with_data_weights, region_sums, tokenize


class EntropyWeighted(WITSFTTrainer):
    def token_factors(self, nll, entropy):
        assert not nll.requires_grad
        assert not entropy.requires_grad
        return 1 / (1 + entropy)


class LeavesOutImprobable(WITSFTTrainer):
    def token_factors(self, nll, entropy):
        return super().token_factors(nll, entropy) * (nll < 6.2)


def probability(nll, entropy):
    return torch.exp(-nll)


# name: (class, arguments, what the factors are)
LOSSES = {
    "dft": (WITSFTTrainer, {"loss_type": "dft"}, probability),
    "entropy": (EntropyWeighted, {}, lambda nll, entropy: 1 / (1 + entropy)),
    "threshold": (LeavesOutImprobable, {}, lambda nll, entropy: (nll < 6.2).double()),
    "both": (LeavesOutImprobable, {"loss_type": "dft"}, lambda nll, entropy: torch.exp(-nll) * (nll < 6.2)),
}
MODES = {"padded": {}, "padding_free": {"padding_free": True, "max_length": None}, "packed": {"packing": True}}


@pytest.fixture
def rows(prompt_completion, tokenizer):
    rows = [tokenize(tokenizer, row) for row in prompt_completion.select(range(4))]
    return [{key: value[:64] for key, value in row.items()} for row in rows]


def train(trainer_class, rows, make_model, tokenizer, config_kwargs, **arguments):
    """The log and the gradients of one step over four rows, in two micro-batches."""
    recorder = StepRecorder()
    arguments = {**config_kwargs, "max_steps": 1, "max_grad_norm": 0.0, **arguments}
    weights = arguments.pop("weights", WEIGHTS)
    kwargs = {"trainer_class": trainer_class, "callbacks": [recorder], "weights": weights}
    model = make_model(max_position_embeddings=4096)
    trainer = make_trainer(make_model, tokenizer, rows, arguments, model=model, **kwargs)
    trainer.train()
    return trainer, recorder.logs[0], recorder.gradients[0]


def assert_same_step(log, gradients, model, loss):
    loss.backward()
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        expected = parameter.grad
        assert torch.linalg.norm(gradients[name].double() - expected) < 1e-6 * torch.linalg.norm(expected), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOSSES)
def test_factors_multiply_the_loss_and_its_gradient(name, mode, head, rows, make_model, tokenizer, config_kwargs):
    trainer_class, arguments, factors = LOSSES[name]
    batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1} if mode == "packed" else {}
    _, log, gradients = train(
        trainer_class, rows, make_model, tokenizer, config_kwargs, **arguments, **MODES[mode], **batch
    )
    model = make_model(max_position_embeddings=4096).double()
    assert_same_step(log, gradients, model, formula_with_data_weights(model, rows, WEIGHTS, factors))
    # The regions, and the evaluation, are without factors
    _, (prompt_loss, completion_loss) = formula(make_model(max_position_embeddings=4096).double(), rows, WEIGHTS)
    assert log["prompt_loss"] == pytest.approx(prompt_loss, rel=1e-6)
    assert log["completion_loss"] == pytest.approx(completion_loss, rel=1e-6)


def test_evaluation_is_without_factors(head, rows, make_model, tokenizer, config_kwargs):
    trainer = make_trainer(make_model, tokenizer, rows, {**config_kwargs, "loss_type": "dft"})
    metrics = trainer.evaluate(Dataset.from_list(rows))
    loss, _ = formula(make_model().double(), rows, WEIGHTS)
    assert metrics["eval_loss"] == pytest.approx(loss.item(), rel=1e-6)


def test_wit_is_another_name_of_nll(rows, make_model, tokenizer, config_kwargs):
    (_, log, gradients), (_, other_log, other_gradients) = (
        train(WITSFTTrainer, rows, make_model, tokenizer, config_kwargs, loss_type=name) for name in ("nll", "wit")
    )
    assert log["loss"] == other_log["loss"]
    assert all(torch.equal(gradient, other_gradients[name]) for name, gradient in gradients.items())


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize("weights", [(0.3, 0.6), (0.0, 0.5), (0.001, 0.002)])
def test_weights_may_be_the_divisor(weights, loss_type, head, rows, make_model, tokenizer, config_kwargs):
    rows = [{**row, "weight": weight} for row, weight in zip(rows, (1.0, 0.5, 3.0, 0.25), strict=True)]
    arguments = {"loss_divisor": "weights", "loss_type": loss_type, "weights": weights}
    trainer, log, gradients = train(WITSFTTrainer, rows, make_model, tokenizer, config_kwargs, **arguments)
    model = make_model(max_position_embeddings=4096).double()
    factors = probability if loss_type == "dft" else lambda nll, entropy: 1
    assert_same_step(log, gradients, model, formula_with_data_weights(model, rows, weights, factors, "weights"))
    loss = formula_with_data_weights(trainer.model.double(), rows, weights, lambda *_: 1, "weights")
    trainer.model.float()
    evaluated = trainer.evaluate(Dataset.from_list(rows))
    assert evaluated["eval_loss"] == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 1.0)])
def test_both_divisors_are_those_of_trl_at_the_end_points(weights, rows, make_model, tokenizer, config_kwargs):
    (_, log, gradients), (_, other_log, other_gradients) = (
        train(WITSFTTrainer, rows, make_model, tokenizer, config_kwargs, loss_divisor=divisor, weights=weights)
        for divisor in ("count", "weights")
    )
    assert log["loss"] == other_log["loss"]
    assert all(torch.equal(gradient, other_gradients[name]) for name, gradient in gradients.items())


def test_mean_does_not_jump_where_the_prompt_joins_in(rows, make_model, tokenizer, config_kwargs):
    """With the count as the divisor it does: docs/weights.md."""
    (_, log, _), (_, other_log, _), (_, counted, _) = (
        train(WITSFTTrainer, rows, make_model, tokenizer, config_kwargs, loss_divisor=divisor, weights=(weight, 1.0))
        for divisor, weight in (("weights", 0.0), ("weights", 1e-6), ("count", 1e-6))
    )
    assert other_log["loss"] == pytest.approx(log["loss"], rel=1e-4)
    assert counted["loss"] < 0.9 * log["loss"]
    sums, counts = region_sums(make_model(max_position_embeddings=4096).double(), rows)
    assert log["loss"] == pytest.approx((sums[1] / counts[1]).item(), rel=1e-6)


@pytest.mark.parametrize(("loss_type", "expected"), [("nll", 0), ("dft", 2)])
def test_factors_are_computed_where_there_are_some(
    loss_type, expected, head, rows, make_model, tokenizer, config_kwargs, monkeypatch
):
    computed = []
    monkeypatch.setattr("wit_trl.trainer.weighted_forward", lambda *args: computed.append(args[4]) or forward(*args))
    trainer, *_ = train(WITSFTTrainer, rows, make_model, tokenizer, config_kwargs, loss_type=loss_type)
    trainer.evaluate(Dataset.from_list(rows))
    assert len(computed) == 3  # two micro-batches and the evaluation
    assert sum(factors is not None for factors in computed) == expected


def test_every_name_of_the_table_may_be_chosen(tmp_path):
    for name in TOKEN_FACTORS:
        assert TOKEN_FACTORS[WITSFTConfig(tmp_path, loss_type=name, use_cpu=True).loss_type] is TOKEN_FACTORS[name]


def test_factors_of_a_trainer_may_be_set_on_it(rows, make_model, tokenizer, config_kwargs):
    recorder = StepRecorder()
    config_kwargs |= {"max_steps": 1, "max_grad_norm": 0.0}
    trainer = make_trainer(make_model, tokenizer, rows, config_kwargs, callbacks=[recorder])
    trainer.token_factors = probability
    trainer.train()
    model = make_model().double()
    assert_same_step(
        recorder.logs[0], recorder.gradients[0], model, formula_with_data_weights(model, rows, WEIGHTS, probability)
    )


def test_table_says_what_multiplies_and_divides_the_loss(rows, make_model, tokenizer, config_kwargs, capsys):
    train(WITSFTTrainer, rows, make_model, tokenizer, config_kwargs, loss_type="dft", loss_divisor="weights")
    shown = " ".join(capsys.readouterr().out.split())
    assert "factor of each token in training its probability (dft)" in shown
    assert "* share of the weight, because the loss is divided by the sum of the weights." in shown
    train(EntropyWeighted, rows, make_model, tokenizer, config_kwargs)
    shown = " ".join(capsys.readouterr().out.split())
    assert "factor of each token in training EntropyWeighted.token_factors" in shown
    train(WITSFTTrainer, rows, make_model, tokenizer, config_kwargs)
    assert "factor of each token" not in capsys.readouterr().out
