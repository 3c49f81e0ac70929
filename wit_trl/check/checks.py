"""What `wit-trl check` checks, one result after another."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from trl import SFTConfig, SFTTrainer

from ..config import WITSFTConfig
from ..loss import one_pass
from ..loss.functions import trl_weighted_nll, weighted_linear_cross_entropy
from ..trainer import WITSFTTrainer
from .kernels import HEAD_CASES, LIMITS, Kernel, head_errors, head_inputs
from .timing import measured_head
from .trainers import ENDPOINTS, LAYOUTS, SPLITS, TinyTraining, Trained, differences


KERNELS: dict[str, Kernel] = {"one_pass": one_pass.weighted_nll, "trl": trl_weighted_nll}
# Of losses and parameters in float32, which a sum in another order rounds in another way
TRAINING_LIMIT = 1e-4
NO_MEMORY = "It does not fit into the memory of the device."
_OTHER = {"one_pass": "trl", "trl": "one_pass"}


@dataclass(frozen=True)
class Check:
    """One result. A figure is the norm of a difference over the norm of what is right, and no figure is an error."""

    name: str
    figure: float
    limit: float
    remedy: str  # what a figure above the limit means, and what avoids it
    error: str | None = None
    kernel: str | None = None  # that was checked, a `fused_head`
    skipped: str | None = None  # why nothing was compared

    @property
    def is_right(self) -> bool:
        return self.skipped is not None or self.figure <= self.limit  # which NaN is not


def compare(name: str, limit: float, remedy: str, measure: Callable[[], float], kernel: str | None = None) -> Check:
    """Returns the result of a measurement, which may fail."""
    try:
        figure, message = measure(), None
    except torch.OutOfMemoryError:
        return Check(name, math.nan, limit, remedy, kernel=kernel, skipped=NO_MEMORY)
    except Exception as error:  # whatever a kernel or a device raises
        figure, message = math.inf, f"{type(error).__name__}: {error}"
    return Check(name, figure, limit, remedy, message, kernel)


def check_kernels(device: str, tokens: int = 60, hidden_size: int = 96, vocabulary: int = 1501) -> Iterator[Check]:
    """Compares both heads with float64, in all cases and data types. Yields the largest error of each data type."""
    for (name, kernel), (dtype, limit) in itertools.product(KERNELS.items(), LIMITS.items()):

        def measure(kernel=kernel, dtype=dtype):
            cases = (head_errors(kernel, case, device, dtype, tokens, hidden_size, vocabulary) for case in HEAD_CASES)
            return float(np.max([error for errors in cases for error in errors.values()]))  # NaN, if one is

        remedy = (
            f"The kernel `{name}` of the LM head is wrong in {str(dtype).removeprefix('torch.')}. Set "
            f'`fused_head="{_OTHER[name]}"`.'
        )
        yield compare(f"head {name}, {str(dtype).removeprefix('torch.')}", limit, remedy, measure, kernel=name)


def wit_training(train: TinyTraining, prompt: float, completion: float, **arguments: Any) -> Trained:
    """Trains with these weights of prompt and completion."""
    weights = {"prompt_loss_weight": prompt, "completion_loss_weight": completion}
    return train(WITSFTTrainer, WITSFTConfig, print_weight_report=False, **weights, **arguments)


def check_trainers(device: str) -> Iterator[Check]:
    """Trains as `SFTTrainer` does, in every layout of a batch, and as one step split into other micro-batches."""
    train = TinyTraining(device)
    wit = functools.partial(wit_training, train)
    for (layout, arguments), (weights, of_trl) in itertools.product(LAYOUTS.items(), ENDPOINTS.items()):

        def measure(weights=weights, arguments=arguments, of_trl=of_trl):
            expected = train(SFTTrainer, SFTConfig, **arguments, **of_trl)
            return float(np.max([*differences(wit(*weights, **arguments), expected).values()]))

        remedy = f"Rows that are {layout} train otherwise than in `SFTTrainer`. Use another layout of the batch."
        yield compare(f"({weights[0]:g}, {weights[1]:g}) as SFTTrainer, {layout}", TRAINING_LIMIT, remedy, measure)

    first, *others = [
        {"per_device_train_batch_size": rows, "gradient_accumulation_steps": micro_batches}
        for rows, micro_batches in SPLITS
    ]
    whole = functools.cache(lambda: wit(0.2, 0.8, **first))
    for arguments in others:

        def measure(arguments=arguments):
            return float(np.max([*differences(wit(0.2, 0.8, **arguments), whole()).values()]))

        remedy = "The loss depends on how a step is split. Set `gradient_accumulation_steps=1`."
        name = f"(0.2, 0.8), {arguments['gradient_accumulation_steps']} micro-batches as one"
        yield compare(name, TRAINING_LIMIT, remedy, measure)


def time_heads(device: str, hidden_size: int, vocabulary: int) -> dict[str, float]:
    """
    Returns the median seconds of head and loss, forward and backward: of the bare matrix products, which are the limit,
    and of each kernel, or infinity for one that failed. Half of the tokens have a weight. In the data type that a
    training has by default.
    """
    tokens, repeats, dtype = (64, 2, torch.float32) if device == "cpu" else (8192, 10, torch.bfloat16)
    inputs = head_inputs(device, dtype, tokens, hidden_size, vocabulary)
    losses: dict[str, Callable[..., torch.Tensor] | None] = {"products": None}
    for name in KERNELS:
        losses[name] = lambda *args, name=name: weighted_linear_cross_entropy(*args, fused_head=name).loss
    found = {}
    for name, loss in losses.items():
        try:
            # Elsewhere than on CPUs, TRL's forward selects the rows that have a label, whichever kernel runs
            found[name] = measured_head(loss, inputs, device, repeats, selects=device != "cpu")["seconds"]
        except Exception:  # as in `compare`; a kernel that fails is told there
            found[name] = math.inf
    return found
