"""The weighted loss of an LM head and its gradient in one pass, in plain torch, on any device."""

import torch


# Logits of one chunk of tokens: large chunks need fewer passes over the head and its gradient, but more memory
_CHUNK_BYTES = 256 << 20
_CHUNK_ROWS_WITHOUT_WEIGHT_GRADIENT = 256
# Rows of logits that are turned into their gradient at a time, in float32, while they are in the cache
_BLOCK_BYTES = 2 << 20
# Above this number of chunks the gradient of a 16-bit head is summed in float32
_MAX_CHUNKS_IN_16_BITS = 4


def weighted_nll(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    token_weights: torch.Tensor,
    scored: torch.Tensor,
    logit_scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Returns the weighted sum of the negative log-likelihoods, and of each target its negative log-likelihood, entropy
    and top-1. Arguments as in [`weighted_linear_cross_entropy`].

    Tokens that are not scored are dropped before the projection. Since the weights are known beforehand, the gradient
    is formed in the forward pass: for each chunk of tokens one matrix product gives the logits, blocks of rows are
    overwritten by their own gradient (in float32, rounded once), and two more products give the gradients of the hidden
    states and of the head. Nothing is computed twice: three products for each token, two with a frozen head, one
    without gradient. The divisor is applied in the backward pass, so that the stored gradient does not underflow in
    float16.

    The gradient of a 16-bit head is summed over chunks in its own dtype up to four chunks (each rounds once, on top of
    the float32 sums inside the product), in float32 above.
    """
    index = scored.nonzero().squeeze(1)
    # Autocast would cast inside each product; the casts below are made once
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        hidden_states = hidden_states.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        weighted_sum, *per_token = _WeightedNLL.apply(
            hidden_states[index], weight, bias, targets[index], token_weights[index].float(), logit_scale, softcap
        )
    nll, entropy, is_top1 = (x.new_zeros(len(targets)).index_copy_(0, index, x) for x in per_token)
    return weighted_sum, nll, entropy, is_top1


class _WeightedNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, weight, bias, targets, token_weights, logit_scale, softcap):
        ctx.set_materialize_grads(False)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        needs_gradient = needs_hidden or needs_weight or needs_bias
        (n, _), vocab = hidden_states.shape, len(weight)
        head = weight.to(hidden_states.dtype)
        rows = _CHUNK_BYTES // (vocab * hidden_states.element_size())
        if not needs_weight:
            rows = min(rows, _CHUNK_ROWS_WITHOUT_WEIGHT_GRADIENT)
        rows = max(1, min(n, rows))
        block = max(1, min(rows, _BLOCK_BYTES // (4 * vocab)))
        many = n > _MAX_CHUNKS_IN_16_BITS * rows

        logits = hidden_states.new_empty(rows, vocab)
        buffers = hidden_states.new_empty(2, block, vocab, dtype=torch.float32)
        nll, entropy = hidden_states.new_empty(2, n, dtype=torch.float32)
        is_top1 = hidden_states.new_empty(n, dtype=torch.bool)
        grad_hidden = torch.empty_like(hidden_states) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32 if many else None) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        for start in range(0, n, rows):
            chunk = slice(start, start + rows)
            hidden = hidden_states[chunk]
            z = torch.mm(hidden, head.t(), out=logits[: len(hidden)])
            if bias is not None:
                z += bias
            for first in range(0, len(z), block):
                row = slice(start + first, start + min(first + block, len(z)))
                nll[row], entropy[row], is_top1[row] = _score(
                    z[first : first + block],
                    targets[row],
                    token_weights[row] if needs_gradient else None,
                    logit_scale,
                    softcap,
                    buffers,
                )
            if needs_hidden:
                torch.mm(z, head, out=grad_hidden[chunk])
            if needs_weight and grad_weight.dtype == z.dtype:
                # The first product is written, not added, so that the zeros are never touched
                grad_weight.addmm_(z.t(), hidden, beta=0 if start == 0 else 1)
            elif needs_weight:
                for v in range(0, vocab, 16384):
                    grad_weight[v : v + 16384] += torch.mm(z[:, v : v + 16384].t(), hidden)
            if needs_bias:
                grad_bias += z.sum(0, dtype=torch.float32)
        ctx.gradients = (
            grad_hidden,
            grad_weight.to(weight.dtype) if needs_weight else None,
            grad_bias.to(bias.dtype) if needs_bias else None,
        )
        ctx.mark_non_differentiable(nll, entropy, is_top1)
        return torch.dot(nll, token_weights), nll, entropy, is_top1

    @staticmethod
    def backward(ctx, grad_output, *_):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("The gradient of `weighted_linear_cross_entropy` is formed once and was already used.")
        return *(None if gradient is None else gradient.mul_(grad_output) for gradient in gradients), *[None] * 4


def _score(
    logits: torch.Tensor,
    targets: torch.Tensor,
    token_weights: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    buffers: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Returns negative log-likelihood, entropy and top-1 of rows of logits `(n, V)`. Of several tokens that are the most
    likely, the first one is top-1, as in TRL. With `token_weights`, the logits are overwritten by the gradient of the
    weighted negative log-likelihood.
    """
    targets = targets.unsqueeze(1)
    z = logits if logits.dtype == torch.float32 else buffers[0, : len(logits)].copy_(logits)
    if logit_scale != 1.0:
        z *= logit_scale
    if softcap is not None:
        capped = z / softcap
        torch.mul(torch.tanh(capped), softcap, out=z)
    z -= z.amax(1, keepdim=True)
    z_target = z.gather(1, targets)
    is_top1 = (z_target == 0).squeeze(1)
    hits = is_top1.clone()  # the search for the first one takes as long as the exponential function, so for these alone
    is_top1[hits] = z[hits].argmax(1) == targets[hits, 0]
    exp = torch.exp(z, out=buffers[1, : len(logits)])
    normaliser = exp.sum(1, keepdim=True)
    log_normaliser = normaliser.log()
    nll = (log_normaliser - z_target).squeeze(1)
    entropy = log_normaliser.squeeze(1) - torch.linalg.vecdot(exp, z) / normaliser.squeeze(1)
    if token_weights is not None:
        # p_target - 1, formed before any rounding
        exp.scatter_(1, targets, torch.exp(z_target) - normaliser)
        if softcap is not None:
            exp /= torch.cosh(capped).square()  # 1 - tanh², without cancellation
        torch.mul(exp, token_weights.unsqueeze(1) * logit_scale / normaliser, out=logits)
    return nll, entropy, is_top1
