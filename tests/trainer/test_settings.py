"""Settings of the loss that are changed after the trainer was made, and the arguments that the user passed."""

import pytest
from transformers import TrainerCallback

from wit_trl import WITSFTConfig, WITSFTTrainer

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
