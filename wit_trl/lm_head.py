from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from accelerate.utils import is_peft_model
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import PreTrainedModel
from trl.trainer import utils
from trl.trainer.utils import FusedCausalLMOutput

from .loss import weighted_linear_cross_entropy


if TYPE_CHECKING:
    from peft import PeftModel

# Where the one-pass head was tested and timed. Elsewhere TRL's kernel runs, with the weights applied to its result.
_ONE_PASS_DEVICES = ("cpu",)


def align_with_targets(values: torch.Tensor, length: int, fill: float = 0) -> torch.Tensor:
    """
    Returns values of tokens `(B, T)` as values of the `length` targets of each row. The first token, which nothing
    predicts, falls away; the virtual tokens that prompt learning puts in front, which are no targets, get `fill`.
    Values that are as many as the targets belong to them already.
    """
    return F.pad(values, (length + 1 - values.size(1), 0), value=fill)[:, 1:]


def dequantize_lm_head(model: "PreTrainedModel | PeftModel") -> None:
    """
    Gives a quantized model a plain LM head, frozen, in the dtype of the model. The fused head multiplies by the head's
    weight itself, and that of a quantized head is packed: TRL's own loss of an 8-bit head is wrong without an error.
    """
    from peft.utils.integrations import dequantize_module_weight

    head = model.get_output_embeddings()
    weight = dequantize_module_weight(head)
    if weight is not head.weight:
        plain = torch.nn.Linear(weight.size(1), weight.size(0), bias=False, device="meta")
        plain.weight = torch.nn.Parameter(weight.detach().to(model.dtype), requires_grad=False)
        plain.bias = head.bias
        model.set_output_embeddings(plain)


def weighted_forward(
    model: torch.nn.Module, inputs: dict[str, Any], token_weights: torch.Tensor
) -> tuple[FusedCausalLMOutput, torch.Tensor]:
    """
    Calls a model that has TRL's fused LM head and weighs what it returns, without building the logits.

    Returns the output of TRL, with `log_probs` multiplied by the weight of the target, and the unweighted negative
    log-likelihood of each target, in nats and without gradient, in the shape of `log_probs`. Where the gradient is
    formed in the forward pass, it is right for a loss that adds up the log-probabilities, and for no other.

    Args:
        model (`torch.nn.Module`):
            Model prepared by [`~trl.trainer.utils.add_fused_lm_head`] and then wrapped in any way.
        inputs (`dict[str, Any]`):
            Arguments of its forward. `"labels"` is -100 where a token is not scored. `"shift_labels"`, if there are
            any, stand for the labels: at the position that predicts the token.
        token_weights (`torch.Tensor` of shape `(B, T)`):
            Weight of each token as a target, 0 where it is not scored, at the position of its label.
    """
    labels = inputs["shift_labels" if "shift_labels" in inputs else "labels"]
    if token_weights.device.type in _ONE_PASS_DEVICES:
        kernel = _OnePassKernel(token_weights, labels != -100)
        with patch.object(utils, "_ChunkedLogProbFunction", kernel), _gathered_lm_head(model):
            outputs = model(**inputs, fused_lm_head=True)
        return outputs, kernel.nll.view_as(outputs.log_probs)
    with _gathered_lm_head(model):
        outputs = model(**inputs, fused_lm_head=True)
    nll = -outputs.log_probs.detach()
    outputs.log_probs = outputs.log_probs * align_with_targets(token_weights, nll.size(1)).to(nll.device)
    return outputs, nll


@contextmanager
def _gathered_lm_head(model: torch.nn.Module) -> Iterator[None]:
    """
    Has FSDP gather an LM head that has a group of its own when TRL's forward asks for it. Nothing else does, because
    TRL never calls it, and the gradient of a weight that TRL gathers by itself is not reduced over the ranks.
    """
    if not isinstance(model, FSDPModule | FullyShardedDataParallel):
        yield
        return
    causal_lm: Any = model.module if isinstance(model, FullyShardedDataParallel) else model
    if is_peft_model(causal_lm):
        from peft.utils import ModulesToSaveWrapper

        adapter, causal_lm = causal_lm.active_adapter, causal_lm.get_base_model()
        head = causal_lm.get_output_embeddings()
        if isinstance(head, ModulesToSaveWrapper) and not isinstance(head, FSDPModule):  # FSDP1 wraps what is in it
            head = head.modules_to_save[adapter]
    else:
        head = causal_lm.get_output_embeddings()
    if isinstance(head, FSDPModule):

        def gather_and_get():
            head.unshard()
            return head

    elif isinstance(head, FullyShardedDataParallel):
        # FSDP1 gathers, frees and reduces around a call: let it return copies, through which the gradient goes back
        def copy_parameters():
            weight, bias = head.module.weight, head.module.bias
            return weight.clone(), None if bias is None else bias.clone()

        def gather_and_get():
            with patch.object(head.module, "forward", copy_parameters):
                weight, bias = head()
            return SimpleNamespace(weight=weight, bias=bias)

    else:
        yield
        return
    with patch.object(causal_lm, "get_output_embeddings", gather_and_get):
        yield
    if isinstance(head, FSDPModule) and not torch.is_grad_enabled():  # no backward pass will free it
        head.reshard()


class _OnePassKernel:
    """
    Stands in for the kernel of TRL's fused LM head, `trl.kernels.ChunkedLogProbFunction`. TRL's forward runs the
    backbone, gathers the head and asks its kernel for the log-probabilities of all tokens.
    """

    def __init__(self, token_weights: torch.Tensor, scored: torch.Tensor):
        self._token_weights, self._scored = token_weights, scored

    @torch.compiler.disable
    def apply(self, hidden_states, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs):
        length = len(targets) // len(self._token_weights)
        token_weights = align_with_targets(self._token_weights, length).reshape(-1)
        scored = align_with_targets(self._scored, length).reshape(-1)
        loss, self.nll, entropy, is_top1 = weighted_linear_cross_entropy(
            hidden_states,
            weight,
            targets,
            token_weights,
            1,
            bias=bias,
            logit_scale=logit_scale,
            softcap=softcap,
            scored=scored,
        )
        log_probs = -token_weights * self.nll
        # One of them carries the gradient of the sum. TRL masks those that are not scored.
        carrier = scored.long().argmax()[None]
        log_probs = log_probs.index_add(0, carrier, (loss.detach() - loss)[None])
        return log_probs, entropy, None, None, is_top1
