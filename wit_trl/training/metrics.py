"""Sums over tokens, which any number of micro-batches and ranks can add to, and the means that are logged."""

import math
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from .._upstream import FusedCausalLMOutput


class TokenSums(NamedTuple):
    """
    Sums over scored tokens. Negative log-likelihoods (nll) and entropies are in nats.

    Args:
        prompt_nll (`float`): Of prompt tokens, the negative log-likelihood.
        prompt_count (`float`): Number of prompt tokens.
        prompt_correct (`float`): Number of prompt tokens that are the most likely ones.
        completion_nll (`float`): Of completion tokens, the negative log-likelihood.
        completion_count (`float`): Number of completion tokens.
        completion_correct (`float`): Number of completion tokens that are the most likely ones.
        weighted_nll (`float`): Weight times negative log-likelihood, of all tokens.
        weighted_count (`float`): Number of tokens whose weight is not zero.
        weighted_entropy (`float`): Of these, the entropy of the prediction, unweighted.
        weighted_correct (`float`): Number of these that are the most likely ones.
        weight (`float`): Sum of their weights.
    """

    prompt_nll: Any = 0.0
    prompt_count: Any = 0.0
    prompt_correct: Any = 0.0
    completion_nll: Any = 0.0
    completion_count: Any = 0.0
    completion_correct: Any = 0.0
    weighted_nll: Any = 0.0
    weighted_count: Any = 0.0
    weighted_entropy: Any = 0.0
    weighted_correct: Any = 0.0
    weight: Any = 0.0

    def loss(self, divisor: str) -> float:
        """
        Returns the weighted loss, in nats: the sum over the number of tokens whose weight is not zero (`"count"`), or
        over their weights (`"weights"`).
        """
        return self.weighted_nll / ((self.weighted_count if divisor == "count" else self.weight) or 1)

    def metrics_of_trl(self) -> dict[str, float]:
        """Returns the means that TRL logs, of the tokens whose weight is not zero."""
        count = max(self.weighted_count, 1)
        return {"entropy": self.weighted_entropy / count, "mean_token_accuracy": self.weighted_correct / count}

    def metrics_by_region(self) -> dict[str, float]:
        """Returns the unweighted means of each region that has tokens: loss, in nats per token, and accuracy."""
        metrics = {}
        if self.prompt_count:
            metrics["prompt_loss"] = self.prompt_nll / self.prompt_count
            metrics["prompt_mean_token_accuracy"] = self.prompt_correct / self.prompt_count
        if self.completion_count:
            metrics["completion_loss"] = self.completion_nll / self.completion_count
            metrics["completion_mean_token_accuracy"] = self.completion_correct / self.completion_count
        return metrics


def loss_terms(
    nll: torch.Tensor, outputs: FusedCausalLMOutput, weights: torch.Tensor, regions: torch.Tensor
) -> torch.Tensor:
    """
    Returns what each token adds to each field of [`TokenSums`], in the order of the fields, `(B, T, 11)` in float32.

    Args:
        nll (`torch.Tensor` of shape `(B, T)`):
            Negative log-likelihood of each target, in nats.
        outputs ([`~trl.trainer.utils.FusedCausalLMOutput`]):
            Its `entropy`, `is_top1` and `label_mask` are of shape `(B, T)`.
        weights (`torch.Tensor` of shape `(B, T)`):
            Weight of each target.
        regions (`torch.Tensor` of shape `(B, T)`):
            Region of each target: 1 completion, 0 prompt, -100 none.
    """
    nll, entropy, correct = nll.float(), outputs.entropy.detach().float(), outputs.is_top1
    prompt, completion = outputs.label_mask & (regions == 0), outputs.label_mask & (regions == 1)
    weighted = weights != 0
    terms = TokenSums(
        prompt_nll=nll * prompt,
        prompt_count=prompt,
        prompt_correct=correct & prompt,
        completion_nll=nll * completion,
        completion_count=completion,
        completion_correct=correct & completion,
        weighted_nll=nll * weights,
        weighted_count=weighted,
        weighted_entropy=entropy * weighted,
        weighted_correct=correct & weighted,
        weight=weights,
    )
    return torch.stack(terms, dim=-1)


