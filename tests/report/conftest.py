"""The trainer whose report is read."""

import pytest

from ..helpers import make_trainer


@pytest.fixture
def trainer_on(make_model, tokenizer, config_kwargs):
    """A function that returns a trainer on a data set. What else it gets is for the configuration."""

    def make(dataset, tokenizer=tokenizer, **arguments):
        return make_trainer(make_model, tokenizer, dataset, config_kwargs | arguments)

    return make
