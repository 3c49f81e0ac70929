"""
Everything private of other packages that training relies on. Each entry says what it is for, why the public way does
not do, and when it can go. `tests/test_upstream.py` holds the signature and the source of each: when a release moves
one, the test names it, and what stands here has to be read again.

Two functions of other packages are replaced by hooks, where they are first needed: the kernel of TRL's LM head, where
the one-pass head runs or a model is split over devices, and what skips batches, under DeepSpeed's sequence parallelism.
For all others, also in another thread, a hook does what the function did.

Private methods that are overridden stand where they belong. The table of the test has them too.
"""

import collections
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import accelerate
import torch
import transformers
import trl.trainer.utils
from transformers import ProcessorMixin
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import is_peft_available
from trl.data_utils import _tokenize as tokenize_messages
from trl.data_utils import common_prefix_length, get_dataset_column_names
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import FusedCausalLMOutput, get_config_model_id, global_then_local_main_first


# TRL. `tokenize_messages`, `common_prefix_length`, `get_dataset_column_names`, `get_config_model_id` and
#   `global_then_local_main_first`: the same tokens, names and order of the ranks as in TRL. Helpers of TRL's own
#   trainers; written anew they would part from them.
# transformers. `TRAINER_STATE_NAME` and `sort_checkpoints`: which checkpoint is whole. `get_last_checkpoint`, the
#   public way, takes one whose saving was cut off.

Kernel = Callable[..., tuple[torch.Tensor | None, ...]]
_kernel: ContextVar[Kernel | None] = ContextVar("wit_trl_kernel", default=None)


class _KernelHook:
    """
    Stands for TRL's kernel in the forward of its fused LM head, which has no argument for one. Runs that of
    `use_kernel`, or TRL's, on the device of the hidden states. Can go when TRL does both.
    """

    @staticmethod
    def apply(*args: Any) -> tuple[torch.Tensor | None, ...]:
        with torch.accelerator.device_index(args[0].device.index):
            return (_kernel.get() or ChunkedLogProbFunction.apply)(*args)


def install_kernel_hook() -> None:
    trl.trainer.utils._ChunkedLogProbFunction = _KernelHook


@contextmanager
def use_kernel(kernel: Kernel) -> Iterator[None]:
    """Has TRL's fused LM head call this kernel, in this thread alone. The first call installs the hook."""
    install_kernel_hook()
    token = _kernel.set(kernel)
    try:
        yield
    finally:
        _kernel.reset(token)


def _skip_first_batches(dataloader: Any, num_batches: int = 0) -> Any:
    """
    Stands for accelerate's function in `Trainer`, which resumes with it. That cannot skip batches of DeepSpeed's data
    loader for sequence parallelism, which is no `DataLoader`. Can go when accelerate can.
    """
    if type(dataloader).__name__ != "UlyssesSPDataLoaderAdapter":
        return accelerate.skip_first_batches(dataloader, num_batches)
    for _ in range(num_batches):
        next(dataloader)
    return dataloader


def restart(loader: Any, epoch: int) -> None:
    """
    Starts an epoch of DeepSpeed's data loader for sequence parallelism, of which `Trainer` may then skip batches. The
    loader has no epochs: it would go on behind the end of the last one, where `Trainer` would lose a step, and in the
    order of that one. Can go when it is a `DataLoader`.
    """
    transformers.trainer.skip_first_batches = _skip_first_batches
    loader.dl.set_epoch(epoch)
    loader.iter = iter(loader.dl)
    loader.micro_batches.clear()


def record_replacements(processor: ProcessorMixin, texts: set[str]) -> ProcessorMixin:
    """
    Returns a copy of a processor that adds to `texts` what it writes in the place of each image, video and audio. The
    tokens that it calls special are, for some families, only what it replaces. Can go when processors return a mask.
    """
    recording = copy.copy(processor)

    def replace(text, *replacements, **named_replacements):
        texts.update(*replacements, *named_replacements.values())
        text, offsets = processor.get_text_with_replacements(text, *replacements, **named_replacements)
        # Not a list: where the first text of a batch has no image, Idefics3's processor would make a tensor of it
        return text, collections.UserList(offsets)

    recording.get_text_with_replacements = replace
    return recording


def keep_gradient_of_4bit_weights(model: torch.nn.Module) -> None:
    """
    Turns off a kernel of bitsandbytes. On a CPU with AVX512-BF16 it packs 4-bit weights at the first evaluation, for a
    kernel that has no gradient: all later training steps would silently lose the gradient through them. Can go when
    bitsandbytes unpacks them for training.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def dequantized_weight(module: torch.nn.Module) -> torch.nn.Parameter:
    """Returns the plain weight of a layer. PEFT knows how each library quantizes; transformers has no such function."""
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(module)


def trained_copy(module: torch.nn.Module) -> torch.nn.Module:
    """Returns the copy of a module that PEFT trains (`modules_to_save`), or the module. PEFT has no function for it."""
    if is_peft_available():
        from peft.utils import ModulesToSaveWrapper

        if isinstance(module, ModulesToSaveWrapper) and not module.disable_adapters:
            return module.modules_to_save[module.active_adapters[0]]
    return module
