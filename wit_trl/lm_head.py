from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from trl.trainer import utils

from .loss import weighted_linear_cross_entropy


def align_with_targets(values: torch.Tensor, length: int, fill: float = 0) -> torch.Tensor:
    """
    Returns values of tokens `(B, T)` as values of the `length` targets of each row. The first token, which nothing
    predicts, falls away; the virtual tokens that prompt learning puts in front, which are no targets, get `fill`.
    """
    return F.pad(values, (length + 1 - values.size(1), 0), value=fill)[:, 1:]


class WeightedLMHead:
    """
    Stands in for the kernel of the fused LM head that TRL gives a model, for the calls made within `weigh`.

    TRL's forward runs the backbone, gathers the head and asks its kernel for the log-probabilities of all tokens. Here
    they come from [`weighted_linear_cross_entropy`], already multiplied by the token's weight, and the unweighted
    negative log-likelihoods are kept in `nll`, a float32 tensor of shape `(B * (T - 1),)` without gradient. The
    gradient is formed in the forward pass, so it is right for a loss that adds up the log-probabilities, as TRL's does,
    and for no other.
    """

    @contextmanager
    def weigh(self, token_weights: torch.Tensor, scored: torch.Tensor) -> Iterator[None]:
        """
        Args:
            token_weights (`torch.Tensor` of shape `(B, T)`):
                Weight of each token as a target.
            scored (`torch.Tensor` of shape `(B, T)`):
                Which tokens to score, whatever their weight.
        """
        self._token_weights, self._scored = token_weights, scored
        kernel, utils._ChunkedLogProbFunction = utils._ChunkedLogProbFunction, self
        try:
            yield
        finally:
            utils._ChunkedLogProbFunction = kernel

    @torch.compiler.disable
    def apply(self, hidden_states, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs):
        length = len(targets) // len(self._token_weights)
        token_weights = align_with_targets(self._token_weights, length).reshape(-1)
        scored = align_with_targets(self._scored, length).reshape(-1)
        loss, self.nll, entropy, is_top1 = weighted_linear_cross_entropy(
            hidden_states,
            weight,
            targets,
            token_weights,
            1,
            bias=bias,
            logit_scale=logit_scale,
            softcap=softcap,
            scored=scored,
        )
        log_probs = -token_weights * self.nll
        # One of them carries the gradient of the sum. TRL masks those that are not scored.
        carrier = scored.long().argmax()[None]
        log_probs = log_probs.index_add(0, carrier, (loss.detach() - loss)[None])
        return log_probs, entropy, None, None, is_top1
