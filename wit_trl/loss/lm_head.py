"""
From a model's hidden states to the loss: TRL's fused LM head, which never holds the logits of all tokens.

The flow of a call of `weighted_forward`:

1. TRL's forward runs the backbone: `model(..., fused_lm_head=True)`.
2. It asks the model for its head. Where FSDP keeps the head in a group of its own, it is gathered here.
3. `"trl"`: TRL's kernel scores the tokens. The weights are applied to the `log_probs` that the model returns.
   `"one_pass"`: a kernel of ours runs in its place, for this call and this thread (`_upstream.use_kernel`). It has the
   weights, and returns the weighted loss.
4. We cut off the virtual tokens of prompt learning.
5. The backward pass frees a gathered head. Without one, or after an exception, it is freed here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MethodType, SimpleNamespace
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from accelerate.utils import is_peft_model
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import PreTrainedModel

from .._upstream import FusedCausalLMOutput, dequantized_weight, install_kernel_hook, trained_copy, use_kernel
from .functions import not_zero, uses_one_pass, weighted_linear_cross_entropy, weighted_sum
from .token_factors import TokenFactors


def prepare_lm_head(model: Any) -> None:
    """
    Prepares a `PreTrainedModel` or `PeftModel` with TRL's fused LM head for `weighted_forward`.

    A quantized model gets a plain head, frozen, in the dtype of the model: the fused head multiplies by the head's
    weight itself, and that of a quantized head is packed. TRL's own loss of an 8-bit head is wrong without an error.
    A bias of -inf becomes -1e4.
    Raises `ValueError` for an encoder-decoder, and if an adapter wraps the embeddings that the head shares.
    """
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"`{type(model).__name__}` is an encoder-decoder, which has no prompt in the sequence that it predicts. "
            "Pass a causal language model."
        )
    causal_lm = model
    if is_peft_model(model):
        from peft.utils.other import TrainableTokensWrapper

        causal_lm = model.get_base_model()
        if isinstance(causal_lm.get_output_embeddings(), TrainableTokensWrapper):
            raise ValueError(
                "`trainable_token_indices` is not supported for a model whose LM head shares the weight of its "
                "embeddings: the head would need the trained rows, and its bias cannot be told. Remove it from the "
                "PEFT configuration (it is also set where `chat_template_path` names a model whose template adds "
                "tokens: pass a `.jinja` file of the template instead), or train without an adapter."
            )
    if getattr(model, "is_quantized", False):
        head = model.get_output_embeddings()
        weight = dequantized_weight(head)
        if weight is not head.weight:
            plain = torch.nn.Linear(weight.size(1), weight.size(0), bias=False, device="meta")
            plain.weight = torch.nn.Parameter(weight.detach().to(model.dtype), requires_grad=False)
            plain.bias = head.bias
            model.set_output_embeddings(plain)
    if (bias := causal_lm.get_output_embeddings().bias) is not None:
        # Finite, since TRL's kernel multiplies logits by probabilities of 0. Such tokens stay impossible
        bias.detach().clamp_(min=-1e4)
    causal_lm.get_output_embeddings = MethodType(_get_output_embeddings, causal_lm)
    if hasattr(causal_lm, "hf_device_map"):  # so the head may be on another device than the current one
        install_kernel_hook()
    if type(causal_lm).__name__ == "Llama4ForCausalLM":  # whose own prefix names none of its modules
        causal_lm.base_model_prefix = "model"


_checked: WeakSet[torch.nn.Module] = WeakSet()


@torch.no_grad()
def check_logits(model: torch.nn.Module, inputs: dict[str, Any], fused_head: str) -> None:
    """
    Raises `ValueError` if a token is none of the model's, or if the fused head scores tokens otherwise than the logits
    of the model. The head takes hidden states, output embeddings, and a scale and a soft cap by names that TRL knows:
    what else a model does, only a comparison tells. This is made at the first call for a model, which all ranks must
    make. Arguments as in `weighted_forward`.
    """
    causal_lm = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    if causal_lm in _checked:
        return
    name, embeddings = type(causal_lm).__name__, causal_lm.get_input_embeddings()
    largest = int(inputs["input_ids"].max())
    if isinstance(embeddings, torch.nn.Embedding) and largest >= embeddings.num_embeddings:
        raise ValueError(
            f"The batch has the token {largest}, but `{name}` has {embeddings.num_embeddings} tokens. Tokenize the "
            "data with the model's own tokenizer, or add the tokens to the model: "
            "`model.resize_token_embeddings(len(tokenizer))`."
        )
    labels = inputs["shift_labels" if "shift_labels" in inputs else "labels"]
    # Targets, since the others may stand for images; as many on all ranks, and an even part of a sequence
    tokens = torch.cat([labels[labels != -100], inputs["input_ids"].reshape(-1)])[:8].repeat(8)[None, :8]
    inputs = {name: inputs[name] for name in ("use_cache", "output_router_logits") if name in inputs}
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            inputs |= {"input_ids": tokens, "labels": tokens}
            nll = -weighted_forward(model, inputs, torch.ones_like(tokens), 1, None, fused_head).log_probs[0]
            # Second, since ZeRO-3 would fetch the head ahead of the next call, in which TRL gathers it
            logits = model(input_ids=tokens, use_cache=False).logits[0, -8:-1].float()
    except (AttributeError, IndexError, TypeError) as error:
        raise ValueError(
            f"`{name}` does not run with TRL's fused LM head ({type(error).__name__}: {error}). If it is a "
            "Mixture-of-Experts, set `router_aux_loss_coef=0`. If that is set, pass another model."
        ) from error
    finally:
        for module in in_training:
            module.training = True
    expected = F.cross_entropy(logits, tokens[0, 1:], reduction="none")
    difference = (nll - expected).abs()
    # What 16 bits may round, of the most likely logit and of the result
    if (difference > 0.02 * logits.amax(1).abs() + 0.01 * expected).any():
        raise ValueError(
            f"`{name}` computes its logits in another way than TRL's fused LM head, which would train another model: "
            f"losses of tokens differ by up to {difference.max():.3g} nats. Pass another model, or override "
            "`compute_loss` with `wit_trl.wit_loss`, which takes the logits of the model."
        )
    _checked.add(causal_lm)


def weighted_forward(
    model: torch.nn.Module,
    inputs: dict[str, Any],
    token_weights: torch.Tensor,
    num_items_in_batch: torch.Tensor | float,
    token_factors: TokenFactors | None = None,
    fused_head: str = "auto",
) -> FusedCausalLMOutput:
    """
    Returns the output of TRL's fused LM head, with `loss` the weighted sum over the divisor, a scalar in nats. The
    per-token fields are unweighted, have no gradient, and are `(B, T - 1)`, or `(B, T)` with `"shift_labels"`.

    The model was prepared by `prepare_lm_head`, then wrapped in any way. `inputs` are arguments of its forward. The
    `"labels"`, or `"shift_labels"` at the position that predicts the token, are -100 where a token is not scored. There
    its weight, at the position of its label, is 0. All else is as in [`weighted_linear_cross_entropy`].
    """
    if "shift_labels" in inputs:
        scored = inputs["shift_labels"] != -100
    else:
        labels = inputs["labels"].clone()
        labels[:, 0] = -100  # which nothing predicts, unless prompt learning puts virtual tokens in front
        inputs = {**inputs, "labels": labels}
        scored, token_weights = labels[:, 1:] != -100, token_weights[:, 1:]
    cut = (slice(None), slice(-scored.size(1), None))  # of virtual tokens
    if uses_one_pass(fused_head, scored.device):
        kernel = _WeightedKernel(token_weights, scored, num_items_in_batch, token_factors)
        with _whole_head(), use_kernel(kernel):
            outputs = model(**inputs, fused_lm_head=True)
        if outputs.mean_logits is None:  # which ours returns
            raise RuntimeError(
                "TRL's fused LM head ran another kernel than the one with the weights: it was called in another "
                "thread, or this version of TRL chooses its kernel in another way. Launch a process for each device "
                "with `accelerate launch`, and see docs/versions.md for the versions that were run."
            )
        loss, nll = -outputs.log_probs.sum(), outputs.mean_logits[cut]
    else:
        with _whole_head():
            outputs = model(**inputs, fused_lm_head=True)
        # In float32, since FSDP2 casts what a model returns
        nll, entropy = -outputs.log_probs[cut].float(), outputs.entropy[cut].float()
        token_weights, scored, divisor = (
            torch.as_tensor(x, device=nll.device) for x in (token_weights, scored, num_items_in_batch)
        )
        loss = weighted_sum(nll, entropy, token_weights / not_zero(divisor), scored, token_factors)
    outputs["loss"], outputs["log_probs"], outputs["mean_logits"] = loss, -nll.detach(), None
    for name in ("entropy", "is_top1", "label_mask"):
        outputs[name] = outputs[name][cut].detach()
    return outputs


@dataclass(eq=False)
class _WeightedKernel:
    """Stands for TRL's kernel, [`~trl.kernels.ChunkedLogProbFunction`], in one call of `weighted_forward`."""

    token_weights: torch.Tensor  # (B, T), of each target
    scored: torch.Tensor  # (B, T), whether the target has a label
    num_items_in_batch: torch.Tensor | float
    token_factors: TokenFactors | None

    @torch.compiler.disable
    def __call__(self, hidden_states, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs):
        device = hidden_states.device
        token_weights, scored, divisor = (
            torch.as_tensor(x, device=device) for x in (self.token_weights, self.scored, self.num_items_in_batch)
        )
        # On a GPU, TRL hands over only the rows that have a label, elsewhere all rows
        is_compact = len(targets) < scored.numel()
        if is_compact:  # their number is known, so the host need not wait until they are found
            labelled = scored.reshape(-1).byte().argsort(descending=True, stable=True)[: len(targets)]
            token_weights, scored = token_weights.reshape(-1)[labelled], scored.reshape(-1)[labelled]
        else:  # also those of the virtual tokens that prompt learning puts in front
            virtual = len(targets) // len(scored) - scored.size(1)
            token_weights, scored = (F.pad(x, (virtual, 0)).reshape(-1) for x in (token_weights, scored))
        loss, nll, entropy, is_top1 = weighted_linear_cross_entropy(
            *(hidden_states, weight, targets, token_weights, divisor),
            bias=bias,
            logit_scale=logit_scale,
            softcap=softcap,
            scored=is_compact or scored,
            token_factors=self.token_factors,
            fused_head="one_pass",
        )
        # The first scored token carries the loss and its gradient. TRL masks those that are not scored.
        log_probs = torch.where(scored & (scored.cumsum(0) == 1), -loss, 0)
        # In the place of the mean logits, which nobody asked for, TRL shapes the nll like the others
        return log_probs, entropy, None, nll, is_top1


