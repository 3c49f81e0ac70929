"""Sums over tokens, which any number of micro-batches and ranks can add to, and the means that are logged."""

import torch
from trl.trainer.utils import FusedCausalLMOutput


NUM_TERMS = 8  # of `loss_terms`


def loss_terms(
    nll: torch.Tensor, outputs: FusedCausalLMOutput, weights: torch.Tensor, regions: torch.Tensor
) -> torch.Tensor:
    """
    Returns, for each token, its negative log-likelihood and 1 if it is a scored prompt token, the same if it is a
    scored completion token, and if its weight is not zero its weighted negative log-likelihood, 1, the entropy, and
    whether it is the most likely token. All arguments are `(B, T)`, the result is `(B, T, 8)` in float32.
    """
    nll, entropy = nll.float(), outputs.entropy.detach().float()
    prompt, completion = outputs.label_mask & (regions == 0), outputs.label_mask & (regions == 1)
    weighted = weights != 0
    by_region = (nll * prompt, prompt, nll * completion, completion)
    by_weight = (nll * weights, weighted, entropy * weighted, outputs.is_top1 & weighted)
    return torch.stack(by_region + by_weight, dim=-1)


def token_metrics(terms: list[float]) -> dict[str, float]:
    """Returns the metrics that TRL logs for the tokens it trains, from sums of `loss_terms`."""
    *_, count, entropy, correct = terms
    return {"entropy": entropy / max(count, 1), "mean_token_accuracy": correct / max(count, 1)}


def region_losses(sums: list[float]) -> dict[str, float]:
    """Returns the mean negative log-likelihood of each region that has tokens, from sums of `loss_terms`."""
    prompt_sum, prompt_count, completion_sum, completion_count, *_ = sums
    losses = {}
    if prompt_count:
        losses["prompt_loss"] = prompt_sum / prompt_count
    if completion_count:
        losses["completion_loss"] = completion_sum / completion_count
    return losses
