"""Time and memory of a call, on any device."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


_COUNTED = ("cuda", "xpu")  # where torch counts the memory


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def peak_memory(device: str) -> float:
    """Returns the most MiB that were allocated since the last reset, or 0 where nobody counts."""
    return torch.accelerator.max_memory_allocated() / 2**20 if device in _COUNTED else 0.0


def measured(call: Callable[[], None], device: str, repeats: int) -> dict[str, Any]:
    """Returns the seconds of a call, all and their median, and its peak in MiB above what was allocated before."""
    call()  # compiles
    before = 0.0
    if device in _COUNTED:
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats()
        before = peak_memory(device)
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "MiB": peak_memory(device) - before, "all_seconds": seconds}
