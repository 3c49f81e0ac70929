"""Time and memory of a call, and of the LM head with its loss, on any device."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


_COUNTED = ("cuda", "xpu")  # where torch counts the memory


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def peak_memory(device: str) -> float:
    """Returns the most MiB that were allocated since the last reset, or 0 where nobody counts."""
    return torch.accelerator.max_memory_allocated() / 2**20 if device in _COUNTED else 0.0


def reset_peak_memory(device: str) -> float:
    """Returns the MiB that are allocated, from which the peak grows again."""
    if device in _COUNTED:
        torch.accelerator.reset_peak_memory_stats()
    return peak_memory(device)


def median_and_quartiles(seconds: Sequence[float]) -> dict[str, Any]:
    low, median, high = torch.tensor(seconds).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return {"seconds": median, "quartiles": [low, high], "all_seconds": list(seconds)}


def measured(call: Callable[[], None], device: str, repeats: int) -> dict[str, Any]:
    """Returns the seconds of a call, all, median and quartiles, and its peak in MiB above what was allocated before."""
    call()  # compiles
    if device in _COUNTED:
        torch.accelerator.empty_cache()
    before = reset_peak_memory(device)
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return {**median_and_quartiles(seconds), "MiB": peak_memory(device) - before}


def measured_head(
    loss: Callable[..., torch.Tensor] | None,  # of hidden states, head, targets and their weights; None: bare products
    inputs: Sequence[torch.Tensor],  # of `head_inputs`
    device: str,
    repeats: int,
    selects: bool = False,  # the loss gets the tokens alone that have a weight
    frozen_head: bool = False,
) -> dict[str, Any]:
    """Returns what `measured` does, of a forward and a backward pass of head and loss."""
    hidden_states, weight, _, targets, token_weights = inputs
    index = token_weights.nonzero().squeeze(1)
    rows = index if selects else slice(None)
    kept = hidden_states.detach()[index]
    hidden_states.requires_grad_(loss is not None)
    weight.requires_grad_(loss is not None and not frozen_head)

    def products() -> None:
        logits = kept @ weight.t()
        logits @ weight
        if not frozen_head:
            logits.t() @ kept

    def passes() -> None:
        loss(hidden_states[rows], weight, targets[rows], token_weights[rows]).backward()
        hidden_states.grad = weight.grad = None

    return measured(products if loss is None else passes, device, repeats)
