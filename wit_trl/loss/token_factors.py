"""Factors for the loss of each token that follow from what the model predicts, by the names that `loss_type` knows."""

from collections.abc import Callable
from typing import NamedTuple

import torch


# The negative log-likelihoods and the entropies of some tokens, in nats -> a factor for each of them
TokenFactors = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class NamedFactors(NamedTuple):
    """Factors, and what the table before training calls them."""

    meaning: str
    function: TokenFactors


def probability(nll: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    """Returns the probabilities of the tokens: Dynamic Fine-Tuning ([paper](https://huggingface.co/papers/2508.05629))."""
    return torch.exp(-nll)


# Without factors, TRL's head computes nothing more
TOKEN_FACTORS = {"nll": None, "wit": None, "dft": NamedFactors("its probability (dft)", probability)}
