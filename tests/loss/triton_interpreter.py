"""
The Triton kernels of the one-pass head against float64. `test_triton.py` runs these tests in a process of their own, in
Triton's interpreter, which has to be chosen before the first import of Triton:

    TRITON_INTERPRET=1 pytest -n 0 tests/loss/triton_interpreter.py
"""

import itertools

import pytest
import torch

from tests.loss import patch_once  # noqa: F401
from tests.reference import head_in_float64 as head_without_torch
from wit_trl import weighted_linear_cross_entropy
from wit_trl.check.reference import head_in_float64
from wit_trl.loss import one_pass, rows
from wit_trl.loss.params import HeadParams, TokenScores


HIDDEN, TOKENS = 16, 4
# Of the gradients and of the nll. The interpreter truncates where the hardware rounds, so only float32 is judged
TOLERANCES = {torch.float32: 2e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.fixture(autouse=True)
def on_triton(monkeypatch):
    assert not hasattr(rows._score_rows, "cache_hook"), "not in the interpreter"
    monkeypatch.setattr(one_pass, "_TRITON_DEVICES", ("cpu",))
    launched = []

    def score(*args):
        launched.append(len(args[0]))
        return rows_score(*args)

    rows_score = rows.score
    monkeypatch.setattr(rows, "score", score)
    yield launched
    assert launched


def make_inputs(dtype, vocab, bias):
    torch.manual_seed(0)
    inputs = [torch.randn(TOKENS, HIDDEN), torch.randn(vocab, HIDDEN), *[torch.randn(vocab)] * bias]
    weights = torch.tensor([0.3, 0.0, 1e-3, 2.0])
    return [x.to(dtype).requires_grad_() for x in inputs], torch.randint(vocab, (TOKENS,)), weights


def reference(inputs, targets, weights, divisor, *arguments):
    """What plain loops in float64 find, which `wit-trl check` compares with too."""
    bias = inputs[2] if len(inputs) > 2 else None
    return head_in_float64(*inputs[:2], bias, targets, weights / divisor, *arguments)


def relative_error(value, expected):
    return (torch.linalg.norm(value.double() - expected) / torch.linalg.norm(expected).clamp(min=1e-30)).item()


def check(inputs, targets, weights, logit_scale, softcap, factors=None, grad=1.0):
    dtype = inputs[0].dtype
    tolerance = TOLERANCES[dtype]
    divisor = weights.count_nonzero()
    output = weighted_linear_cross_entropy(
        *(inputs[0], inputs[1], targets, weights),
        bias=inputs[2] if len(inputs) > 2 else None,
        logit_scale=logit_scale,
        softcap=softcap,
        token_factors=factors,
    )
    output.loss.backward(torch.tensor(grad))
    expected = reference(inputs, targets, weights, divisor, logit_scale, softcap, factors)
    scored = weights != 0
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=tolerance)
    assert relative_error(output.nll[scored], expected.nll[scored]) < tolerance
    assert relative_error(output.entropy[scored], expected.entropy[scored]) < tolerance
    assert not output.nll[~scored].any()
    if dtype == torch.float32:
        assert torch.equal(output.is_top1, expected.is_top1 & scored)
    for x, gradient in zip(inputs, expected[4:], strict=False):
        if x.requires_grad:
            assert x.grad.dtype == dtype
            assert relative_error(x.grad, gradient * grad) < tolerance
        x.grad = None


@pytest.fixture
def in_chunks(monkeypatch):
    """A function that sets the number of rows of a chunk, with more than a block of columns in each."""

    def divide(count):
        monkeypatch.setattr(one_pass, "_chunk_rows", lambda n, *args: (TOKENS, min(n, count)))
        monkeypatch.setattr(rows, "_COLUMNS", 1024)

    return divide


# What the kernel sees of a head: its rows of logits
@pytest.mark.parametrize(("logit_scale", "softcap"), itertools.product((1.0, 0.7), (None, 5.0)))
@pytest.mark.parametrize("vocab", [7, 1501, 1536])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_head_equals_float64(dtype, vocab, logit_scale, softcap, in_chunks):
    in_chunks(2)
    check(*make_inputs(dtype, vocab, bias=True), logit_scale, softcap)


