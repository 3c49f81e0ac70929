"""Factors for the loss of each token that follow from what the model predicts: the names that `loss_type` knows."""

from collections.abc import Callable
from typing import NamedTuple

import torch


# Negative log-likelihood and entropy of some tokens, in nats -> a factor for each of them
TokenFactors = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class NamedFactors(NamedTuple):
    """
    Factors that have a name.

    Args:
        meaning (`str`): What multiplies the loss of a token, as the table before training says it.
        function (`Callable`): Returns the factors.
    """

    meaning: str
    function: TokenFactors


def probability(nll: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    """Returns the probability of each token: Dynamic Fine-Tuning ([paper](https://huggingface.co/papers/2508.05629))."""
    return torch.exp(-nll)


# `loss_type`: its factors, `None` where the loss has none
TOKEN_FACTORS = {"nll": None, "wit": None, "dft": NamedFactors("its probability (dft)", probability)}