# The heads that a call of `weighted_forward` has gathered
_gathered: ContextVar[list[FSDPModule] | None] = ContextVar("wit_trl_gathered", default=None)


@contextmanager
def _whole_head() -> Iterator[None]:
    """Has the model return a head that is whole, and frees it where no backward pass will."""
    heads: list[FSDPModule] = []
    token = _gathered.set(heads)
    backward_frees = False
    try:
        yield
        backward_frees = torch.is_grad_enabled()
    finally:
        _gathered.reset(token)
        for head in heads if not backward_frees else ():
            head.reshard()


def _get_output_embeddings(self: PreTrainedModel) -> Any:
    """
    Stands for the method of the model. Where FSDP keeps the head in a group of its own, it returns, in `_whole_head`,
    the gathered head or what has its weight and bias. Nothing else gathers it, because TRL never calls the head, and
    the gradient of a weight that TRL gathers by itself is not reduced over the ranks. All other heads TRL reads right.
    """
    head: Any = type(self).get_output_embeddings(self)
    in_group = any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in head.modules())
    # Last, since torch.compile cannot trace it
    if not in_group or (heads := _gathered.get()) is None:
        return head
    group: Any = head if isinstance(head, FSDPModule) else trained_copy(head)  # which FSDP1 wraps by itself
    if isinstance(group, FSDPModule):
        group.unshard()
        heads.append(group)
    elif isinstance(group, FullyShardedDataParallel):
        # FSDP1 gathers, frees and reduces around a call: let it return copies, through which the gradient goes back
        group.module.forward = MethodType(_forward_or_parameters, group.module)
        weight, bias = group()
        return SimpleNamespace(weight=weight, bias=bias)
    return head


def _forward_or_parameters(self: torch.nn.Linear, *args: torch.Tensor) -> Any:
    """Stands for the forward of a head under FSDP1: without hidden states it returns copies of weight and bias."""
    if args:
        return type(self).forward(self, *args)
    return self.weight.clone(), None if self.bias is None else self.bias.clone()
