"""A trainer of rows, with weights of their structure."""

import pytest
from datasets import Dataset, IterableDataset

from ..helpers import StepRecorder, make_trainer


@pytest.fixture
def prepare(make_model, tokenizer, config_kwargs):
    """A function that returns a trainer of rows, after one step if asked, and the recorder of that step."""

    def make(rows, steps=0, streaming=False, **structure):
        kwargs = {"max_steps": 1, "gradient_accumulation_steps": 1, "max_grad_norm": 0.0, "max_length": None}
        data = IterableDataset.from_generator(lambda: iter(rows)) if streaming else Dataset.from_list(rows)
        recorder = StepRecorder()
        trainer = make_trainer(
            *(make_model, tokenizer, None, config_kwargs | kwargs | structure),
            model=make_model(max_position_embeddings=4096),
            train_dataset=data,
            callbacks=[recorder],
        )
        if steps:
            trainer.train()
        return trainer, recorder

    return make
