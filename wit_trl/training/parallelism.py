"""
Training on several ranks: DeepSpeed's sequence parallelism (Ulysses) and torch's context parallelism, which split each
sequence over ranks, and what each step is divided by on every engine.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import is_peft_model
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled

from .._upstream import restart
from ..data.collator import DataCollatorForWIT
from .attributes import set_for_now


PACKED_MESSAGE = (
    "Packing and padding-free batches are not supported under sequence or context parallelism: it drops the attention "
    "mask, so documents would attend to each other. Set `packing`, `eval_packing` and `padding_free` to False, or "
    "`sp_size` and `cp_size` to 1."
)
Batch = dict[str, Any]
Count = torch.Tensor | int | None
# What belongs to targets, and its value where there is none
_TARGETS = {"token_weights": 0, "completion_mask": -100, "token_spans": 0}


class ParallelMixin(Trainer):
    """
    What [`WITSFTTrainer`] does otherwise than [`~transformers.Trainer`] over the batches and ranks of a step.

    Where ranks share a sequence, weights and regions are moved and split as the labels are, and the gradient of the
    loss is that of one process. The data loader of DeepSpeed starts each epoch in the order of that epoch. Every step
    has all its batches, also where a stream ends.
    """

    def prepare_parallelism(self) -> None:
        """
        Has the collator pad to what the ranks can share. Raises `ValueError` for arguments with which something would
        be wrong without an error.
        """
        splits = self.splits_sequences()
        if (splits or self.get_tp_size() > 1) and not self.args.average_tokens_across_devices:
            raise ValueError(
                "`average_tokens_across_devices=False` is not supported where ranks share or repeat a sequence "
                "(tensor, context, sequence parallelism), which would then weigh it differently. Set it to True."
            )
        if not splits:
            return
        if self._is_vision_dataset:
            raise ValueError(
                "Data with images is not supported under sequence or context parallelism: the tokens of an image would "
                "be split, but not its pixels. Set `sp_size` and `cp_size` to 1."
            )
        if self.args.packing or self.args.eval_packing or self.args.padding_free:
            raise ValueError(PACKED_MESSAGE)
        if is_peft_model(self.model) and self.model.active_peft_config.is_prompt_learning:
            raise ValueError(
                "Prompt learning is not supported under sequence or context parallelism: every part of a sequence "
                "would get the virtual tokens. Use LoRA, or set `sp_size` and `cp_size` to 1."
            )
        if is_deepspeed_zero3_enabled():
            zero_config = self.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
            if not zero_config.get("reduce_scatter", True):
                raise ValueError(
                    "`reduce_scatter: false` is not supported under sequence parallelism: ZeRO-3 would then scale the "
                    "gradients of small and large parameters differently. Remove it from the DeepSpeed configuration."
                )
        if isinstance(self.data_collator, DataCollatorForWIT):  # so that all ranks get as many tokens
            parts = self.get_sp_size() if self.get_cp_size() == 1 else 2 * self.get_cp_size()
            self.data_collator.pad_to_multiple_of = math.lcm(self.data_collator.pad_to_multiple_of or 1, parts)

    def splits_sequences(self) -> bool:
        """Returns whether several ranks share a sequence."""
        return self.get_sp_size() > 1 or self.get_cp_size() > 1

    def scale_gradient(self, loss: torch.Tensor) -> torch.Tensor:
        """
        Returns the loss with the gradient that the engine expects. The logged loss is the mean over all ranks, and so
        is the gradient in ZeRO-3. In its other stages, DeepSpeed sums the gradients of the ranks that share a sequence.
        """
        if self.get_sp_size() == 1 or is_deepspeed_zero3_enabled():
            return loss
        return loss.detach() + (loss - loss.detach()) / self.get_sp_size()

    def get_train_dataloader(self) -> DataLoader:
        """Returns the data loader. DeepSpeed's splits the sequences and moves the labels, so we move the rest first."""
        if self.get_sp_size() == 1:
            return super().get_train_dataloader()
        with set_for_now(self, data_collator=functools.partial(_collate_shifted, self.data_collator)):
            return super().get_train_dataloader()

    def _run_epoch(self, **kwargs: Any) -> None:
        if kwargs["epoch"] == kwargs["epochs_trained"]:
            self._left_over: list[Batch] = []
        if self.get_sp_size() > 1:
            restart(kwargs["train_dataloader"], kwargs["epoch"])
        return super()._run_epoch(**kwargs)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Count]:
        """
        Returns the batches of a step. Where a stream ends with too few for a step, they begin the first step of the
        next epoch. `Trainer` would add their gradient to that of this step.
        """
        self.check_settings()  # which a callback may have changed
        batches = [*self._left_over, *itertools.islice(epoch_iterator, num_batches - len(self._left_over))]
        self._left_over = batches if len(batches) < num_batches else []
        if not self._left_over:
            return batches, self._get_num_items_in_batch(batches, device)
        if self.state.global_step == 0:
            raise ValueError(
                f"The stream has {len(batches)} batches on this process, too few for a step of "
                f"`gradient_accumulation_steps={num_batches}`. Lower that, or `per_device_train_batch_size`."
            )
        return [], None

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Count:
        if self.get_sp_size() == 1:
            count = super()._get_num_items_in_batch(batch_samples, device)
        else:
            # `Trainer` counts `labels`, of which DeepSpeed leaves only `shift_labels`. It also divides the sum over all
            # ranks by `sp_size`, as if the ranks that share a sequence held the same tokens
            shifted = [{"labels": batch["shift_labels"], **batch} for batch in batch_samples]
            count = super()._get_num_items_in_batch(shifted, device) * self.get_sp_size()
        if count is None or self.args.loss_divisor == "count":
            return count
        # The number of tokens, as every engine counts it, times their mean weight
        sums = torch.zeros(2, device=device)
        for batch in batch_samples:
            weights = batch["token_weights"] if "shift_labels" in batch else batch["token_weights"][:, 1:]
            sums += torch.stack([weights.sum(), weights.count_nonzero()]).to(device)
        if self.args.average_tokens_across_devices:
            sums = self.accelerator.reduce(sums)
        return count * sums[0] / sums[1].clamp(min=1)

    def loss_divisor(self, token_weights: torch.Tensor, num_items_in_batch: Count) -> torch.Tensor | float:
        """
        Returns what the weighted sum of a micro-batch is divided by. As in TRL, it counts the tokens of all ranks, over
        which the gradients are averaged.
        """
        if num_items_in_batch is None:
            weights = token_weights[:, 1:]
            return weights.count_nonzero() if self.args.loss_divisor == "count" else weights.sum()
        if not self.args.average_tokens_across_devices:
            return num_items_in_batch
        return num_items_in_batch / (self.accelerator.num_processes // self.get_tp_size())

    def _prepare_context_parallel_inputs(self, model: torch.nn.Module, inputs: Batch) -> tuple[Callable, Batch]:
        if self.get_cp_size() == 1:
            return super()._prepare_context_parallel_inputs(model, inputs)
        context, inputs = super()._prepare_context_parallel_inputs(model, _shift_targets(inputs))
        # The context in which `Trainer` splits the sequences, in place, with weights and regions split as well
        buffers = [*context.keywords["buffers"], *(inputs[name] for name in _TARGETS if name in inputs)]
        context = functools.partial(
            context, buffers=buffers, buffer_seq_dims=[1] * len(buffers), no_restore_buffers=set(buffers)
        )
        return context, inputs


def _shift_targets(batch: Batch) -> Batch:
    """
    Moves weights and regions to the position that predicts the token, as `shift_labels` are moved. This comes before
    the sequences are split: the target of the last token of a part is in another part.
    """
    targets = {name: F.pad(batch[name], (0, 1), value=none) for name, none in _TARGETS.items() if name in batch}
    return batch | {name: padded[:, 1:].contiguous() for name, padded in targets.items()}


def _collate_shifted(collator: Callable, examples: list[dict[str, Any]]) -> Batch:
    return _shift_targets(collator(examples))
