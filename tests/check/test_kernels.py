import pytest
import torch

from wit_trl.check.kernels import HEAD_CASES, LIMITS, head_errors
from wit_trl.check.reference import head_in_float64
from wit_trl.loss import one_pass
from wit_trl.loss.functions import trl_weighted_nll

from .. import reference


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_loops_in_float64_equal_autograd(softcap):
    torch.manual_seed(0)
    inputs = [x.double().requires_grad_() for x in (torch.randn(5, 8), torch.randn(11, 8), torch.randn(11))]
    targets, weights = torch.tensor([0, 10, 3, 3, 7]), torch.tensor([0.5, 0.0, 1e-3, 2.0, 1.0])
    logits = 0.7 * torch.nn.functional.linear(*inputs)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    distribution = torch.distributions.Categorical(logits=logits)
    nll, entropy = -distribution.log_prob(targets), distribution.entropy()
    loss = (weights * nll * (1 + entropy).detach() * nll.detach()).sum()
    loss.backward()
    found = head_in_float64(*inputs, targets, weights, 0.7, softcap, lambda nll, entropy: (1 + entropy) * nll)
    expected = (loss, nll, entropy, logits.argmax(1) == targets, *(x.grad for x in inputs))
    torch.testing.assert_close(tuple(found), expected)


def test_loops_in_float64_equal_those_without_torch():
    torch.manual_seed(0)
    inputs, targets, weights = (
        (torch.randn(3, 4), torch.randn(7, 4), torch.randn(7)),
        torch.tensor([6, 0, 2]),
        [1, 0, 3],
    )
    expected = reference.head_in_float64(inputs, targets, torch.tensor(weights))
    found = head_in_float64(*inputs, targets, torch.tensor(weights))
    assert found.loss.item() == pytest.approx(expected["loss"])
    assert found.nll.tolist() == pytest.approx(expected["nll"])
    assert found.entropy.tolist() == pytest.approx(expected["entropy"])


@pytest.mark.parametrize("case", HEAD_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("kernel", [one_pass.weighted_nll, trl_weighted_nll])
def test_head_equals_float64(kernel, dtype, case):
    errors = head_errors(kernel, case, "cpu", dtype, tokens=30, hidden_size=64, vocabulary=301)
    assert {name: error for name, error in errors.items() if not error <= LIMITS[dtype]} == {}
    gradients = {name for name in errors if name.startswith("gradient")}
    assert len(gradients) == (0 if case.evaluation else 2 + case.has_bias - case.frozen_head)


def test_a_wrong_chunk_is_found(monkeypatch):
    """A head that forgets the chunks before the last one."""
    add_product = one_pass._add_product
    monkeypatch.setattr(one_pass, "_add_product", lambda total, a, b, is_first: add_product(total, a, b, True))
    sizes = {"tokens": 30, "hidden_size": 64, "vocabulary": 301}
    wrong = [
        case.name
        for case in HEAD_CASES
        if not max(head_errors(one_pass.weighted_nll, case, "cpu", torch.float32, **sizes).values()) <= 2e-5
    ]
    assert wrong == [case.name for case in HEAD_CASES if case.chunks > 1]
