"""
The metrics: means that are logged, of sums over tokens, to which any number of micro-batches and ranks can add.

1. `token_terms` gives what each target adds to each sum of `TERMS`.
2. `TrainingSums` and `EvaluationSums` add the terms up, over micro-batches and ranks.
3. `means` divides sums by sums, as `MEANS` says.

A new metric is a line in `MEANS`, and one in `token_terms` if it needs a new sum.
"""

import itertools
import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback

from .._upstream import FusedCausalLMOutput
from ..weights import PATTERN_BIT, SPANS


# The metrics, by name: the sum, and what it is divided by. Those of a region are logged if it has tokens
MEANS = {
    "prompt_loss": ("prompt_nll", "prompt_count"),
    "prompt_mean_token_accuracy": ("prompt_correct", "prompt_count"),
    "completion_loss": ("completion_nll", "completion_count"),
    "completion_mean_token_accuracy": ("completion_correct", "completion_count"),
}
# Those of a span in a region, likewise, where spans have weights
MEANS_OF_SPANS = {
    f"{region}_{span}_loss": (f"{region}_{span}_nll", f"{region}_{span}_count")
    for region in ("prompt", "completion")
    for span in SPANS[1:]
}
# Those that TRL logs too, of the tokens whose weight is not zero. They are 0 where there are none
MEANS_OF_TRL = {
    "entropy": ("weighted_entropy", "weighted_count"),
    "mean_token_accuracy": ("weighted_correct", "weighted_count"),
}
# The loss, by `loss_divisor`
LOSSES = {"count": ("weighted_nll", "weighted_count"), "weights": ("weighted_nll", "weight")}
# The sums that these need
TERMS = [*dict.fromkeys(name for pair in [*MEANS.values(), *MEANS_OF_TRL.values(), *LOSSES.values()] for name in pair)]
TERMS_OF_SPANS = [name for pair in MEANS_OF_SPANS.values() for name in pair]


def token_terms(
    outputs: FusedCausalLMOutput, weights: torch.Tensor, regions: torch.Tensor, spans: torch.Tensor, names: list[str]
) -> torch.Tensor:
    """
    Returns what each target adds to each of the sums with these names, `TERMS` and perhaps `TERMS_OF_SPANS`, `(B, T,
    number of names)`. The outputs of `weighted_forward`, the weights, the regions (1 completion, 0 prompt, -100 none)
    and the codes of the spans are of shape `(B, T)`.
    """
    nll, entropy, correct = -outputs.log_probs.float(), outputs.entropy.detach().float(), outputs.is_top1
    prompt, completion = outputs.label_mask & (regions == 0), outputs.label_mask & (regions == 1)
    weighted = weights != 0
    # The nll of an impossible token is infinite
    terms = {
        "prompt_nll": nll.where(prompt, 0),
        "prompt_count": prompt,
        "prompt_correct": correct & prompt,
        "completion_nll": nll.where(completion, 0),
        "completion_count": completion,
        "completion_correct": correct & completion,
        "weighted_nll": (nll * weights).where(weighted, 0),
        "weighted_count": weighted,
        "weighted_entropy": entropy.where(weighted, 0),
        "weighted_correct": correct & weighted,
        "weight": weights,
    }
    if len(names) > len(TERMS):
        spans = spans % 2**PATTERN_BIT
        for (region, mask), (code, span) in itertools.product(
            (("prompt", prompt), ("completion", completion)), enumerate(SPANS)
        ):
            in_span = mask & (spans == code)
            terms |= {f"{region}_{span}_nll": nll.where(in_span, 0), f"{region}_{span}_count": in_span}
    return torch.stack([terms[name] for name in names], dim=-1)


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """Returns the unweighted means of each region and span that has tokens: loss, in nats per token, and accuracy."""
    pairs = (MEANS | MEANS_OF_SPANS).items()
    return {name: sums[total] / sums[count] for name, (total, count) in pairs if sums.get(count)}


def means_of_trl(sums: Mapping[str, float]) -> dict[str, float]:
    """Returns the means that TRL logs."""
    return {name: sums[total] / (sums[count] or 1) for name, (total, count) in MEANS_OF_TRL.items()}


