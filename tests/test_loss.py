import math

import pytest
import torch

from wit_trl import wit_loss


def batch(dtype=torch.float64):
    torch.manual_seed(0)
    logits = torch.randn(3, 7, 11, dtype=dtype, requires_grad=True)
    weights = torch.tensor([0.0, 0.2, 0.8])[torch.randint(3, (3, 7))]
    labels = torch.randint(11, (3, 7)).masked_fill(weights == 0, -100)
    return logits, labels, weights


def reference(logits, labels, weights, divisor):
    """The formula, as plain loops over Python floats."""
    total, count = 0.0, 0
    for row, targets, row_weights in zip(logits.tolist(), labels.tolist(), weights.tolist(), strict=True):
        for t in range(1, len(targets)):
            if targets[t] != -100:
                log_normaliser = math.log(sum(math.exp(z) for z in row[t - 1]))
                total -= row_weights[t] * (row[t - 1][targets[t]] - log_normaliser)
                count += 1
    return total / (divisor or count)


@pytest.mark.parametrize("divisor", [None, 40])
def test_equals_the_formula(divisor):
    logits, labels, weights = batch()
    loss = wit_loss(logits, labels, weights, divisor)
    assert loss.item() == pytest.approx(reference(logits, labels, weights, divisor), rel=1e-7)


def test_gradient_equals_the_formula():
    logits, labels, weights = batch()
    wit_loss(logits, labels, weights).backward()
    count = (labels[:, 1:] != -100).sum()
    for i, t in ((0, 3), (1, 1), (2, 6), (0, 0)):
        expected = torch.zeros(11, dtype=torch.float64)
        if t + 1 < 7 and labels[i, t + 1] != -100:
            expected = torch.softmax(logits[i, t].detach(), 0)
            expected[labels[i, t + 1]] -= 1
            expected *= weights[i, t + 1].double() / count
        torch.testing.assert_close(logits.grad[i, t], expected)
    assert logits.grad.abs().sum() > 0


def test_divisor_counts_tokens_and_does_not_sum_weights():
    logits, labels, weights = batch()
    torch.testing.assert_close(wit_loss(logits, labels, weights * 0.5), wit_loss(logits, labels, weights) * 0.5)


def test_micro_batches_add_up_to_the_batch():
    logits, labels, weights = batch()
    count = (labels[:, 1:] != -100).sum()
    parts = [wit_loss(*(x[i : i + 1] for x in (logits, labels, weights)), count) for i in range(3)]
    torch.testing.assert_close(sum(parts), wit_loss(logits, labels, weights))


@pytest.mark.parametrize("divisor", [None, 0, torch.tensor(0)])
def test_batch_without_targets_gives_a_differentiable_zero(divisor):
    logits, labels, weights = batch()
    loss = wit_loss(logits, torch.full_like(labels, -100), torch.zeros_like(weights), divisor)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_first_token_is_in_neither_sum():
    logits, labels, weights = batch()
    loss = wit_loss(logits, labels, weights)
    labels[:, 0], weights[:, 0] = 5, 100.0
    assert wit_loss(logits, labels, weights) == loss


def test_bfloat16_logits_are_scored_in_float32():
    logits, labels, weights = batch(torch.bfloat16)
    loss = wit_loss(logits, labels, weights)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference(logits, labels, weights, None), rel=1e-6)
