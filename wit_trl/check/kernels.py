"""The kernels of the LM head against float64: which cases there are, and how far a kernel may be off."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..loss import one_pass
from ..loss.params import HeadParams, TokenScores
from ..loss.token_factors import probability
from ..training.attributes import set_for_now
from .reference import head_in_float64


# Hidden states (N, H), weight (V, H), bias (V,) or None, and the rest -> the weighted sum, and what is known of tokens
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, HeadParams], tuple[torch.Tensor, TokenScores]]

# Norm of the difference over the norm in float64. Ten times what rounding of inputs, logits and sums does to random
# values; an error that matters is larger: a product in TF32 is off by 3e-4
LIMITS = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class HeadCase:
    """One way to call a kernel. Half of its tokens have a weight of zero."""

    name: str
    softcap: float | None = None
    logit_scale: float = 1.0
    has_bias: bool = False
    chunks: int = 1
    frozen_head: bool = False
    has_factors: bool = False
    loss_scale: float = 1.0
    evaluation: bool = False


HEAD_CASES = (
    HeadCase("plain"),
    HeadCase("two chunks", chunks=2),
    HeadCase("six chunks", chunks=6),  # above four, the gradient of a 16-bit head is summed in float32
    HeadCase("scale and soft cap", logit_scale=0.7, softcap=2.0),
    HeadCase("bias", has_bias=True, chunks=2),
    HeadCase("frozen head", frozen_head=True),
    HeadCase("factors", has_factors=True),
    HeadCase("factors, soft cap", has_factors=True, softcap=2.0, has_bias=True),
    HeadCase("scaled loss", loss_scale=3.0),
    HeadCase("evaluation", evaluation=True),
)


def head_inputs(
    device: str, dtype: torch.dtype, tokens: int, hidden_size: int, vocabulary: int, zero_share: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns random hidden states `(N, H)`, weight `(V, H)`, bias `(V,)`, targets `(N,)` and their weights `(N,)`."""
    torch.manual_seed(0)
    hidden_states = torch.randn(tokens, hidden_size, device=device).to(dtype)
    weight = (torch.randn(vocabulary, hidden_size, device=device) / hidden_size**0.5).to(dtype)
    bias = torch.randn(vocabulary, device=device).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), device=device)
    of_weight = (torch.arange(tokens, device=device) % 10) >= 10 * zero_share
    return hidden_states, weight, bias, targets, of_weight * (0.2 + torch.rand(tokens, device=device))


def head_errors(
    kernel: Kernel, case: HeadCase, device: str, dtype: torch.dtype, tokens: int, hidden_size: int, vocabulary: int
) -> dict[str, float]:
    """
    Returns for loss, nll, entropy and each gradient the norm of the difference to float64 over the norm, and in
    float32 the number of tokens whose top-1 is wrong.
    """
    hidden_states, weight, bias, targets, token_weights = head_inputs(device, dtype, tokens, hidden_size, vocabulary)
    trained = [hidden_states, *([] if case.frozen_head else [weight]), *([bias] if case.has_bias else [])]
    for x in trained:
        x.requires_grad_()
    inputs = (hidden_states, weight, bias if case.has_bias else None)
    # Every third target is the most likely token, which few random ones are
    targets[::3] = F.linear(*inputs)[::3].argmax(1)
    token_weights /= token_weights.count_nonzero()
    scored = token_weights != 0
    factors = probability if case.has_factors else None
    expected = head_in_float64(*inputs, targets, token_weights, case.logit_scale, case.softcap, factors)
    params = HeadParams(targets, token_weights, scored, case.logit_scale, case.softcap, factors)
    rows = -(-int(scored.sum()) // case.chunks)
    with (
        set_for_now(one_pass, _chunk_rows=lambda *_: (rows + 3, rows)),
        torch.set_grad_enabled(not case.evaluation),
    ):
        loss, scores = kernel(*inputs, params)
    pairs = {"loss": (loss, expected.loss)}
    for name in ("nll", "entropy"):
        pairs[name] = (getattr(scores, name)[scored], getattr(expected, name)[scored.to(expected.nll.device)])
    if not case.evaluation:
        # In float16 as with a GradScaler, since a gradient below 6e-8 is none
        loss_scale = case.loss_scale * (2.0**14 if dtype == torch.float16 else 1.0)
        loss.backward(loss.new_tensor(loss_scale))
        gradients = {
            "gradient of hidden states": (hidden_states.grad, expected.grad_hidden),
            "gradient of head": (weight.grad, expected.grad_weight),
            "gradient of bias": (bias.grad, expected.grad_bias),
        }
        pairs |= {name: (x, loss_scale * y) for name, (x, y) in gradients.items() if x is not None}
    errors = {
        name: (torch.linalg.norm(a.to(b.device).double() - b) / torch.linalg.norm(b)).item()
        for name, (a, b) in pairs.items()
    }
    if dtype == torch.float32:
        is_top1 = expected.is_top1.to(scored.device) & scored
        errors["top-1"] = (scores.is_top1 != is_top1).sum().item()
    return errors
