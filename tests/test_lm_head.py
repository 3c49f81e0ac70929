import torch
from trl.trainer import utils

from wit_trl.lm_head import _OnePassKernel


def test_sum_of_weighted_log_probs_has_the_gradient_of_trl():
    torch.manual_seed(0)
    weights = torch.tensor([[0.0, 0.2, 0.8, 0.0], [0.0, 0.0, 0.8, 0.2]])
    targets = torch.randint(11, (6,))
    results = []
    for kernel in (_OnePassKernel(weights, weights != 0), utils._ChunkedLogProbFunction):
        torch.manual_seed(1)
        hidden_states, weight = torch.randn(6, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)
        log_probs, entropy, _, _, is_top1 = kernel.apply(
            hidden_states, weight, None, targets, 1.0, 32768, None, 1.0, ("log_probs", "entropy", "is_top1")
        )
        if kernel is utils._ChunkedLogProbFunction:
            mask = (weights[:, 1:] != 0).reshape(-1)
            log_probs, entropy, is_top1 = log_probs * weights[:, 1:].reshape(-1), entropy * mask, is_top1 & mask
        (-3.0 * log_probs.sum()).backward()
        results.append((log_probs, entropy, is_top1, hidden_states.grad, weight.grad))
    for own, trl in zip(*results, strict=True):
        torch.testing.assert_close(own, trl)