class TrainingSums:
    """
    What training steps of this rank add up, without making the host wait.

    Args:
        device (`torch.device`): Device of the sums.
    """

    def __init__(self, device: torch.device):
        dtype = torch.float32 if device.type == "mps" else torch.float64  # which MPS does not have
        self._tokens = torch.zeros(len(TokenSums._fields), dtype=dtype, device=device)
        self._aux_loss = torch.zeros((), dtype=dtype, device=device)
        self._num_tokens = torch.zeros((), dtype=dtype, device=device)
        self._micro_batches = 0
        self._has_aux_loss = False

    def add(self, terms: torch.Tensor, num_tokens: torch.Tensor | int, aux_loss: torch.Tensor | None) -> None:
        """Adds a micro-batch: its `loss_terms`, its number of tokens of any kind, and its auxiliary loss."""
        self._tokens += terms.sum((0, 1)).to(self._tokens)
        self._num_tokens += num_tokens
        self._micro_batches += 1
        if aux_loss is not None:
            self._aux_loss += aux_loss.detach().to(self._aux_loss)
            self._has_aux_loss = True

    def num_tokens(self, accelerator: Accelerator) -> int:
        """Returns the number of tokens of all ranks since the start."""
        return int(accelerator.reduce(self._num_tokens))

    def metrics_since_last_call(self, accelerator: Accelerator, repeats: int) -> dict[str, float]:
        """
        Returns the metrics of all ranks since the last call, and `"num_tokens"` since the start, where `repeats` ranks
        have a batch in common. Returns nothing if there was no micro-batch.
        """
        values = torch.cat([self._tokens, torch.stack([self._aux_loss, self._num_tokens])])
        *tokens, aux_loss, num_tokens = accelerator.reduce(values).tolist()
        micro_batches = self._micro_batches * accelerator.num_processes
        if not micro_batches:
            return {}
        self._tokens.zero_()
        self._aux_loss.zero_()
        self._micro_batches = 0
        sums = TokenSums(*tokens)
        metrics = {"num_tokens": int(num_tokens) // repeats, **sums.metrics_of_trl(), **sums.metrics_by_region()}
        return metrics | ({"aux_loss": aux_loss / micro_batches} if self._has_aux_loss else {})


class EvaluationSums:
    """
    What an evaluation adds up over batches and ranks.

    Args:
        accelerator ([`~accelerate.Accelerator`]): What the ranks are gathered with.
        divisor (`str`): The `loss_divisor` of the weighted loss.
        repeats (`int`, *optional*, defaults to `1`): Number of ranks that have a batch in common.
    """

    def __init__(self, accelerator: Accelerator, divisor: str, repeats: int = 1):
        self._accelerator, self._divisor, self._repeats = accelerator, divisor, repeats
        self._tokens = TokenSums()
        self._rows: list[torch.Tensor] = []
        self._losses: list[float] = []
        self._aux_losses: list[float] = []

    @property
    def is_empty(self) -> bool:
        """Whether no token was scored."""
        return not (self._tokens.prompt_count or self._tokens.completion_count)

    def add(
        self,
        terms: torch.Tensor,
        example_lengths: torch.Tensor | None,
        loss: torch.Tensor | None,
        aux_loss: torch.Tensor | None,
    ) -> None:
        """
        Adds a batch of all ranks.

        Args:
            terms (`torch.Tensor` of shape `(B, T, 11)`):
                The `loss_terms`.
            example_lengths (`torch.Tensor`, *optional*):
                Numbers of tokens of the examples, if all are in one row.
            loss (`torch.Tensor`, *optional*):
                Loss of the batch, where a subclass may return another one.
            aux_loss (`torch.Tensor`, *optional*):
                Auxiliary loss of the batch.
        """
        if example_lengths is None:
            by_example = terms.sum(1)
        else:  # without the first token of the row, which nothing predicts
            example = torch.repeat_interleave(example_lengths.to(terms.device))[1:]
            by_example = terms.new_zeros(len(example_lengths), terms.size(2))
            by_example.index_add_(0, example, terms[0, : len(example)])
        rows = gather_examples(self._accelerator, by_example, self._repeats)
        self._rows.append(rows)
        self._tokens = TokenSums(*(a + b for a, b in zip(self._tokens, rows.sum(0).tolist(), strict=True)))
        if loss is not None:  # as `Trainer` gathers what the subclass returns
            self._losses += self._accelerator.gather_for_metrics(loss.detach().repeat(len(by_example))).tolist()
        if aux_loss is not None:
            self._aux_losses.append(self._accelerator.gather_for_metrics(aux_loss).mean().item())

    def rows(self) -> dict[str, list[float]]:
        """
        Returns of each row, in the order of the evaluation, the sum of the negative log-likelihoods of each region, in
        nats, and its number of tokens. Of a stream on several ranks the rows cannot be told apart.
        """
        sums = TokenSums(*torch.cat(self._rows).unbind(1))
        rows = {}
        for region in ("prompt", "completion"):
            rows[f"{region}_nll"] = getattr(sums, f"{region}_nll").tolist()
            rows[f"{region}_tokens"] = getattr(sums, f"{region}_count").long().tolist()
        return rows

    def metrics_of_trl(self) -> dict[str, float]:
        """Returns the means that TRL logs."""
        metrics = self._tokens.metrics_of_trl()
        return metrics | ({"aux_loss": sum(self._aux_losses) / len(self._aux_losses)} if self._aux_losses else {})

    def metrics(self, loss_of_trainer: float | None) -> dict[str, float]:
        """
        Returns the metrics of each region, and the weighted loss unless a subclass returned another one: `Trainer`
        averages the losses of batches, which is no mean over tokens.
        """
        metrics, own = self._tokens.metrics_by_region(), {"loss": self._tokens.loss(self._divisor)}
        if not self._losses or loss_of_trainer is None:
            return metrics | own
        mean = sum(self._losses) / len(self._losses)
        return metrics | (own if math.isclose(mean, loss_of_trainer, rel_tol=1e-6) else {})


def gather_examples(accelerator: Accelerator, by_example: torch.Tensor, repeats: int) -> torch.Tensor:
    """
    Returns the examples `(n, ...)` of all ranks, in float64 on the CPU, without those that only fill up the last batch,
    and without the batches that `repeats` ranks have in common. Of a stream, only their sum, as one example.

    As accelerate's `gather_for_metrics`, which does not know of repeated batches. Their ranks follow each other.
    """
    state = accelerator.gradient_state
    if state.in_dataloader and state.remainder < 0:  # a stream: what fills up its last batch cannot be told
        return accelerator.reduce(by_example.sum(0, keepdim=True)).cpu().double() / repeats
    gathered = accelerator.gather(by_example).unflatten(0, (-1, repeats, len(by_example)))[:, 0].flatten(0, 1)
    if state.end_of_dataloader and state.remainder > 0:
        gathered = gathered[: state.remainder]
    return gathered.cpu().double()
