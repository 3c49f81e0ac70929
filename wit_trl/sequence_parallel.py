"""
What splitting each sequence over ranks asks of the trainer: DeepSpeed's sequence parallelism (Ulysses), and the context
parallelism of torch.
"""

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from .config import WITSFTConfig


if TYPE_CHECKING:
    from peft import PeftModel


PACKED_MESSAGE = (
    "Packing and padding-free batches are not supported under sequence or context parallelism: it drops the attention "
    "mask, so documents would attend to each other. Set `packing`, `eval_packing` and `padding_free` to False, or "
    "`sp_size` and `cp_size` to 1."
)
# What belongs to targets, and its value where there is none
_TARGETS = {"token_weights": 0, "completion_mask": -100}


def check_sequence_parallelism(
    args: WITSFTConfig, model: "PreTrainedModel | PeftModel", accelerator: Accelerator, has_images: bool
) -> None:
    """Raises `ValueError` for what would be wrong without an error where sequences are split."""
    if has_images:
        raise ValueError(
            "Data with images is not supported under sequence or context parallelism: the tokens of an image would be "
            "split, but not its pixels. Set `sp_size` and `cp_size` to 1."
        )
    if args.packing or args.eval_packing or args.padding_free:
        raise ValueError(PACKED_MESSAGE)
    if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            "Prompt learning is not supported under sequence or context parallelism: every part of a sequence would "
            "get the virtual tokens. Use LoRA, or set `sp_size` and `cp_size` to 1."
        )
    if is_deepspeed_zero3_enabled():
        zero_config = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        if not zero_config.get("reduce_scatter", True):
            raise ValueError(
                "`reduce_scatter: false` is not supported under sequence parallelism: ZeRO-3 would then scale the "
                "gradients of small and large parameters differently. Remove it from the DeepSpeed configuration."
            )


def shift_targets(batch: dict[str, Any]) -> dict[str, Any]:
    """
    Returns the batch with weights and regions at the position that predicts the token, where labels are moved to
    (`shift_labels`), before the sequences are split: the target of the last token of a part is in another part.
    """
    shifted = {
        name: F.pad(batch[name], (0, 1), value=fill)[:, 1:].contiguous()
        for name, fill in _TARGETS.items()
        if name in batch
    }
    return {**batch, **shifted}


def collate_shifted(collator: Callable, examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Collates examples for DeepSpeed's data loader, which splits the sequences and moves the labels."""
    return shift_targets(collator(examples))


def split_targets(context: functools.partial, batch: dict[str, Any]) -> functools.partial:
    """Returns the context in which `Trainer` splits the sequences, in place, with weights and regions split as well."""
    buffers = [*context.keywords["buffers"], *(batch[name] for name in _TARGETS if name in batch)]
    return functools.partial(
        context, buffers=buffers, buffer_seq_dims=[1] * len(buffers), no_restore_buffers=set(buffers)
    )


def skip_batches(batches: Iterator, count: int) -> Iterator:
    """Skips batches of DeepSpeed's data loader, which accelerate cannot."""
    for _ in range(count):
        next(batches)
    return batches
