"""What the one-pass head does with rows of logits, as Triton kernels, which CUDA, ROCm and XPU devices run."""

import functools

import torch
import triton
import triton.language as tl

from .params import HeadParams, TokenScores


_COLUMNS = 4096  # that a program holds at a time
_NUM_WARPS = 8


def score(logits: torch.Tensor, params: HeadParams, scores: TokenScores, needs_gradient: bool) -> None:
    """
    Does the same as `one_pass.score`: one program reads a row, and overwrites it while it is in the cache, or, after
    factors, in another launch. What fills up a row to its stride is read and written too: all loads, stores are wide.
    """
    maximum, normaliser = torch.empty_like(scores.nll), torch.empty_like(scores.nll)
    softcap, factors = params.softcap, params.token_factors
    launch = functools.partial(
        _score_rows[(len(logits),)],
        *(logits, logits.stride(0), params.targets, params.token_weights, *scores, maximum, normaliser),
        *(logits.size(1), params.logit_scale, 1.0 if softcap is None else softcap),
        HAS_SOFTCAP=softcap is not None,
        COLUMNS=min(_COLUMNS, triton.next_power_of_2(logits.size(1))),
        num_warps=_NUM_WARPS,
    )
    with torch.accelerator.device_index(logits.device.index):  # Triton launches on the current device
        launch(HAS_SCORES=False, HAS_GRADIENT=needs_gradient and factors is None)
        if factors is not None:
            params.token_weights.mul_(factors(scores.nll.clone(), scores.entropy.clone()))
            if needs_gradient:
                launch(HAS_SCORES=True, HAS_GRADIENT=True)


@triton.jit
def _transform(z, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    z = z * logit_scale
    if HAS_SOFTCAP:
        z = softcap * (2 * tl.sigmoid(2 * z / softcap) - 1)  # softcap * tanh(z / softcap)
    return z


@triton.jit
def _score_rows(
    logits_ptr,
    row_stride,
    target_ptr,
    weight_ptr,
    nll_ptr,
    entropy_ptr,
    is_top1_ptr,
    maximum_ptr,
    normaliser_ptr,
    n_columns,
    logit_scale,
    softcap,
    HAS_SCORES: tl.constexpr,  # an earlier launch has written them
    HAS_GRADIENT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # times the stride, it overflows 32 bits
    logits_ptr += row * row_stride
    target = tl.load(target_ptr + row)
    if HAS_SCORES:
        maximum, normaliser = tl.load(maximum_ptr + row), tl.load(normaliser_ptr + row)
    else:
        # Read before the first reduction, whose barrier keeps it ahead of the stores that overwrite it
        z_target = _transform(tl.load(logits_ptr + target).to(tl.float32), logit_scale, softcap, HAS_SOFTCAP)
        maximum = -3e38  # no infinity, so that a block of impossible tokens gives no inf - inf
        before_target = -float("inf")  # maximum of the columns before the target: the first of equal ones is top-1
        normaliser = 0.0  # sum of exp(z - maximum)
        dot = 0.0  # sum of exp(z - maximum) * (z - maximum)
        for start in range(0, n_columns, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            z = tl.load(logits_ptr + column, mask=column < row_stride, other=0.0).to(tl.float32)
            z = tl.where(column < n_columns, _transform(z, logit_scale, softcap, HAS_SOFTCAP), -float("inf"))
            before_target = tl.maximum(before_target, tl.max(tl.where(column < target, z, -float("inf")), 0))
            new_maximum = tl.maximum(maximum, tl.max(z, 0))
            exp = tl.exp(z - new_maximum)
            shift = tl.where(normaliser > 0, maximum - new_maximum, 0.0)  # no inf * 0 before the first token
            decay = tl.exp(shift)
            dot = (dot + shift * normaliser) * decay
            dot += tl.sum(tl.where(exp > 0, exp * (z - new_maximum), 0.0), 0)
            normaliser = normaliser * decay + tl.sum(exp, 0)
            maximum = new_maximum
        log_normaliser = tl.log(normaliser)
        tl.store(nll_ptr + row, log_normaliser - (z_target - maximum))
        tl.store(entropy_ptr + row, log_normaliser - dot / normaliser)
        tl.store(is_top1_ptr + row, (z_target >= maximum) & (z_target > before_target))
        tl.store(maximum_ptr + row, maximum)
        tl.store(normaliser_ptr + row, normaliser)
    if HAS_GRADIENT:
        factor = tl.load(weight_ptr + row) * logit_scale
        for start in range(0, n_columns, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            raw = tl.load(logits_ptr + column, mask=column < row_stride, other=0.0).to(tl.float32)
            gradient = tl.exp(_transform(raw, logit_scale, softcap, HAS_SOFTCAP) - maximum) / normaliser
            gradient = tl.where(column == target, gradient - 1, gradient) * factor
            if HAS_SOFTCAP:
                x = 2 * raw * logit_scale / softcap
                gradient *= 4 * tl.sigmoid(x) * tl.sigmoid(-x)  # 1 - tanh², without cancellation
            tl.store(logits_ptr + column, gradient.to(logits_ptr.dtype.element_ty), mask=column < row_stride)
