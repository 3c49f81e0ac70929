"""What the trainer can be called with."""

import inspect

from datasets import Dataset
from transformers import TrainingArguments
from trl import SFTConfig, SFTTrainer

from wit_trl import WITSFTConfig, WITSFTTrainer

from ..helpers import WEIGHTS


def test_signature_is_that_of_sft_trainer():
    assert inspect.signature(WITSFTTrainer) == inspect.signature(SFTTrainer)


def test_positional_arguments_and_plain_arguments_get_the_default_weights(rows, make_model, tokenizer, config_kwargs):
    config_kwargs["hub_token"] = "a-token"
    dataset = Dataset.from_list(rows)
    training_arguments = TrainingArguments(
        config_kwargs["output_dir"], use_cpu=True, report_to="none", hub_token="a-token", learning_rate=3e-4
    )
    for args in (SFTConfig(eos_token="<eos>", **config_kwargs), training_arguments):
        trainer = WITSFTTrainer(make_model(), args, None, dataset, processing_class=tokenizer)
        assert isinstance(trainer.args, WITSFTConfig)
        assert (trainer.args.prompt_loss_weight, trainer.args.completion_loss_weight) == WEIGHTS
        assert trainer.args.hub_token == "a-token"
        assert trainer.args.learning_rate == args.learning_rate
        assert trainer.args.bf16 == args.bf16
        assert trainer.data_collator.completion_loss_weight == 0.8


def test_works_without_args(rows, make_model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make_model()
    model.save_pretrained("tiny")
    tokenizer.save_pretrained("tiny")
    trainer = WITSFTTrainer("tiny", train_dataset=Dataset.from_list(rows))
    assert trainer.args.output_dir == "tiny-WIT"
    assert isinstance(trainer.args, WITSFTConfig)
