"""What the one-pass head does with rows of logits, as Triton kernels, which CUDA, ROCm and XPU devices run."""

import functools
import math

import torch
import triton
import triton.language as tl

from .params import HeadParams, TokenScores


# Measured on an H100. 32 warps would be 3 % faster there, but more threads than an AMD GPU has for a program
_COLUMNS = 8192  # that a program holds at a time
_NUM_WARPS = 16
_LOG2_E = math.log2(math.e)
_LN_2 = tl.constexpr(math.log(2))
_NAN = tl.constexpr(tl.PropagateNan.ALL)  # else a model that has diverged would have a loss


def score(logits: torch.Tensor, params: HeadParams, scores: TokenScores, needs_gradient: bool) -> None:
    """
    Does the same as `one_pass.score`: one program reads a row, and overwrites it while much of it is in the cache, or,
    after factors, in another launch. What fills up a row to its stride is read and written too: all loads and stores
    are wide.
    """
    maximum, normaliser = torch.empty_like(scores.nll), torch.empty_like(scores.nll)
    scale, softcap, factors = params.logit_scale, params.softcap, params.token_factors
    group = 16 // logits.element_size()
    launch = functools.partial(
        _score_rows[(len(logits),)],
        *(logits, logits.stride(0), params.targets, params.token_weights, *scores, maximum, normaliser),
        *(logits.size(1), scale),
        # So that the kernel needs powers of two alone
        exponent_scale=_LOG2_E * (scale if softcap is None else 2 * scale / softcap),
        softcap=1.0 if softcap is None else _LOG2_E * softcap,
        HAS_SOFTCAP=softcap is not None,
        COLUMNS=max(group, min(_COLUMNS, triton.next_power_of_2(logits.size(1)))),
        GROUP=group,
        num_warps=_NUM_WARPS,
    )
    with torch.accelerator.device_index(logits.device.index):  # Triton launches on the current device
        launch(HAS_SCORES=False, HAS_GRADIENT=needs_gradient and factors is None)
        if factors is not None:
            params.token_weights.mul_(factors(scores.nll.clone(), scores.entropy.clone()))
            if needs_gradient:
                launch(HAS_SCORES=True, HAS_GRADIENT=True)


def scale(values: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiplies by a factor that the device knows. Where it is 1, nothing is read, and the host need not wait."""
    with torch.accelerator.device_index(values.device.index):
        _scale[(triton.cdiv(values.numel(), _COLUMNS),)](values, factor, values.numel(), COLUMNS=_COLUMNS)


@triton.jit
def _scale(values_ptr, factor_ptr, n, COLUMNS: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor != 1:
        index = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        values = tl.load(values_ptr + index, mask=index < n)
        tl.store(values_ptr + index, (values * factor).to(values_ptr.dtype.element_ty), mask=index < n)


@triton.jit
def _transform(raw, exponent_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Returns logits over ln 2, and the derivative of the soft cap, 1 - tanh², without cancellation."""
    z = raw.to(tl.float32) * exponent_scale
    slope = 1.0
    if HAS_SOFTCAP:
        exp = tl.exp2(tl.minimum(z, 100.0, propagate_nan=_NAN))  # e^2x of tanh x = 1 - 2 / (e^2x + 1), or 1
        reciprocal = 1 / (exp + 1)
        z = softcap * (1 - 2 * reciprocal)
        slope = 4 * exp * reciprocal * reciprocal
    return z, slope


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
    exponent_scale,
    softcap,
    HAS_SCORES: tl.constexpr,  # an earlier launch has written them
    HAS_GRADIENT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,  # of columns that a thread loads at once, and sums up by itself
):
    row = tl.program_id(0).to(tl.int64)  # times the stride, it overflows 32 bits
    logits_ptr += row * row_stride
    target = tl.load(target_ptr + row).to(tl.int32)
    if HAS_SCORES:
        maximum, normaliser = tl.load(maximum_ptr + row), tl.load(normaliser_ptr + row)
    else:
        # Read before the first reduction, whose barrier keeps it ahead of the stores that overwrite it
        z_target = _transform(tl.load(logits_ptr + target), exponent_scale, softcap, HAS_SOFTCAP)[0]
        near = target // GROUP * GROUP + tl.arange(0, GROUP)
        z_near = _transform(
            tl.load(logits_ptr + near, mask=near < target, other=0.0), exponent_scale, softcap, HAS_SOFTCAP
        )[0]
        before_target = tl.max(tl.where(near < target, z_near, -float("inf")), 0)
        group_end = GROUP * (1 + tl.arange(0, COLUMNS // GROUP))
        maxima = tl.full((COLUMNS // GROUP,), -3e38, tl.float32)  # no infinity, so that there is no inf - inf
        befores = tl.full((COLUMNS // GROUP,), -float("inf"), tl.float32)  # maxima of columns before the target
        sums = tl.zeros((COLUMNS // GROUP,), tl.float32)  # of 2^(z - maximum)
        dots = tl.zeros((COLUMNS // GROUP,), tl.float32)  # of 2^(z - maximum) * (z - maximum)
        for start in range(0, n_columns, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            # The cache is to keep what is read again, in place of what was written
            raw = tl.load(logits_ptr + column, mask=column < row_stride, other=0.0, eviction_policy="evict_last")
            z = _transform(raw, exponent_scale, softcap, HAS_SOFTCAP)[0]
            z = tl.reshape(tl.where(column < n_columns, z, -float("inf")), (COLUMNS // GROUP, GROUP))
            of_group = tl.max(z, 1)
            befores = tl.where(start + group_end <= target, tl.maximum(befores, of_group), befores)
            new_maxima = tl.maximum(maxima, of_group)
            shift = maxima - new_maxima
            decay = tl.exp2(shift)
            z = tl.maximum(z - new_maxima[:, None], -1e3, propagate_nan=_NAN)  # no 0 * inf
            exp = tl.exp2(z)
            dots = (dots + shift * sums) * decay + tl.sum(exp * z, 1)
            sums = sums * decay + tl.sum(exp, 1)
            maxima = new_maxima
        maximum = tl.max(maxima, 0)
        shift = maxima - maximum
        decay = tl.exp2(shift)
        normaliser = tl.sum(sums * decay, 0)
        dot = tl.sum((dots + shift * sums) * decay, 0)
        log_normaliser = tl.log2(normaliser)
        tl.store(nll_ptr + row, (log_normaliser - (z_target - maximum)) * _LN_2)
        tl.store(entropy_ptr + row, (log_normaliser - dot / normaliser) * _LN_2)
        # The first of equal ones is top-1
        tl.store(is_top1_ptr + row, (z_target >= maximum) & (z_target > tl.maximum(before_target, tl.max(befores, 0))))
        tl.store(maximum_ptr + row, maximum)
        tl.store(normaliser_ptr + row, normaliser)
    if HAS_GRADIENT:
        factor = tl.load(weight_ptr + row) * logit_scale
        scaled = factor / normaliser
        for start in range(0, n_columns, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            raw = tl.load(logits_ptr + column, mask=column < row_stride, other=0.0, eviction_policy="evict_first")
            z, slope = _transform(raw, exponent_scale, softcap, HAS_SOFTCAP)
            gradient = tl.exp2(z - maximum) * scaled
            gradient = tl.where(column == target, gradient - factor, gradient) * slope
            gradient = gradient.to(logits_ptr.dtype.element_ty)
            tl.store(logits_ptr + column, gradient, mask=column < row_stride, eviction_policy="evict_first")