class TrainingSums(TrainerCallback):
    """
    Adds up the training steps of this rank, on a device, without making the host wait. A training drops what is left of
    one that failed, such as a try of `auto_find_batch_size`.
    """

    def __init__(self, device: torch.device, terms: list[str]):
        self._names = terms
        dtype = torch.float32 if device.type == "mps" else torch.float64  # which MPS does not have
        # The terms, the auxiliary loss, and the number of tokens of any kind
        self._sums = torch.zeros(len(terms) + 2, dtype=dtype, device=device)
        self._micro_batches = 0
        self._has_aux_loss = False
        self._num_tokens = 0  # of all ranks, up to the last log
        self._num_tokens_before = 0  # of all ranks, before this training

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        self._sums.zero_()
        self._micro_batches = 0
        self._num_tokens = self._num_tokens_before

    def on_train_end(self, *_: Any, **kwargs: Any) -> None:
        self._num_tokens_before = self._num_tokens

    def add(self, terms: torch.Tensor, num_tokens: torch.Tensor | int, aux_loss: torch.Tensor | None) -> None:
        """Adds a micro-batch: its `token_terms`, its number of tokens of any kind, and its auxiliary loss."""
        self._sums[:-2] += terms.sum((0, 1)).to(self._sums)
        self._sums[-1] += num_tokens
        self._micro_batches += 1
        if aux_loss is not None:
            self._sums[-2] += aux_loss.detach().to(self._sums)
            self._has_aux_loss = True

    def num_tokens(self, accelerator: Accelerator) -> int:
        """Returns the number of tokens of all ranks since the start."""
        return self._num_tokens + int(accelerator.reduce(self._sums[-1]))

    def metrics_since_last_call(self, accelerator: Accelerator, repeats: int) -> dict[str, float]:
        """
        Returns the metrics of all ranks since the last call, and `"num_tokens"` since the start, where `repeats` ranks
        have a batch in common. Returns nothing if there was no micro-batch.
        """
        *tokens, aux_loss, num_tokens = accelerator.reduce(self._sums).tolist()
        if not self._micro_batches:
            return {}
        self._num_tokens += int(num_tokens)
        sums = dict(zip(self._names, tokens, strict=True))
        metrics = {"num_tokens": self._num_tokens // repeats, **means_of_trl(sums), **means(sums)}
        if self._has_aux_loss:
            metrics["aux_loss"] = aux_loss / (self._micro_batches * accelerator.num_processes)
        self._sums.zero_()
        self._micro_batches = 0
        return metrics


class EvaluationSums:
    """Adds up an evaluation over batches and ranks, of which `repeats` ranks have each batch in common."""

    def __init__(self, accelerator: Accelerator, divisor: str, terms: list[str], repeats: int = 1):
        self._accelerator, self._divisor, self._repeats = accelerator, divisor, repeats
        self._sums = dict.fromkeys(terms, 0.0)
        self._rows: list[torch.Tensor] = []
        self._losses: list[float] = []
        self._aux_losses: list[float] = []

    @property
    def is_empty(self) -> bool:
        """Whether no token was scored."""
        return not (self._sums["prompt_count"] or self._sums["completion_count"])

    def add(
        self,
        terms: torch.Tensor,  # the `token_terms` of a batch
        example_lengths: torch.Tensor | None,  # numbers of tokens of the examples, if all are in one row
        loss: torch.Tensor | None,  # of the batch, where a subclass may return another one
        aux_loss: torch.Tensor | None,
    ) -> None:
        """Adds a batch of all ranks."""
        if example_lengths is None:
            by_example = terms.sum(1)
        else:  # without the first token of the row, which nothing predicts
            example = torch.repeat_interleave(example_lengths.to(terms.device))[1:]
            by_example = terms.new_zeros(len(example_lengths), terms.size(2))
            by_example.index_add_(0, example, terms[0, : len(example)])
        rows = self._gather(by_example)
        self._rows.append(rows)
        for name, total in zip(self._sums, rows.sum(0).tolist(), strict=True):
            self._sums[name] += total
        if loss is not None:  # as `Trainer` gathers what the subclass returns
            self._losses += self._accelerator.gather_for_metrics(loss.detach().repeat(len(by_example))).tolist()
        if aux_loss is not None:
            self._aux_losses.append(self._accelerator.gather_for_metrics(aux_loss).mean().item())

    def rows(self) -> dict[str, list[float]]:
        """
        Returns of each row, in the order of the evaluation, the sum of the negative log-likelihoods of each region, in
        nats, and its number of tokens, and those of each span in it, where spans have weights. Of a stream on several
        ranks the rows cannot be told apart.
        """
        sums = dict(zip(self._sums, torch.cat(self._rows).unbind(1), strict=True))
        rows = {}
        for name in ("prompt_nll", "completion_nll", *(total for total, _ in MEANS_OF_SPANS.values())):
            if name in sums:
                part = name.removesuffix("_nll")
                rows[name] = sums[name].tolist()
                rows[f"{part}_tokens"] = sums[f"{part}_count"].long().tolist()
        return rows

    def metrics_of_trl(self) -> dict[str, float]:
        """Returns the means that TRL logs."""
        aux_loss = {"aux_loss": fmean(self._aux_losses)} if self._aux_losses else {}
        return means_of_trl(self._sums) | aux_loss

    def metrics(self, loss_of_trainer: float | None) -> dict[str, float]:
        """
        Returns the metrics of each region, and the weighted loss, if a token has a weight. `Trainer` averages the
        losses of batches, which is no mean over tokens. Its loss counts only where a subclass returned another one.
        """
        metrics = means(self._sums)
        total, divisor = (self._sums[name] for name in LOSSES[self._divisor])
        if divisor:
            metrics["loss"] = total / divisor
        if self._losses and loss_of_trainer is not None:
            own = fmean(self._losses)
            if not math.isclose(own, loss_of_trainer, rel_tol=1e-6):
                metrics["loss"] = loss_of_trainer
        return metrics

    def _gather(self, by_example: torch.Tensor) -> torch.Tensor:
        """
        Returns the examples `(n, len(TERMS))` of all ranks, in float64 on the CPU. Of a stream, only their sum.

        As accelerate's `gather_for_metrics`, which does not know of repeated batches. Their ranks follow each other.
        """
        state = self._accelerator.gradient_state
        if state.in_dataloader and state.remainder < 0:  # a stream: what fills up its last batch cannot be told
            return self._accelerator.reduce(by_example.sum(0, keepdim=True)).cpu().double() / self._repeats
        gathered = self._accelerator.gather(by_example).unflatten(0, (-1, self._repeats, len(by_example)))
        examples = gathered[:, 0].flatten(0, 1).cpu().double()
        # Without those that only fill up the last batch
        return examples[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else examples
