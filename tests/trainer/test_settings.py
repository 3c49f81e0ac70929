"""Settings of the loss that are changed after the trainer was made, and the arguments that the user passed."""

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from wit_trl import WITSFTConfig, WITSFTTrainer
from wit_trl.loss.token_factors import TOKEN_FACTORS, NamedFactors

from ..helpers import make_trainer


CHANGES = {
    "prompt_loss_weight": 0.9,
    "completion_loss_weight": 0.7,
    "role_loss_weights": {"user": 0.5},
    "chat_template_loss_weight": 0.0,
    "completion_turns": "last",
    "loss_type": "dft",
    "loss_divisor": "weights",
}


@pytest.mark.parametrize("name", CHANGES)
def test_setting_of_the_loss_that_is_changed_later_is_refused(name, messages, make_model, tokenizer, config_kwargs):
    data = messages.select(range(6))
    trainer = make_trainer(make_model, tokenizer, data, config_kwargs, eval_dataset=data)
    setattr(trainer.args, name, CHANGES[name])
    functions = (
        trainer.train,
        trainer.evaluate,
        trainer.evaluate_rows,
        lambda: trainer.predict(trainer.eval_dataset),
        trainer.weight_report,
        trainer.create_model_card,
    )
    for function in functions:
        with pytest.raises(ValueError, match=rf"`{name}` was .* and is .*\. Set it back, or make a new trainer"):
            function()


def test_role_that_is_changed_in_place_is_refused(messages, make_model, tokenizer, config_kwargs):
    trainer = make_trainer(make_model, tokenizer, messages, config_kwargs | {"role_loss_weights": {"user": 0.5}})
    trainer.args.role_loss_weights["user"] = 2.0
    with pytest.raises(ValueError, match=r"`role_loss_weights` was \{'user': 0.5\} and is \{'user': 2.0\}"):
        trainer.train()


def test_setting_that_is_changed_in_the_middle_of_a_training_is_refused(rows, make_model, tokenizer, config_kwargs):
    class Switch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            args.loss_divisor = "weights"

    trainer = make_trainer(make_model, tokenizer, rows, config_kwargs, callbacks=[Switch()])
    with pytest.raises(ValueError, match="`loss_divisor` was 'count' and is 'weights'"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_settings_are_checked_once_in_each_step(rows, make_model, tokenizer, config_kwargs, monkeypatch):
    checked = []
    check_settings = WITSFTTrainer.check_settings
    monkeypatch.setattr(WITSFTTrainer, "check_settings", lambda self: checked.append(check_settings(self)))
    trainer = make_trainer(make_model, tokenizer, rows, {**config_kwargs, "print_weight_report": False})
    checked.clear()
    trainer.train()
    assert len(checked) == 1 + config_kwargs["max_steps"]  # at the start, and for the micro-batches of a step together


def test_callbacks_see_the_loss_type_that_was_passed(rows, make_model, tokenizer, config_kwargs):
    class Recorder(TrainerCallback):
        def on_init_end(self, args, state, control, **kwargs):
            self.loss_type = args.loss_type

    recorder = Recorder()
    make_trainer(make_model, tokenizer, rows, {**config_kwargs, "loss_type": "dft"}, callbacks=[recorder])
    assert recorder.loss_type == "dft"


def test_factor_that_trl_does_not_know_can_be_named(rows, make_model, tokenizer, config_kwargs, monkeypatch):
    monkeypatch.setitem(TOKEN_FACTORS, "half", NamedFactors("a half", lambda nll, entropy: torch.full_like(nll, 0.5)))
    losses = []
    for name in ("nll", "half"):
        args = WITSFTConfig(**config_kwargs)
        args.loss_type = name
        trainer = WITSFTTrainer(make_model(), args, None, Dataset.from_list(rows), processing_class=tokenizer)
        trainer.train()
        assert trainer.args.loss_type == name
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1] == pytest.approx(losses[0] / 2, rel=1e-6)


@pytest.mark.parametrize(
    "arguments", [{}, {"loss_type": "dft"}, {"assistant_only_loss": True, "prompt_loss_weight": 0}]
)
def test_arguments_of_the_trainer_are_those_that_were_passed(arguments, messages, make_model, tokenizer, config_kwargs):
    args = WITSFTConfig(**config_kwargs, **arguments)
    before = args.to_dict()
    trainer = WITSFTTrainer(make_model(), args, None, messages, processing_class=tokenizer)
    assert trainer.args is args
    assert args.to_dict() == before
    args.max_steps = 1
    trainer.train()
    assert trainer.state.global_step == 1


def test_arguments_are_restored_where_the_trainer_cannot_be_made(messages, make_model, tokenizer, config_kwargs):
    args = WITSFTConfig(**config_kwargs, loss_type="dft")
    with pytest.raises(ValueError, match="is empty"):
        WITSFTTrainer(make_model(), args, None, messages, messages.select([]), processing_class=tokenizer)
    assert args.loss_type == "dft"
