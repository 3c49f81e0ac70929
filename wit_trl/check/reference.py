"""The loss as plain loops in float64, independent of the kernels: one token after another, derivatives by hand."""

from typing import NamedTuple

import torch

from ..loss.token_factors import TokenFactors


class HeadInFloat64(NamedTuple):
    """What [`head_in_float64`] returns."""

    loss: torch.Tensor  # weighted sum of the negative log-likelihoods
    nll: torch.Tensor  # (N,), in nats
    entropy: torch.Tensor  # (N,), in nats
    is_top1: torch.Tensor  # (N,)
    grad_hidden: torch.Tensor  # (N, H), of the loss
    grad_weight: torch.Tensor  # (V, H)
    grad_bias: torch.Tensor  # (V,)


@torch.no_grad()
def head_in_float64(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    token_weights: torch.Tensor,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    token_factors: TokenFactors | None = None,
) -> HeadInFloat64:
    """Arguments as in [`weighted_linear_cross_entropy`], whose `num_items_in_batch` is 1 here."""
    if hidden_states.device.type not in ("cpu", "cuda"):  # some others have no float64
        hidden_states, weight, targets, token_weights = (
            x.cpu() for x in (hidden_states, weight, targets, token_weights)
        )
    hidden_states, weight = hidden_states.double(), weight.double()
    bias = weight.new_zeros(len(weight)) if bias is None else bias.to(weight)
    nll, entropy = hidden_states.new_empty(2, len(targets))
    is_top1 = torch.empty_like(targets, dtype=torch.bool)
    loss = weight.new_zeros(())
    grad_hidden, grad_weight, grad_bias = (torch.zeros_like(x) for x in (hidden_states, weight, bias))
    for t, (hidden, target) in enumerate(zip(hidden_states, targets.tolist(), strict=True)):
        logits = logit_scale * (weight @ hidden + bias)
        slope = torch.ones_like(logits)
        if softcap is not None:
            tanh = torch.tanh(logits / softcap)
            logits, slope = softcap * tanh, 1 - tanh**2
        log_p = torch.log_softmax(logits, 0)
        nll[t], entropy[t] = -log_p[target], torch.special.entr(log_p.exp()).sum()
        is_top1[t] = logits.argmax() == target
        factor = 1.0 if token_factors is None else token_factors(nll[t], entropy[t])
        token_weight = token_weights[t].double() * factor
        loss += token_weight * nll[t]
        of_logits = log_p.exp()
        of_logits[target] -= 1
        of_logits *= token_weight * logit_scale * slope
        grad_hidden[t] = of_logits @ weight
        grad_weight.addr_(of_logits, hidden)
        grad_bias += of_logits
    return HeadInFloat64(loss, nll, entropy, is_top1, grad_hidden, grad_weight, grad_bias)
