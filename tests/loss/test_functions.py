import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from trl.kernels import ChunkedLogProbFunction

from wit_trl import weighted_linear_cross_entropy, wit_loss
from wit_trl.loss import one_pass
from wit_trl.loss.params import HeadParams

from ..reference import head_in_float64


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


HIDDEN, VOCAB = 16, 101


def head_inputs(tokens, dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    hidden_states, weight = torch.randn(tokens, HIDDEN).to(dtype), torch.randn(VOCAB, HIDDEN).to(dtype)
    inputs = [hidden_states.requires_grad_(), weight.requires_grad_()]
    inputs += [torch.randn(VOCAB).to(dtype).requires_grad_()] if bias else []
    token_weights = torch.tensor([0.0, 0.2, 0.8])[torch.randint(3, (tokens,))]
    return inputs, torch.randint(VOCAB, (tokens,)), token_weights


def full_logits(inputs, targets, token_weights, logit_scale=1.0, softcap=None, dtype=torch.float64):
    """The same in full logits: the loss, and the logits and nll of each token, with gradients in `inputs`."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    logits = logit_scale * F.linear(*inputs)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    nll = F.cross_entropy(logits, targets, reduction="none")
    loss = (token_weights.to(dtype) * nll).sum() / (token_weights != 0).sum().clamp(min=1)
    loss.backward()
    return loss, logits, nll, [x.grad for x in inputs]


def relative_error(value, expected):
    return (torch.linalg.norm(value.double() - expected.double()) / torch.linalg.norm(expected.double())).item()


# All tokens in one chunk; three tokens a chunk; one token a chunk and less than a row a block
@pytest.fixture(params=[(1 << 28, 1 << 21), (3 * VOCAB * 4, 1 << 21), (1, 1)])
def chunks(request, monkeypatch):
    monkeypatch.setattr(one_pass, "_CHUNK_BYTES", request.param[0])
    monkeypatch.setattr(one_pass, "_BLOCK_BYTES", request.param[1])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("logit_scale", "softcap"), [(1.0, None), (0.3, None), (1.0, 5.0), (2.0, 3.0)])
@pytest.mark.parametrize("tokens", [1, 2, 50])
def test_head_equals_float64(chunks, tokens, logit_scale, softcap, bias):
    inputs, targets, token_weights = head_inputs(tokens, bias=bias)
    token_weights[0] = 0.3
    output = weighted_linear_cross_entropy(
        *inputs[:2], targets, token_weights, bias=inputs[2] if bias else None, logit_scale=logit_scale, softcap=softcap
    )
    output.loss.backward()
    loss, logits, nll, gradients = full_logits(inputs, targets, token_weights, logit_scale, softcap)
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    for x, gradient in zip(inputs, gradients, strict=True):
        assert relative_error(x.grad, gradient) < 1e-6
    scored = token_weights != 0
    probabilities = torch.softmax(logits, dim=1)
    torch.testing.assert_close(output.nll, (nll * scored).float())
    torch.testing.assert_close(output.entropy, torch.special.entr(probabilities).sum(1).float() * scored)
    assert torch.equal(output.is_top1, (logits.argmax(1) == targets) & scored)


def test_head_in_bfloat16_is_as_exact_as_trl(chunks):
    inputs, targets, token_weights = head_inputs(300, torch.bfloat16, bias=False)
    *_, gradients = full_logits(inputs, targets, token_weights)
    weighted_linear_cross_entropy(*inputs, targets, token_weights).loss.backward()
    errors = [relative_error(x.grad, gradient) for x, gradient in zip(inputs, gradients, strict=True)]
    inputs[0].grad = inputs[1].grad = None
    log_probs = ChunkedLogProbFunction.apply(
        *inputs, None, targets, 1.0, 32768, None, 1.0, ("log_probs", "entropy", "is_top1")
    )[0]
    (-(log_probs * token_weights).sum() / (token_weights != 0).sum()).backward()
    trl_errors = [relative_error(x.grad, gradient) for x, gradient in zip(inputs, gradients, strict=True)]
    assert all(error <= 1.05 * trl_error for error, trl_error in zip(errors, trl_errors, strict=True))


def test_head_scores_tokens_of_weight_zero_on_request():
    inputs, targets, token_weights = head_inputs(20, bias=False)
    scored = torch.arange(20) % 3 > 0
    token_weights *= scored
    output = weighted_linear_cross_entropy(*inputs, targets, token_weights, scored=scored)
    output.loss.backward()
    loss, _, nll, gradients = full_logits(inputs, targets, token_weights)
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(output.nll, (nll * scored).float())
    assert relative_error(inputs[1].grad, gradients[1]) < 1e-6


@pytest.mark.parametrize("tokens", [0, 4])
def test_head_without_targets_gives_a_differentiable_zero(tokens):
    inputs, targets, token_weights = head_inputs(tokens)
    loss = weighted_linear_cross_entropy(*inputs[:2], targets, token_weights * 0, bias=inputs[2]).loss
    loss.backward()
    assert loss.item() == 0
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in inputs)


@pytest.mark.parametrize("frozen", [0, 1])
def test_head_leaves_out_what_is_frozen(frozen):
    inputs, targets, token_weights = head_inputs(20, bias=False)
    *_, gradients = full_logits(inputs, targets, token_weights)
    inputs[frozen].requires_grad_(False)
    weighted_linear_cross_entropy(*inputs, targets, token_weights).loss.backward()
    assert inputs[frozen].grad is None
    assert relative_error(inputs[1 - frozen].grad, gradients[1 - frozen]) < 1e-6


def test_head_without_gradient():
    inputs, targets, token_weights = head_inputs(20, bias=False)
    with torch.no_grad():
        output = weighted_linear_cross_entropy(*inputs, targets, token_weights, 7)
    loss, *_ = full_logits(inputs, targets, token_weights)
    assert output.loss.item() == pytest.approx(loss.item() * (token_weights != 0).sum().item() / 7, rel=1e-6)
    assert not output.loss.requires_grad


def test_evaluation_costs_one_product(monkeypatch):
    inputs, targets, token_weights = head_inputs(20, bias=True)
    for products in (0, 2):
        added = []
        monkeypatch.setattr(one_pass, "_add_product", lambda *args, **kwargs: added.append(args))  # noqa: B023
        with torch.set_grad_enabled(products > 0):
            weighted_linear_cross_entropy(*inputs[:2], targets, token_weights, bias=inputs[2])
        assert len(added) == products


@pytest.mark.parametrize("fused_head", ["one_pass", "trl"])
def test_factors_get_copies_of_what_is_scored(fused_head):
    inputs, targets, token_weights = head_inputs(20, bias=False)
    expected = weighted_linear_cross_entropy(*inputs, targets, token_weights, fused_head=fused_head)
    learned = torch.ones((), requires_grad=True)
    seen = []

    def factors(nll, entropy):
        seen.append(len(nll))
        entropy.zero_()
        return nll.neg_().exp_() * learned

    output = weighted_linear_cross_entropy(
        *inputs, targets, token_weights, token_factors=factors, fused_head=fused_head
    )
    assert torch.equal(output.nll, expected.nll)
    assert torch.equal(output.entropy, expected.entropy)
    output.loss.backward()
    assert learned.grad is None
    count = token_weights.count_nonzero()
    assert sum(seen) == count
    loss = (token_weights * torch.exp(-expected.nll) * expected.nll).sum() / count
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-6)


def test_unknown_head_is_refused():
    inputs, targets, token_weights = head_inputs(4, bias=False)
    with pytest.raises(
        ValueError, match=r"`fused_head` is 'onepass', but must be one of \('auto', 'one_pass', 'trl'\)"
    ):
        weighted_linear_cross_entropy(*inputs, targets, token_weights, fused_head="onepass")


@pytest.mark.parametrize(
    ("hidden_dtype", "head_dtype"), [(torch.float32, torch.float16), (torch.float32, torch.bfloat16)]
)
def test_head_of_another_dtype_than_the_hidden_states(chunks, hidden_dtype, head_dtype):
    inputs, targets, token_weights = head_inputs(50, bias=False)
    inputs = [
        x.detach().to(dtype).requires_grad_() for x, dtype in zip(inputs, (hidden_dtype, head_dtype), strict=True)
    ]
    loss = weighted_linear_cross_entropy(*inputs, targets, token_weights, 10**6).loss
    (loss * 2.0**16).backward()
    *_, gradients = full_logits(inputs, targets, token_weights)
    scale = 2.0**16 * token_weights.count_nonzero().item() / 10**6
    for x, gradient in zip(inputs, gradients, strict=True):
        assert relative_error(x.grad, gradient * scale) < (1e-6 if x.dtype == torch.float32 else 4e-3)


def test_float16_has_room_for_factors_and_signs():
    inputs, targets, _ = head_inputs(20, torch.float16, bias=False)
    token_weights = torch.where(torch.arange(20) % 2 == 0, 0.8, -0.2)
    factor = 50.0
    loss = weighted_linear_cross_entropy(
        *inputs, targets, token_weights, token_factors=lambda nll, entropy: torch.full_like(nll, factor)
    ).loss
    loss.backward()
    *_, gradients = full_logits(inputs, targets, token_weights)
    for x, gradient in zip(inputs, gradients, strict=True):
        assert relative_error(x.grad, gradient * factor) < 1e-2


def test_head_in_autocast_multiplies_in_bfloat16():
    inputs, targets, token_weights = head_inputs(50, bias=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = weighted_linear_cross_entropy(*inputs, targets, token_weights).loss
    loss.backward()
    rounded = [x.detach().bfloat16() for x in inputs]
    expected, *_, gradients = full_logits(rounded, targets, token_weights)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    for x, gradient in zip(inputs, gradients, strict=True):
        assert x.grad.dtype == torch.float32
        assert relative_error(x.grad, gradient) < 2e-2


def test_gradient_does_not_underflow_in_float16():
    inputs, targets, token_weights = head_inputs(64, torch.float16, bias=False)
    divisor = 10**7  # 1 / N is below the smallest number of float16, 6e-8, but for few tokens
    loss = weighted_linear_cross_entropy(*inputs, targets, token_weights, divisor).loss
    (loss * 2.0**16).backward()  # as a GradScaler does
    _, _, _, gradients = full_logits(inputs, targets, token_weights)
    scale = 2.0**16 * (token_weights != 0).sum().item() / divisor
    for x, gradient in zip(inputs, gradients, strict=True):
        assert relative_error(x.grad, gradient * scale) < 1e-2


def test_small_probabilities_have_a_gradient_in_float16():
    """Below 6e-8 float16 has nothing, which no scaling of the loss brings back."""
    inputs, targets, token_weights = head_inputs(64, torch.float16)
    with torch.no_grad():
        inputs[2][50:] = -12  # tokens of a probability of about 1e-8
        inputs[1][50:] *= 0.1
    targets = targets % 50
    loss = weighted_linear_cross_entropy(*inputs[:2], targets, token_weights, bias=inputs[2]).loss
    (loss * 2.0**16).backward()  # as a GradScaler does
    *_, gradients = full_logits(inputs, targets, token_weights)
    expected = gradients[2] * 2.0**16
    assert 0 < gradients[2][50:].max() < 6e-8 < expected[50:].min()
    assert relative_error(inputs[2].grad[50:], expected[50:]) < 1e-2
    for x, gradient in zip(inputs, gradients, strict=True):
        assert relative_error(x.grad, gradient * 2.0**16) < 1e-2


@pytest.mark.parametrize(
    ("tokens", "row_bytes", "capacity", "rows"),
    [
        (8192, 128256 * 2, 2048, 2048),  # half a GiB of logits
        (8192, 32064 * 2, 4096, 4096),  # no more rows than these
        (8192, 128256 * 4, 2048, 2048),  # fewer are slow, so they may take a GiB
        (8192, 2**20, 1024, 1024),
        (5000, 128256 * 2, 2048, 1792),  # three chunks of the same size, in whole tiles
        (4097, 32064 * 2, 4096, 2176),
        (1500, 128256 * 2, 2048, 1500),  # memory for few different numbers of rows
        (600, 128256 * 2, 1024, 600),
        (100, 128256 * 2, 128, 100),
        (1, 128256 * 2, 128, 1),
        (0, 128256 * 2, 128, 1),
        (8192, 2**31, 128, 128),
    ],
)
def test_chunks_of_a_gpu_are_of_the_same_size(tokens, row_bytes, capacity, rows):
    assert one_pass._chunk_rows(tokens, row_bytes, True, False) == (capacity, rows)


def test_second_backward_raises():
    inputs, targets, token_weights = head_inputs(4, bias=False)
    loss = weighted_linear_cross_entropy(*inputs, targets, token_weights).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="formed once and was already used"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top1_is_the_first_of_equal_logits_as_in_trl(dtype):
    inputs, targets, _ = head_inputs(40, dtype, bias=False)
    hidden_states, weight = (x.detach().clone() for x in inputs)
    weight[7:30] = weight[3]  # many tokens with the same logit
    hidden_states[:20] = weight[3] * 4  # which is the largest one here
    hidden_states[20:25] = 0  # all are equal
    targets[:10], targets[10:20], targets[20:25] = 3, 11, 0
    output = weighted_linear_cross_entropy(hidden_states, weight, targets, torch.ones(40))
    expected = ChunkedLogProbFunction.apply(hidden_states, weight, None, targets, 1.0, 32768, None, 1.0, ("is_top1",))[
        4
    ]
    assert torch.equal(output.is_top1, expected)
    assert output.is_top1[:10].all()
    assert not output.is_top1[10:20].any()
    assert output.is_top1[20:25].all()


def test_kernel_of_trl_equals_the_one_pass_kernel(monkeypatch):
    results = []
    for devices in (("cpu",), ()):
        monkeypatch.setattr("wit_trl.loss.functions._ONE_PASS_DEVICES", devices)
        inputs, targets, token_weights = head_inputs(50)
        scored = (token_weights != 0) | (torch.arange(50) % 3 == 0)
        targets[~scored] = -100
        output = weighted_linear_cross_entropy(
            *inputs[:2], targets.clamp(min=0) if devices else targets, token_weights, bias=inputs[2], scored=scored
        )
        (3 * output.loss).backward()
        results.append([*output, *(x.grad for x in inputs)])
    for one_pass_result, trl_result in zip(*results, strict=True):
        torch.testing.assert_close(trl_result, one_pass_result)


@pytest.mark.parametrize("fused_head", ["one_pass", "trl"])
@pytest.mark.parametrize("impossible", [slice(0, 40), slice(60, 61)])
def test_impossible_tokens_have_neither_entropy_nor_gradient(impossible, fused_head, chunks, monkeypatch):
    monkeypatch.setattr("wit_trl.loss.functions._VOCABULARY_CHUNK", 32)
    inputs, targets, token_weights = head_inputs(20)
    with torch.no_grad():
        inputs[2][impossible] = -torch.inf
    targets = targets % 40 + 61
    output = weighted_linear_cross_entropy(
        *(*inputs[:2], targets, token_weights, 3), bias=inputs[2], scored=True, fused_head=fused_head
    )
    output.loss.backward()
    expected = head_in_float64(inputs, targets, token_weights)
    assert output.loss.item() == pytest.approx(expected["loss"] / 3, rel=1e-5)
    assert output.nll.tolist() == pytest.approx(expected["nll"], rel=1e-4)
    assert output.entropy.tolist() == pytest.approx(expected["entropy"], rel=1e-4)
    assert not inputs[2].grad[impossible].any()
    assert all(x.grad.isfinite().all() for x in inputs)


@pytest.mark.parametrize("fused_head", ["one_pass", "trl"])
@pytest.mark.parametrize("factors", [None, lambda nll, entropy: torch.exp(-nll)])
def test_impossible_target_of_weight_zero_leaves_the_loss_alone(factors, fused_head):
    inputs, targets, token_weights = head_inputs(20)
    with torch.no_grad():
        inputs[2][targets[3]] = -torch.inf
    possible = targets != targets[3]
    token_weights[~possible] = 0
    output = weighted_linear_cross_entropy(
        *(*inputs[:2], targets, token_weights, 3),
        bias=inputs[2],
        scored=True,
        fused_head=fused_head,
        token_factors=factors,
    )
    expected = head_in_float64(inputs, targets, token_weights)
    terms = zip(token_weights.tolist(), expected["nll"], strict=True)
    factor = (lambda nll: 1) if factors is None else (lambda nll: math.exp(-nll))
    assert output.loss.item() == pytest.approx(sum(w * nll * factor(nll) for w, nll in terms if w) / 3, rel=1e-5)
    output.loss.backward()
    assert all(x.grad.isfinite().all() for x in inputs)


def test_impossible_target_of_weight_zero_leaves_the_reference_form_alone():
    logits, labels, weights = batch()
    labels[0, 1] = -100
    expected = reference(logits, labels, weights, 9)
    labels[0, 1], weights[0, 1] = 3, 0.0
    with torch.no_grad():
        logits[0, 0, 3] = -torch.inf
    loss = wit_loss(logits, labels, weights, 9)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-7)
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("fused_head", ["one_pass", "trl"])
@pytest.mark.parametrize("target", [-1, -100, VOCAB])
def test_target_that_is_no_token_is_refused_where_it_is_scored(target, fused_head):
    inputs, targets, token_weights = head_inputs(20, bias=False)
    expected = weighted_linear_cross_entropy(*inputs, targets, token_weights, fused_head=fused_head)
    targets[token_weights == 0] = target
    output = weighted_linear_cross_entropy(*inputs, targets, token_weights, fused_head=fused_head)
    assert torch.equal(output.loss, expected.loss)
    targets[token_weights.argmax()] = target
    with pytest.raises(RuntimeError, match="out of bounds"):
        weighted_linear_cross_entropy(*inputs, targets, token_weights, fused_head=fused_head)


@pytest.mark.parametrize("token_weight", [0.8, 1.0, 1.9999])
def test_float16_has_room_for_factors_of_64(token_weight):
    """Of an improbable target, whose gradient is the largest."""
    hidden_states, weight = torch.ones(2, HIDDEN, dtype=torch.float16), torch.zeros(VOCAB, HIDDEN).half()
    weight[5] = 2
    inputs = [hidden_states.requires_grad_(), weight.requires_grad_()]
    targets, token_weights = torch.tensor([3, 7]), torch.full((2,), token_weight)
    loss = weighted_linear_cross_entropy(
        *inputs, targets, token_weights, token_factors=lambda nll, entropy: torch.full_like(nll, 64)
    ).loss
    loss.backward()
    *_, gradients = full_logits(inputs, targets, token_weights)
    for x, gradient in zip(inputs, gradients, strict=True):
        assert relative_error(x.grad, gradient * 64) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_logit_scale_of_zero(dtype):
    inputs, targets, token_weights = head_inputs(20, dtype, bias=False)
    output = weighted_linear_cross_entropy(*inputs, targets, token_weights, logit_scale=0.0)
    output.loss.backward()
    expected = (token_weights.sum() * math.log(VOCAB) / token_weights.count_nonzero()).item()
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    assert not any(x.grad.any() for x in inputs)


class OnGPU(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    device = torch.device("cuda")


@pytest.mark.parametrize("tensor_class", [torch.Tensor, OnGPU])
def test_blocks_of_a_gpu_without_triton_are_large(tensor_class, monkeypatch):
    monkeypatch.setattr(one_pass, "rows", None)
    inputs, targets, token_weights = head_inputs(2000, bias=False)
    monkeypatch.setattr(one_pass, "_BLOCK_BYTES", 4 * VOCAB * 4)
    monkeypatch.setattr(one_pass, "_CHUNK_BYTES", 4 * VOCAB * 1000)
    blocks = []
    monkeypatch.setattr(torch, "exp", lambda z, **kwargs: blocks.append(len(z)) or z.exp())
    params = HeadParams(targets, token_weights, True, 1.0, None, None)
    with torch.no_grad():
        one_pass.weighted_nll(inputs[0].detach().as_subclass(tensor_class), inputs[1], None, params)
    assert len(blocks) == (1 if tensor_class is OnGPU else 500)


def test_kernel_of_trl_is_launched_on_the_device_of_its_tensors(monkeypatch):
    devices, current = [], [0]

    @contextlib.contextmanager
    def device_index(index):
        current.append(index)
        yield
        current.pop()

    def apply(hidden_states, *args):
        devices.append((hidden_states.device.index, current[-1]))
        return [hidden_states.sum(1)] * 5

    monkeypatch.setattr(torch.accelerator, "device_index", device_index)
    monkeypatch.setattr(ChunkedLogProbFunction, "apply", apply)
    with FakeTensorMode():
        inputs = [torch.ones(size, HIDDEN, device="cuda:1") for size in (4, VOCAB)]
        weighted_linear_cross_entropy(
            *inputs, torch.ones(4, device="cuda:1").long(), torch.ones(4, device="cuda:1"), 3, fused_head="trl"
        )
    assert devices == [(1, 1)]
