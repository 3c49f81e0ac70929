"""What a kernel of the LM head gets besides hidden states and head, and what it writes of each token."""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .token_factors import TokenFactors


FUSED_HEADS = ("auto", "one_pass", "trl")  # the values of `fused_head`. The configuration reads them without Triton


@dataclass(frozen=True, eq=False)
class HeadParams:
    """What the hidden states of `N` tokens are scored with: arguments of [`weighted_linear_cross_entropy`]."""

    targets: torch.Tensor  # (N,)
    token_weights: torch.Tensor  # (N,), over the divisor already
    scored: torch.Tensor | bool  # (N,), or True for all
    logit_scale: float
    softcap: float | None
    token_factors: TokenFactors | None

    def __getitem__(self, index: torch.Tensor | slice) -> "HeadParams":
        """Returns those of some tokens, which are all scored. Of a slice, they are views."""
        targets, token_weights = self.targets[index], self.token_weights[index]
        return dataclasses.replace(self, targets=targets, token_weights=token_weights, scored=True)


class TokenScores(NamedTuple):
    """What is known of each of `N` tokens, without gradient."""

    nll: torch.Tensor  # (N,), in nats
    entropy: torch.Tensor  # (N,), in nats
    is_top1: torch.Tensor  # (N,)
