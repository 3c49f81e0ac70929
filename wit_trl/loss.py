"""The public loss functions: `wit_loss`, the reference form; `weighted_linear_cross_entropy`, without full logits."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ._upstream import ChunkedLogProbFunction
from .kernels import one_pass


# Where the one-pass kernel was tested and timed
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
        logits (`torch.Tensor` of shape `(B, T, V)`):
            Output of the language model.
        labels (`torch.Tensor` of shape `(B, T)`):
            Token ids, -100 where a token is no target.
        token_weights (`torch.Tensor` of shape `(B, T)`):
            Weight of each token as a target.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*):
            Divisor \\( N \\): the number of targets of the whole optimizer step, over all micro-batches and ranks.
            Defaults to the number of targets in this batch. A batch without any gives a differentiable zero.
    """
    labels, token_weights = labels[:, 1:], token_weights[:, 1:]  # (B, T - 1)
    if num_items_in_batch is None:
        num_items_in_batch = (labels != -100).sum()
    logits = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    per_token_loss = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")  # (B, T - 1)
    return (per_token_loss * token_weights).sum() / torch.as_tensor(num_items_in_batch).clamp(min=1)


class LinearCrossEntropyOutput(NamedTuple):
    """
    Output of [`weighted_linear_cross_entropy`]. The per-token fields carry no gradient and are zero where a token is
    not scored.

    Args:
        loss (`torch.Tensor`): Weighted negative log-likelihood over the divisor, a float32 scalar in nats.
        nll (`torch.Tensor` of shape `(N,)`): Unweighted negative log-likelihood of each target, in nats.
        entropy (`torch.Tensor` of shape `(N,)`): Entropy of each predicted distribution, in nats.
        is_top1 (`torch.Tensor` of shape `(N,)`): Whether the target is the most likely token.
    """

    loss: torch.Tensor
    nll: torch.Tensor
    entropy: torch.Tensor
    is_top1: torch.Tensor


def weighted_linear_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    token_weights: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    scored: torch.Tensor | None = None,
) -> LinearCrossEntropyOutput:
    r"""
    Returns the WIT loss of hidden states under a language-model head, without ever holding the logits of all tokens.
    Same as

    ```python
    logits = logit_scale * F.linear(hidden_states, weight, bias).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    nll = F.cross_entropy(logits, targets, reduction="none")
    loss = (token_weights * nll).sum() / num_items_in_batch
    ```

    On a CPU the gradient is formed in the forward pass, since the weights are known beforehand
    ([`wit_trl.kernels.one_pass`]). On other devices TRL's kernel runs, with the weights applied to its result.

    Args:
        hidden_states (`torch.Tensor` of shape `(N, H)`):
            Hidden states, each of which predicts one target.
        weight (`torch.Tensor` of shape `(V, H)`):
            Weight of the head.
        targets (`torch.Tensor` of shape `(N,)`):
            Token ids. Where a token is not scored, any value.
        token_weights (`torch.Tensor` of shape `(N,)`):
            Weight of each target.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*):
            Divisor. Defaults to the number of targets whose weight is not zero; at least 1.
        bias (`torch.Tensor` of shape `(V,)`, *optional*):
            Bias of the head.
        logit_scale (`float`, *optional*, defaults to `1.0`):
            Factor on the logits.
        softcap (`float`, *optional*):
            Soft cap of the scaled logits.
        scored (`torch.Tensor` of shape `(N,)`, *optional*):
            Which targets get per-token outputs, a superset of those whose weight is not zero, which is the default.

    Raises:
        `RuntimeError`: the loss is differentiated a second time.
    """
    if num_items_in_batch is None:
        num_items_in_batch = (token_weights != 0).sum()
    if scored is None:
        scored = token_weights != 0
    kernel = one_pass.weighted_nll if hidden_states.device.type in _ONE_PASS_DEVICES else _weighted_nll_of_trl
    weighted_sum, nll, entropy, is_top1 = kernel(
        hidden_states, weight, bias, targets, token_weights, scored, logit_scale, softcap
    )
    return LinearCrossEntropyOutput(
        weighted_sum / torch.as_tensor(num_items_in_batch).clamp(min=1), nll, entropy, is_top1
    )


def _weighted_nll_of_trl(
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
    The same as `one_pass.weighted_nll` by TRL's kernel, which scores every target, with the weights applied to its
    result. It does not make the host wait for the device.
    """
    log_probs, entropy, _, _, is_top1 = ChunkedLogProbFunction.apply(
        hidden_states,
        weight,
        bias,
        targets.clamp(min=0),
        1.0,  # temperature
        _VOCABULARY_CHUNK,
        softcap,
        logit_scale,
        ("entropy", "is_top1"),
    )
    nll, entropy = (-log_probs).masked_fill(~scored, 0), entropy.detach().masked_fill(~scored, 0)
    return (nll * token_weights).sum(), nll.detach(), entropy, is_top1 & scored
