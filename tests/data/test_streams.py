"""How often a stream is read, against TRL."""

import pytest
from datasets import IterableDataset
from trl import SFTConfig, SFTTrainer

from wit_trl import WITSFTConfig, WITSFTTrainer


def readings(trainer_class, arguments, rows, make_model, tokenizer):
    """How often a training opens a shuffled stream, and how many rows it reads."""
    opened, read = 0, 0

    def generate():
        nonlocal opened, read
        opened += 1
        for row in rows:
            read += 1
            yield row

    stream = IterableDataset.from_generator(generate).shuffle(seed=0, buffer_size=300)
    opened, read = 0, 0
    trainer_class(model=make_model(), args=arguments, train_dataset=stream, processing_class=tokenizer).train()
    return opened, read


def test_stream_is_opened_at_most_once_more_than_by_trl(make_model, tokenizer, config_kwargs, capsys):
    rows = [{"prompt": f"What is {number}?", "completion": f"It is {number}."} for number in range(1500)]
    of_trl = readings(SFTTrainer, SFTConfig(**config_kwargs), rows, make_model, tokenizer)
    assert "What is weighted" not in capsys.readouterr().out
    ours = readings(WITSFTTrainer, WITSFTConfig(**config_kwargs), rows, make_model, tokenizer)
    assert "What is weighted in the first 1,000 rows" in capsys.readouterr().out
    assert ours[0] <= of_trl[0] + 1
    assert ours[1] <= of_trl[1] + 1_300  # the rows of the table, and a buffer of the shuffle


@pytest.mark.parametrize("max_length", [4, None])
def test_endless_stream_without_a_target_is_refused(max_length, make_model, tokenizer, config_kwargs):
    def generate():
        while True:
            yield {"prompt": "A long prompt", "completion": "That.", "weight": float(max_length is not None)}

    stream = IterableDataset.from_generator(generate)
    config_kwargs |= {"max_length": max_length}
    args = WITSFTConfig(prompt_loss_weight=0, completion_loss_weight=1, **config_kwargs)
    with pytest.raises(
        ValueError, match=r"None of the first 10,000 rows of the train dataset has a token left.* shuffle"
    ):
        WITSFTTrainer(model=make_model(), args=args, train_dataset=stream, processing_class=tokenizer)


def test_stream_shorter_than_an_accumulation_is_refused(make_model, tokenizer, config_kwargs):
    rows = [{"prompt": f"What is {number}?", "completion": f"It is {number}."} for number in range(6)]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    arguments = WITSFTConfig(**config_kwargs | {"gradient_accumulation_steps": 8, "per_device_train_batch_size": 2})
    trainer = WITSFTTrainer(model=make_model(), args=arguments, train_dataset=stream, processing_class=tokenizer)
    with pytest.raises(ValueError, match="The stream has 3 batches on this process, too few for a step of"):
        trainer.train()
