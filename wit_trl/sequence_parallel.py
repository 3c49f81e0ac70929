"""What DeepSpeed's sequence parallelism (Ulysses), which splits each sequence over ranks, asks of the trainer."""

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
    "Packing and padding-free batches are not supported under sequence parallelism: DeepSpeed drops the attention "
    "mask, so documents would attend to each other. Set `packing`, `eval_packing` and `padding_free` to False, or "
    "`sp_size` to 1."
)


def check_sequence_parallelism(
    args: WITSFTConfig, model: "PreTrainedModel | PeftModel", accelerator: Accelerator
) -> None:
    """Raises `ValueError` for what would be wrong without an error where sequences are split."""
    if args.packing or args.eval_packing or args.padding_free:
        raise ValueError(PACKED_MESSAGE)
    if not args.average_tokens_across_devices:
        raise ValueError(
            "`average_tokens_across_devices=False` is not supported under sequence parallelism: it would weigh the "
            "parts of a sequence differently. Set it to True, or `sp_size` to 1."
        )
    if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            "Prompt learning is not supported under sequence parallelism: every part of a sequence would get the "
            "virtual tokens. Use LoRA, or set `sp_size` to 1."
        )
    if is_deepspeed_zero3_enabled():
        zero_config = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        if not zero_config.get("reduce_scatter", True):
            raise ValueError(
                "`reduce_scatter: false` is not supported under sequence parallelism: ZeRO-3 would then scale the "
                "gradients of small and large parameters differently. Remove it from the DeepSpeed configuration."
            )


def shift_targets(collator: Callable) -> Callable:
    """
    Returns a collator that moves weights and regions to the position that predicts the token, as DeepSpeed moves the
    labels (`shift_labels`), before it splits the sequences: the target of the last token of a part is in the next.
    """

    def collate(collator: Callable, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collator(examples)
        for name, fill in (("token_weights", 0), ("completion_mask", -100)):
            if name in batch:
                batch[name] = F.pad(batch[name], (0, 1), value=fill)[:, 1:].contiguous()
        return batch

    return functools.partial(collate, collator)


def skip_batches(batches: Iterator, count: int) -> Iterator:
    """Skips batches of DeepSpeed's data loader, which accelerate cannot."""
    for _ in range(count):
        next(batches)
    return batches
