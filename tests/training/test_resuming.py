"""A training that goes on from its checkpoint."""

import json
import resource

import pytest
import torch
from transformers import TrainerCallback

from ..helpers import make_trainer


def test_resumed_training_ends_in_the_same_parameters(rows, make_model, tokenizer, config_kwargs, tmp_path):
    config_kwargs |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(make_model, tokenizer, rows, config_kwargs)
    whole.train()
    resumed = make_trainer(make_model, tokenizer, rows, config_kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for parameter, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(parameter, expected)
    assert json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["log_history"][-1]["step"] == 4


def test_resuming_with_other_weights_is_told(rows, make_model, tokenizer, config_kwargs, tmp_path, caplog):
    config_kwargs |= {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(make_model, tokenizer, rows, config_kwargs).train()
    for weights, told in (((0.2, 0.8), False), ((0.5, 0.8), True)):
        caplog.clear()
        trainer = make_trainer(make_model, tokenizer, rows, config_kwargs | {"max_steps": 2}, weights)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        message = "was trained with {'prompt_loss_weight': 0.2}, and is resumed with {'prompt_loss_weight': 0.5}"
        assert (message in caplog.text) == told


def test_full_disk_while_saving_leaves_the_checkpoint_before(rows, make_model, tokenizer, config_kwargs, tmp_path):
    config_kwargs |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(make_model, tokenizer, rows, config_kwargs | {"output_dir": str(tmp_path / "whole")})
    whole.train()

    class FullDisk(TrainerCallback):
        """From the third step on no file can grow beyond some kilobytes, which holds for the model's file too."""

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (16384, limits[1]))

    config_kwargs["output_dir"] = str(tmp_path / "cut_off")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(Exception, match="File too large"):
            make_trainer(make_model, tokenizer, rows, config_kwargs, callbacks=[FullDisk()]).train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "cut_off" / "checkpoint-4").exists()
    resumed = make_trainer(make_model, tokenizer, rows, config_kwargs)
    resumed.train(resume_from_checkpoint=True)
    for parameter, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("left", [[], ["checkpoint-2"]])
def test_resuming_without_a_complete_checkpoint_is_refused(left, rows, make_model, tokenizer, config_kwargs, tmp_path):
    trainer = make_trainer(make_model, tokenizer, rows, config_kwargs)
    for name in left:
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="no complete checkpoint"):
        trainer.train(resume_from_checkpoint=True)
