"""The weighted loss of an LM head and its gradient in one pass, on any device."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .params import HeadParams, TokenScores


rows: Any
try:
    from . import rows
except ImportError:  # there is no Triton, as on macOS and Windows
    rows = None

_TRITON_DEVICES = ("cuda", "xpu")
# Logits of one chunk of tokens: large chunks need fewer passes over the head and its gradient, but more memory
_CHUNK_BYTES = 256 << 20
_CHUNK_ROWS_WITHOUT_WEIGHT_GRADIENT = 256
# The least and the most of them at a time on a GPU: fewer read the head too often, and more save nothing on an H100
_GPU_CHUNK_ROWS = (2048, 4096)
_GPU_CHUNK_BYTES = (512 << 20, 1024 << 20)
_TILE_ROWS = 128
# Rows of logits that are turned into their gradient at a time, in float32, while they are in the cache of a CPU
_BLOCK_BYTES = 2 << 20
_GPU_BLOCK_BYTES = 256 << 20  # where there is no Triton: each block is a dozen launches
# Above this number of chunks the gradient of a 16-bit head is summed in float32
_MAX_CHUNKS_IN_16_BITS = 4
# Of a logit, before factors of tokens, which have room up to 64
_LARGEST_GRADIENT_IN_FLOAT16 = torch.finfo(torch.float16).max / 64


def weighted_nll(
    hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, params: HeadParams
) -> tuple[torch.Tensor, TokenScores]:
    """
    Returns the weighted sum of the negative log-likelihoods, and the scores of each target.

    Tokens that are not scored are dropped. Since the weights are known, the gradient is formed in the forward pass: for
    each chunk of tokens one product gives the logits, their rows are overwritten by their own gradient (in float32,
    rounded once), and two products give the gradients of hidden states and head. The backward pass scales them.

    The gradient of a 16-bit head is summed over up to four chunks in its own dtype, in float32 above. In float16, where
    a gradient below 6e-8 is none, the rows are scaled by a power of two, and the products stay in float32.
    """
    if not torch.is_grad_enabled():  # else a parameter would get a gradient that nobody asks for
        hidden_states, weight = hidden_states.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    # Autocast would cast inside each product; the casts below are made once
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        hidden_states = hidden_states.to(torch.get_autocast_dtype(device))
    index, n = None, len(params.targets)
    if isinstance(params.scored, torch.Tensor):
        index = params.scored.nonzero().squeeze(1)
        hidden_states, params = hidden_states[index], params[index]
    with torch.autocast(device, enabled=False):
        loss, *scores = _WeightedNLL.apply(hidden_states, weight, bias, params)
    if index is not None:
        scores = [values.new_zeros(n).index_copy_(0, index, values) for values in scores]
    return loss, TokenScores(*scores)


class _WeightedNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, weight, bias, params):
        ctx.set_materialize_grads(False)
        inputs, needs = (hidden_states, weight, bias), ctx.needs_input_grad[:3]
        (n, _), vocab = hidden_states.shape, len(weight)
        on_gpu = hidden_states.device.type != "cpu"
        ctx.uses_triton = rows is not None and hidden_states.device.type in _TRITON_DEVICES
        pitch = -(-vocab // 64) * 64 if ctx.uses_triton else vocab  # so that every row of a GPU is aligned
        capacity, count = _chunk_rows(n, pitch * hidden_states.element_size(), on_gpu, needs[1])
        is_half = torch.float16 in (hidden_states.dtype, weight.dtype)
        in_float32 = n > _MAX_CHUNKS_IN_16_BITS * count or is_half or weight.dtype != hidden_states.dtype
        token_weights = params.token_weights.to(torch.float32, copy=True)  # which the factors multiply in place
        params = dataclasses.replace(params, token_weights=token_weights)
        ctx.scale = 1.0
        if hidden_states.dtype == torch.float16:
            largest = F.pad(token_weights.abs() * abs(params.logit_scale), (0, 1), value=1e-30).max()
            ctx.scale = torch.exp2(torch.floor(torch.log2(_LARGEST_GRADIENT_IN_FLOAT16 / largest)))
            token_weights *= ctx.scale

        nll, entropy = hidden_states.new_empty(2, n, dtype=torch.float32)
        scores = TokenScores(nll, entropy, hidden_states.new_empty(n, dtype=torch.bool))
        hidden_dtype = torch.float32 if hidden_states.dtype == torch.float16 else hidden_states.dtype
        dtypes = (hidden_dtype, torch.float32 if in_float32 else weight.dtype, torch.float32)
        gradients = [
            (torch.empty if n else torch.zeros)(x.shape, dtype=dtype, device=x.device) if needed else None
            for x, dtype, needed in zip(inputs, dtypes, needs, strict=True)
        ]
        logits = hidden_states.new_empty(capacity, pitch)[:count, :vocab]
        _score_chunks(logits, *inputs, params, scores, gradients, rows.score if ctx.uses_triton else score)
        del logits  # before the casts
        if not is_half:  # which may have to wait for a scale of the loss, and is cast by autograd
            gradients = [None if y is None else y.to(x.dtype) for x, y in zip(inputs, gradients, strict=True)]
        ctx.gradients = gradients
        ctx.mark_non_differentiable(*scores)
        loss = (nll * token_weights).masked_fill_(token_weights == 0, 0).sum()  # where a nll may be infinite
        return loss / ctx.scale, *scores

    @staticmethod
    def backward(ctx, grad_output, *_):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("The gradient of `weighted_linear_cross_entropy` is formed once and was already used.")
        grad_output = grad_output / ctx.scale
        # It is mostly 1, but only a CPU says so without waiting
        if grad_output.device.type != "cpu" or grad_output != 1:
            scale = rows.scale if ctx.uses_triton else torch.Tensor.mul_
            for gradient in gradients:
                if gradient is not None:
                    scale(gradient, grad_output)
        return *gradients, None


def _chunk_rows(n: int, row_bytes: int, on_gpu: bool, needs_weight: bool) -> tuple[int, int]:
    """Returns for how many rows of logits there is memory, and how many are held at a time."""
    if not on_gpu:
        count = _CHUNK_BYTES // row_bytes
        count = max(1, min(n, count if needs_weight else min(count, _CHUNK_ROWS_WITHOUT_WEIGHT_GRADIENT)))
        return count, count
    (least_rows, most_rows), (least_bytes, most_bytes) = _GPU_CHUNK_ROWS, _GPU_CHUNK_BYTES
    most = min(most_rows, max(least_bytes // row_bytes, min(least_rows, most_bytes // row_bytes)))
    # Whole tiles of a matrix product. Few different sizes, so that the memory of a step serves the next one
    most = max(_TILE_ROWS, most // _TILE_ROWS * _TILE_ROWS)
    tiles, chunks = -(-n // _TILE_ROWS), max(1, -(-n // most))
    return min(most, _TILE_ROWS << max(0, tiles - 1).bit_length()), max(1, min(n, -(-tiles // chunks) * _TILE_ROWS))


def _score_chunks(
    logits: torch.Tensor,  # for one chunk
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    params: HeadParams,
    scores: TokenScores,
    gradients: list[torch.Tensor | None],
    score_rows: Callable[[torch.Tensor, HeadParams, TokenScores, bool], None],
) -> None:
    """Writes the scores, and the gradients that are not None, chunk by chunk."""
    grad_hidden, grad_weight, grad_bias = gradients
    head = weight.to(hidden_states.dtype)
    bias = None if bias is None else bias.to(hidden_states.dtype)
    needs_gradient = any(gradient is not None for gradient in gradients)
    for start in range(0, len(hidden_states), len(logits)):
        chunk = slice(start, start + len(logits))
        hidden, is_first = hidden_states[chunk], start == 0
        z = logits[: len(hidden)]
        if bias is None:
            torch.mm(hidden, head.t(), out=z)
        else:
            torch.addmm(bias, hidden, head.t(), out=z)
        score_rows(z, params[chunk], TokenScores(*(values[chunk] for values in scores)), needs_gradient)
        if grad_hidden is not None:
            _add_product(grad_hidden[chunk], z, head, is_first=True)
        if grad_weight is not None:
            _add_product(grad_weight, z.t(), hidden, is_first)
        if grad_bias is not None:
            total = z.sum(0, dtype=torch.float32)
            grad_bias.copy_(total if is_first else total + grad_bias)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, is_first: bool) -> None:
    """Adds the product of two matrices to a sum, or writes the first one over what was in memory."""
    beta = 0 if is_first else 1
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=beta)
    elif total.is_cuda:  # without rounding the product
        torch.addmm(total, a, b, beta=beta, out_dtype=torch.float32, out=total)
    else:
        for inner in range(0, len(b), 16384):
            other = b[inner : inner + 16384]
            if a.dtype == torch.float16:  # in which a product may overflow
                other = other.float()
            for start in range(0, len(a), 16384):
                product = torch.mm(a[start : start + 16384, inner : inner + 16384].to(other.dtype), other)
                part = total[start : start + 16384]
                if is_first and inner == 0:
                    part.copy_(product)
                else:
                    part += product


def score(logits: torch.Tensor, params: HeadParams, scores: TokenScores, needs_gradient: bool) -> None:
    """
    Writes negative log-likelihood, entropy and top-1 of rows of logits `(n, V)`, and multiplies their weights by the
    factors that follow from the first two. If a gradient is needed, the logits are overwritten by that of the weighted
    negative log-likelihood. Of several tokens that are the most likely, the first one is top-1, as in TRL.
    """
    block_bytes = _BLOCK_BYTES if logits.device.type == "cpu" else _GPU_BLOCK_BYTES
    block = max(1, min(len(logits), block_bytes // (4 * logits.size(1))))
    buffers = logits.new_empty(2, block, logits.size(1), dtype=torch.float32)
    for start in range(0, len(logits), block):
        part = slice(start, start + block)
        raw, target, token_weights = logits[part], params.targets[part].unsqueeze(1), params.token_weights[part]
        nll, entropy, is_top1 = (values[part] for values in scores)
        z = raw if raw.dtype == torch.float32 else buffers[0, : len(raw)].copy_(raw)
        if params.logit_scale != 1.0:
            z *= params.logit_scale
        if params.softcap is not None:
            capped = z / params.softcap
            torch.mul(torch.tanh(capped), params.softcap, out=z)
        z -= z.amax(1, keepdim=True)
        z_target = z.gather(1, target)
        hits = (z_target == 0).squeeze(1)
        is_top1.copy_(hits)  # the search for the first one takes as long as the exponential, so for these alone
        is_top1[hits] = z[hits].argmax(1) == target[hits, 0]
        exp = torch.exp(z, out=buffers[1, : len(raw)])
        normaliser = exp.sum(1, keepdim=True)
        log_normaliser = normaliser.log()
        nll.copy_((log_normaliser - z_target).squeeze(1))
        entropy.copy_(log_normaliser.squeeze(1) - torch.linalg.vecdot(exp, z.clamp_(min=-1e3)) / normaliser.squeeze(1))
        if params.token_factors is not None:
            token_weights *= params.token_factors(nll.clone(), entropy.clone())
        if needs_gradient:
            # p_target - 1, formed before any rounding
            exp.scatter_(1, target, torch.exp(z_target) - normaliser)
            if params.softcap is not None:
                exp /= torch.cosh(capped).square()  # 1 - tanh², without cancellation
            torch.mul(exp, token_weights.unsqueeze(1) * params.logit_scale / normaliser, out=raw)
