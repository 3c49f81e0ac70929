import torch
import torch.nn.functional as F
from trl.trainer import utils

from wit_trl.lm_head import _OnePassKernel, weighted_forward


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


def test_shift_labels_take_the_weights_of_their_position(head, make_model):
    model = make_model()
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    torch.manual_seed(0)
    input_ids = torch.randint(model.config.vocab_size, (2, 7))
    weights = torch.tensor([0.2, 0.8, 0.0])[torch.randint(3, (2, 7))]
    labels = input_ids.masked_fill(weights == 0, -100)
    outputs, nll = weighted_forward(model, {"input_ids": input_ids, "labels": labels}, weights)
    shift_labels, shifted_weights = F.pad(labels, (0, 1), value=-100)[:, 1:], F.pad(weights, (0, 1))[:, 1:]
    inputs = {"input_ids": input_ids, "shift_labels": shift_labels}
    shifted_outputs, shifted_nll = weighted_forward(model, inputs, shifted_weights)
    if head == "trl_kernel":
        torch.testing.assert_close(shifted_outputs.log_probs[:, :-1], outputs.log_probs)
    torch.testing.assert_close(shifted_outputs.log_probs.sum(), outputs.log_probs.sum())
    torch.testing.assert_close(shifted_nll[:, :-1], nll)
