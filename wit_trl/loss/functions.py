"""The public loss functions: `wit_loss`, the reference form; `weighted_linear_cross_entropy`, without full logits."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import one_pass
from .params import FUSED_HEADS, HeadParams, TokenScores
from .token_factors import TokenFactors


# Where the one-pass kernel is chosen by itself
_ONE_PASS_DEVICES = ("cpu",)
_VOCABULARY_CHUNK = 32768  # as TRL calls its kernel


def wit_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    token_weights: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    r"""
    Returns the WIT loss of a batch, a scalar in nats. Reference form, for any training loop: it needs the full logits,
    which [`WITSFTTrainer`] never builds.

    $$\mathcal{L} = -\frac{1}{N} \sum_{t \,:\, \text{label}_t \neq -100} w_t \log p(x_t \mid x_{<t})$$

    with \\( w_t \\) the weight of token \\( t \\) as a target and \\( N \\) the *number* of tokens with a label, not
    the sum of their weights ([paper](https://huggingface.co/papers/2507.07817)). Labels and weights are aligned with
    `input_ids`, as [`DataCollatorForWIT`] returns them: the shift happens in here, and the first token of a row, which
    nothing predicts, is in neither sum.

    Args:
        logits (`torch.Tensor` of shape `(B, T, V)`): Output of the language model.
        labels (`torch.Tensor` of shape `(B, T)`): Token ids, -100 where a token is no target.
        token_weights (`torch.Tensor` of shape `(B, T)`): Weight of each token as a target.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*):
            Divisor \\( N \\): the number of targets of the whole optimizer step, over all micro-batches and ranks.
            Defaults to the number of targets in this batch. Without any the loss is a differentiable zero.
    """
    labels, token_weights = labels[:, 1:], token_weights[:, 1:]  # (B, T - 1)
    if num_items_in_batch is None:
        num_items_in_batch = (labels != -100).sum()
    logits = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    per_token_loss = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")  # (B, T - 1)
    # The loss of an impossible token is infinite, and times a weight of 0 it is none
    return (per_token_loss * token_weights).masked_fill(token_weights == 0, 0).sum() / not_zero(num_items_in_batch)


def not_zero(divisor: torch.Tensor | float) -> torch.Tensor:
    """Returns a divisor, or 1 in the place of 0, where there is nothing to divide."""
    divisor = torch.as_tensor(divisor)
    return torch.where(divisor == 0, 1, divisor)


class LinearCrossEntropyOutput(NamedTuple):
    """Output of [`weighted_linear_cross_entropy`]. What is not the loss has no gradient, and is 0 if not scored."""

    loss: torch.Tensor  # weighted negative log-likelihood over the divisor, a float32 scalar in nats
    nll: torch.Tensor  # (N,), unweighted negative log-likelihood of each target, in nats
    entropy: torch.Tensor  # (N,), of each predicted distribution, in nats
    is_top1: torch.Tensor  # (N,), whether the target is the most likely token


def weighted_linear_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    token_weights: torch.Tensor,
    num_items_in_batch: torch.Tensor | float | None = None,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    scored: torch.Tensor | bool | None = None,
    token_factors: TokenFactors | None = None,
    fused_head: str = "auto",
) -> LinearCrossEntropyOutput:
    r"""
    Returns the WIT loss of hidden states under a language-model head, without ever holding the logits of all tokens.
    Same as

    ```python
    logits = logit_scale * F.linear(hidden_states, weight, bias).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    nll = F.cross_entropy(logits, targets, reduction="none")
    if token_factors is not None:
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        token_weights = token_weights * token_factors(nll.detach(), entropy.detach())
    loss = (token_weights * nll).sum() / num_items_in_batch
    ```

    Args:
        hidden_states (`torch.Tensor` of shape `(N, H)`): Hidden states, each of which predicts one target.
        weight (`torch.Tensor` of shape `(V, H)`): Weight of the head.
        targets (`torch.Tensor` of shape `(N,)`): Token ids. Where a token is not scored, any value.
        token_weights (`torch.Tensor` of shape `(N,)`): Weight of each target.
        num_items_in_batch (`torch.Tensor` or `float`, *optional*):
            Divisor. Defaults to the number of targets whose weight is not zero. 0 means 1.
        bias (`torch.Tensor` of shape `(V,)`, *optional*): Bias of the head.
        logit_scale (`float`, *optional*, defaults to `1.0`): Factor on the logits.
        softcap (`float`, *optional*): Soft cap of the scaled logits.
        scored (`torch.Tensor` of shape `(N,)` or `bool`, *optional*):
            Which targets get per-token outputs, a superset of those whose weight is not zero, which is the default.
            `True` means all of them, for which the host need not wait for a device.
        token_factors (`Callable[[torch.Tensor, torch.Tensor], torch.Tensor]`, *optional*):
            Returns factors for the weights of tokens, from their negative log-likelihoods and entropies, without
            gradient, in nats. It gets some of the scored tokens at a time, so each factor has to follow from its own
            token. In float16, factors above 64 may overflow.
        fused_head (`str`, *optional*, defaults to `"auto"`):
            Which kernel runs: `"one_pass"`, `"trl"`, or `"auto"`, the first on a CPU and the second elsewhere.

    Raises:
        `ValueError`: there is no such `fused_head`.
        `RuntimeError`: the loss is differentiated a second time; a scored target is no row of the head (on a GPU, a
        device-side assertion).
    """
    num_items_in_batch = token_weights.count_nonzero() if num_items_in_batch is None else num_items_in_batch
    scored = token_weights != 0 if scored is None else scored
    kernel = one_pass.weighted_nll if uses_one_pass(fused_head, hidden_states.device) else trl_weighted_nll
    token_weights = token_weights / not_zero(num_items_in_batch)  # so that the gradient is whole in the forward pass
    if isinstance(scored, torch.Tensor):
        targets = targets.where(scored, 0)
    # The same, without strides, but indexing refuses what is no token, which a kernel would read from foreign memory
    targets = torch.arange(len(weight), device=targets.device).gather(0, targets)
    params = HeadParams(targets, token_weights, scored, logit_scale, softcap, token_factors)
    loss, scores = kernel(hidden_states, weight, bias, params)
    return LinearCrossEntropyOutput(loss, *scores)


def uses_one_pass(fused_head: str, device: torch.device) -> bool:
    """Returns whether the one-pass head runs on a device, else TRL's. Raises a `ValueError` for an unknown name."""
    if fused_head not in FUSED_HEADS:
        raise ValueError(f"`fused_head` is {fused_head!r}, but must be one of {FUSED_HEADS}.")
    return device.type in _ONE_PASS_DEVICES if fused_head == "auto" else fused_head == "one_pass"


def weighted_sum(
    nll: torch.Tensor,
    entropy: torch.Tensor,
    token_weights: torch.Tensor,
    scored: torch.Tensor | bool,
    token_factors: TokenFactors | None,
) -> torch.Tensor:
    """Returns the weighted sum of negative log-likelihoods that have a gradient: 0, as the weights, if not scored."""
    if token_factors is not None:
        index = scored.nonzero(as_tuple=True) if isinstance(scored, torch.Tensor) else ...
        token_weights = token_weights.clone()
        with torch.no_grad():
            token_weights[index] *= token_factors(nll[index].clone(), entropy[index].clone())
    return (nll * token_weights).masked_fill(token_weights == 0, 0).sum()  # where a nll may be infinite


def trl_weighted_nll(
    hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, params: HeadParams
) -> tuple[torch.Tensor, TokenScores]:
    """
    Does the same as `one_pass.weighted_nll`, by TRL's kernel, which scores every target. Without factors, or with all
    tokens scored, the host need not wait for the device.
    """
    from trl.kernels import ChunkedLogProbFunction  # here, since the one-pass head needs no TRL

    temperature, outputs = 1.0, ("entropy", "is_top1")
    if bias is not None:  # impossible, but finite: TRL's kernel multiplies logits by probabilities of 0
        bias = bias.clamp(min=-1e4)
    with torch.accelerator.device_index(hidden_states.device.index):  # Triton launches on the current device
        log_probs, entropy, _, _, is_top1 = ChunkedLogProbFunction.apply(
            *(hidden_states, weight, bias, params.targets),
            *(temperature, _VOCABULARY_CHUNK, params.softcap, params.logit_scale, outputs),
        )
    nll, entropy, token_weights, scored = -log_probs, entropy.detach(), params.token_weights, params.scored
    if isinstance(scored, torch.Tensor):
        nll, entropy, token_weights = (x.where(scored, 0) for x in (nll, entropy, token_weights))
        is_top1 = is_top1 & scored
    loss = weighted_sum(nll, entropy, token_weights, scored, params.token_factors)
    return loss, TokenScores(nll.detach(), entropy, is_top1)
