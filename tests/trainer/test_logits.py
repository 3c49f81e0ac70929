"""The logits that are trained are those of the model, also where some tokens are impossible."""

import pytest
import torch
from datasets import Dataset

from ..helpers import WEIGHTS, make_trainer
from ..reference import formula


@pytest.mark.parametrize("region", [0, 1])
@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 0.0)])
def test_impossible_token_of_weight_zero_leaves_the_other_losses_alone(
    weights, region, head, make_model, tokenizer, rows, config_kwargs
):
    model = make_model()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(500))
    in_region = {token for row in rows for token in tokens_of(row, region)}
    impossible = min(in_region - {token for row in rows for token in tokens_of(row, 1 - region)})
    with torch.no_grad():
        model.lm_head.bias[impossible] = -torch.inf
    trainer = make_trainer(
        make_model, tokenizer, rows, config_kwargs, weights, model=model, eval_dataset=Dataset.from_list(rows)
    )
    metrics = trainer.evaluate()
    loss, by_region = formula(model.double(), rows, weights)
    of_other_region = ("eval_prompt_loss", "eval_completion_loss")[1 - region]
    assert metrics[of_other_region] == pytest.approx(by_region[1 - region], rel=1e-5)
    if weights[region] == 0:
        assert metrics["eval_loss"] == pytest.approx(by_region[1 - region], rel=1e-5)


def tokens_of(row, region):
    return [t for t, r in zip(row["input_ids"][1:], row["completion_mask"][1:], strict=True) if r == region]
