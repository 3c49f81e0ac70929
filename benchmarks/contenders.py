"""The losses that `speed.py` and `gpu.py` compare."""

import torch
import torch.nn.functional as F


# The kernels of others take no weights, so their users select the weighted tokens
SELECTING = ("cce", "liger")


def loss_function(contender: str, device: str = "cpu", softcap: float | None = None):
    """Returns a function of hidden states, head, targets, token weights and divisor. It returns the loss."""
    if contender == "wit_trl":
        from wit_trl import weighted_linear_cross_entropy

        return lambda *args: weighted_linear_cross_entropy(*args, softcap=softcap, fused_head="one_pass").loss

    if contender == "trl":
        from trl.kernels import ChunkedLogProbFunction

        def log_probs(hidden, weight, targets):
            outputs = ("log_probs", "entropy", "is_top1")
            return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32768, softcap, 1.0, outputs)[0]

    elif contender == "original":  # full float32 logits, and a copy of them, as in the paper's scripts

        def log_probs(hidden, weight, targets):
            logits = F.linear(hidden, weight).float()
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            return torch.log_softmax(logits, dim=1).gather(1, targets[:, None]).squeeze(1)

    elif contender == "cce":
        from cut_cross_entropy import linear_cross_entropy

        def log_probs(hidden, weight, targets):
            impl = "torch_compile" if device == "cpu" else "cce"  # its own kernel is for GPUs
            return -linear_cross_entropy(hidden, weight, targets, softcap=softcap, reduction="none", impl=impl).float()

    else:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        kernel = LigerFusedLinearCrossEntropyLoss(reduction="none", softcap=softcap)

        def log_probs(hidden, weight, targets):
            return -kernel(weight, hidden, targets)

    def loss(hidden, weight, targets, token_weights, count):
        return -(log_probs(hidden, weight, targets) * token_weights).sum() / count

    return loss