# What is done with the rows that it leaves
@pytest.mark.parametrize("count", [TOKENS, 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [None, 0, 1])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_gradient_of_what_is_trained_equals_float64(dtype, frozen, bias, count, in_chunks):
    in_chunks(count)
    inputs, targets, weights = make_inputs(dtype, 1501, bias)
    for number, x in enumerate(inputs):
        x.requires_grad_(number != frozen)
    check(inputs, targets, weights, 0.7, 5.0, grad=1.0 if frozen is None else 3.0)


@pytest.mark.parametrize("vocab", [1, 2, 4])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_hardly_a_vocabulary(dtype, vocab):
    check(*make_inputs(dtype, vocab, bias=False), 1.0, None)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_factors_of_tokens(dtype, softcap):
    for factors in (lambda nll, entropy: torch.exp(-nll), lambda nll, entropy: entropy / (1 + nll)):
        check(*make_inputs(dtype, 101, bias=True), 0.7, softcap, factors)


def test_top1_is_the_first_of_equal_logits():
    hidden_states, weight = torch.ones(4, HIDDEN), torch.ones(1501, HIDDEN)
    weight[1200:] = 0
    targets = torch.tensor([0, 1, 1100, 1300])
    output = weighted_linear_cross_entropy(hidden_states, weight, targets, torch.ones(4))
    assert output.is_top1.tolist() == [True, False, False, False]


def test_top1_at_every_place_of_what_a_thread_loads_at_once():
    """With the same logit at the token before the target, and at the one after it."""
    token, targets = torch.arange(HIDDEN), torch.arange(HIDDEN) + HIDDEN
    for other, is_top1 in ((targets, True), (targets - 1, False), (targets + 1, True)):
        weight = torch.zeros(3 * HIDDEN, HIDDEN)
        weight[targets, token] = weight[other, token] = 3.0
        output = weighted_linear_cross_entropy(torch.eye(HIDDEN), weight, targets, torch.ones(HIDDEN))
        assert output.is_top1.tolist() == [is_top1] * HIDDEN


def test_soft_cap_of_logits_that_are_far_above_it():
    inputs, targets, weights = make_inputs(torch.float32, 101, bias=False)
    with torch.no_grad():
        inputs[1] *= 1000
    output = weighted_linear_cross_entropy(*inputs, targets, weights, 1, softcap=5.0, scored=True)
    output.loss.backward()
    expected = reference(inputs, targets, weights, 1, 1.0, 5.0)
    torch.testing.assert_close([output.loss, output.nll], [expected.loss.float(), expected.nll.float()])
    for x, gradient in zip(inputs, expected[4:6], strict=True):
        torch.testing.assert_close(x.grad, gradient.float(), rtol=1e-4, atol=1e-6)


def test_without_a_weighted_token_the_gradient_is_zero(on_triton):
    inputs, targets, weights = make_inputs(torch.float32, 101, bias=True)
    for scored in (None, True):
        loss = weighted_linear_cross_entropy(*inputs[:2], targets, weights * 0, bias=inputs[2], scored=scored).loss
        loss.backward()
        assert loss.item() == 0
        assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in inputs)
    assert on_triton == [TOKENS]


def test_all_tokens_may_be_scored():
    inputs, targets, weights = make_inputs(torch.float32, 101, bias=True)
    output = weighted_linear_cross_entropy(*inputs[:2], targets, weights, bias=inputs[2], scored=True)
    expected = reference(inputs, targets, weights, 1)
    torch.testing.assert_close([output.nll, output.entropy], [expected.nll.float(), expected.entropy.float()])


def test_evaluation_leaves_the_logits_alone():
    inputs, targets, weights = make_inputs(torch.float32, 101, bias=False)
    with torch.no_grad():
        output = weighted_linear_cross_entropy(*inputs, targets, weights, 3)
    assert output.loss.item() == pytest.approx(reference(inputs, targets, weights, 3).loss.item(), rel=1e-6)
    logits = torch.randn(TOKENS, 101)
    before = logits.clone()
    nll, entropy, is_top1 = torch.empty(TOKENS), torch.empty(TOKENS), torch.empty(TOKENS, dtype=torch.bool)
    params = HeadParams(targets, weights, True, 1.0, None, None)
    rows.score(logits, params, TokenScores(nll, entropy, is_top1), False)
    assert torch.equal(logits, before)


def test_strided_targets():
    inputs, targets, weights = make_inputs(torch.float32, 101, bias=False)
    strided = torch.stack([targets, targets + 1], dim=1)[:, 0]
    output = weighted_linear_cross_entropy(*inputs, strided, weights, 1, scored=True)
    output.loss.backward()
    expected = reference(inputs, targets, weights, 1)
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    torch.testing.assert_close(output.nll, expected.nll.float())
    assert relative_error(inputs[1].grad, expected.grad_weight) < 1e-6


@pytest.mark.parametrize("target", [-1, -100, 101])
def test_target_that_is_no_token_reads_nothing(target, on_triton):
    on_triton.append("is refused before")
    inputs, targets, weights = make_inputs(torch.float32, 101, bias=False)
    targets[2] = target
    with pytest.raises(RuntimeError, match="out of bounds"):
        weighted_linear_cross_entropy(*inputs, targets, weights)


@pytest.mark.parametrize("impossible", [slice(0, 1030), slice(500, 2000), slice(1499, 1500)])
def test_impossible_tokens_have_neither_entropy_nor_gradient(impossible, monkeypatch):
    """The first of them fills a block of columns, the second too."""
    monkeypatch.setattr(rows, "_COLUMNS", 512)
    inputs, targets, weights = make_inputs(torch.float32, 2100, bias=True)
    with torch.no_grad():
        inputs[2][impossible] = -torch.inf
    targets[:] = torch.tensor([1100, 1499, 2050, 2099])
    weights[inputs[2][targets].isinf()] = 0
    output = weighted_linear_cross_entropy(*inputs[:2], targets, weights, 1, bias=inputs[2], scored=True)
    output.loss.backward()
    expected = head_without_torch(inputs, targets, weights)
    assert output.loss.item() == pytest.approx(expected["loss"], rel=1e-6)
    assert output.nll.tolist() == pytest.approx(expected["nll"], rel=1e-5)
    assert output.entropy.tolist() == pytest.approx(expected["entropy"], rel=1e-5)
    assert not inputs[2].grad[impossible].any()
    assert torch.stack([x.grad.isfinite().all() for x in inputs]).all()
