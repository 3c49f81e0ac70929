"""A training that goes on from its checkpoint."""

import json
import resource

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from wit_trl import WITSFTConfig
from wit_trl.training.checkpoints import checkpoint_to_resume

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


@pytest.fixture
def checkpoint(rows, make_model, tokenizer, config_kwargs, tmp_path):
    """The first of two checkpoints."""
    config_kwargs |= {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(make_model, tokenizer, rows, config_kwargs).train()
    return tmp_path / "checkpoint-1"


@pytest.mark.parametrize(
    "state",
    [
        *("[]", "3", "null", "{", '{"other": 1}', '{"global_step": null}', '{"log_history": 3}'),
        '{"stateful_callbacks": {"LossWeightsCallback": []}}',
        '{"stateful_callbacks": {"LossWeightsCallback": {"attributes": []}}}',
        '{"stateful_callbacks": {"LossWeightsCallback": {"attributes": {"weights": 3}}}}',
    ],
)
def test_state_of_another_shape_is_refused(state, config_kwargs, tmp_path, caplog):
    args = WITSFTConfig(**config_kwargs)
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "trainer_state.json").write_text(state)
    with pytest.raises(
        ValueError, match=r"The checkpoint .*checkpoint-1 cannot be resumed: its trainer_state\.json is mi"
    ):
        checkpoint_to_resume(str(folder), args)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        checkpoint_to_resume(True, args)
    assert "checkpoint-1 is passed over: its trainer_state.json is missing or damaged." in caplog.text


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_damaged_file_of_a_checkpoint_is_named(name, checkpoint, config_kwargs, tmp_path):
    args = WITSFTConfig(**config_kwargs)
    for length in (-100, 100, 0):
        (checkpoint / name).write_bytes((checkpoint / name).read_bytes()[:length])
        with pytest.raises(
            ValueError, match=rf"1 cannot be resumed: its {name} is missing or damaged\. Choose another"
        ):
            checkpoint_to_resume(str(checkpoint), args)
    if name.startswith("model"):
        (checkpoint / name).unlink()
        with pytest.raises(ValueError, match=r"1 cannot be resumed: its model is missing or damaged\."):
            checkpoint_to_resume(str(checkpoint), args)
    (tmp_path / "checkpoint-2" / name).write_bytes(b"")
    with pytest.raises(ValueError, match="no complete checkpoint"):
        checkpoint_to_resume(True, args)


@pytest.mark.parametrize(
    ("lost", "told"),
    [(["optimizer.pt"], True), (["scheduler.pt"], True), (["optimizer.pt", "rng_state.pth"], True), ([], False)],
)
def test_checkpoint_without_its_optimizer_is_told(lost, told, checkpoint, config_kwargs, caplog):
    for name in lost:
        (checkpoint / name).unlink()
    assert checkpoint_to_resume(str(checkpoint), WITSFTConfig(**config_kwargs)) == str(checkpoint)
    assert (f"The checkpoint {checkpoint} has no {' '.join(lost[:1])}, so" in caplog.text) == told
    (checkpoint / "global_step1").mkdir()  # where DeepSpeed keeps them
    caplog.clear()
    checkpoint_to_resume(str(checkpoint), WITSFTConfig(**config_kwargs))
    assert caplog.text == ""


def test_checkpoint_of_trl_is_resumed(rows, make_model, tokenizer, config_kwargs, tmp_path):
    config_kwargs |= {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    data = Dataset.from_list(rows)
    SFTTrainer(make_model(), SFTConfig(**config_kwargs), train_dataset=data, processing_class=tokenizer).train()
    trainer = make_trainer(make_model, tokenizer, rows, config_kwargs | {"max_steps": 2})
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    saved = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert saved["LossWeightsCallback"]["attributes"]["weights"]["completion_loss_weight"] == 0.8
