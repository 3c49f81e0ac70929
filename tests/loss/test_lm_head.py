import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from trl.kernels import ChunkedLogProbFunction
from trl.trainer import utils

from wit_trl import weighted_linear_cross_entropy
from wit_trl.loss.lm_head import _WeightedKernel, prepare_lm_head, weighted_forward


def test_sum_of_weighted_log_probs_has_the_gradient_of_trl():
    torch.manual_seed(0)
    weights = torch.tensor([[0.0, 0.2, 0.8, 0.0], [0.0, 0.0, 0.8, 0.2]])
    targets = torch.randint(11, (6,))
    results = []
    for kernel in (_WeightedKernel(weights[:, 1:], weights[:, 1:] != 0, 2, None), ChunkedLogProbFunction.apply):
        torch.manual_seed(1)
        hidden_states, weight = torch.randn(6, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)
        log_probs, entropy, _, _, is_top1 = kernel(
            hidden_states, weight, None, targets, 1.0, 32768, None, 1.0, ("log_probs", "entropy", "is_top1")
        )
        if kernel == ChunkedLogProbFunction.apply:
            mask = (weights[:, 1:] != 0).reshape(-1)
            log_probs, entropy, is_top1 = log_probs * weights[:, 1:].reshape(-1) / 2, entropy * mask, is_top1 & mask
        (-3.0 * log_probs.sum()).backward()
        results.append((log_probs.sum(), entropy, is_top1, hidden_states.grad, weight.grad))
    for own, trl in zip(*results, strict=True):
        torch.testing.assert_close(own, trl)


def test_shift_labels_take_the_weights_of_their_position(head, make_model):
    model = make_model()
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    prepare_lm_head(model)
    torch.manual_seed(0)
    input_ids = torch.randint(model.config.vocab_size, (2, 7))
    weights = torch.tensor([0.2, 0.8, 0.0])[torch.randint(3, (2, 7))]
    labels = input_ids.masked_fill(weights == 0, -100)
    outputs = weighted_forward(model, {"input_ids": input_ids, "labels": labels}, weights, 3)
    shift_labels, shifted_weights = F.pad(labels, (0, 1), value=-100)[:, 1:], F.pad(weights, (0, 1))[:, 1:]
    inputs = {"input_ids": input_ids, "shift_labels": shift_labels}
    shifted_outputs = weighted_forward(model, inputs, shifted_weights, 3)
    nll, shifted_nll = -outputs.log_probs, -shifted_outputs.log_probs
    torch.testing.assert_close(shifted_outputs.loss, outputs.loss)
    torch.testing.assert_close(outputs.loss, (nll * weights[:, 1:]).sum() / 3)
    torch.testing.assert_close(shifted_nll[:, :-1], nll)


class HeadOfFSDP(torch.nn.Linear):
    """A head in a group of its own, as `fully_shard` makes it."""

    gathered = False

    def unshard(self):
        self.gathered = True

    def reshard(self):
        self.gathered = False


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_gathered_head_is_freed_where_no_backward_pass_will(fails, training, make_model, monkeypatch):
    monkeypatch.setattr("wit_trl.loss.lm_head.FSDPModule", HeadOfFSDP)
    model = make_model()
    model.lm_head = head = HeadOfFSDP(model.config.hidden_size, model.config.vocab_size, bias=False)
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    prepare_lm_head(model)
    seen = []

    def kernel(*args, **kwargs):
        seen.append(head.gathered)
        if fails:
            raise RuntimeError("out of memory")
        return weighted_linear_cross_entropy(*args, **kwargs)

    monkeypatch.setattr("wit_trl.loss.lm_head.weighted_linear_cross_entropy", kernel)
    input_ids = torch.arange(6)[None]
    weights = torch.ones(1, 6)
    with torch.set_grad_enabled(training), pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
        weighted_forward(model, {"input_ids": input_ids, "labels": input_ids}, weights, 1)
    assert seen == [True]
    assert head.gathered == (training and not fails)
    assert model.get_output_embeddings() is head
    assert head.gathered == (training and not fails)  # whoever else asks for the head gathers nothing


def test_forward_in_another_thread_does_not_train_without_weights(make_model):
    model = make_model()
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    prepare_lm_head(model)
    input_ids = torch.arange(6)[None]

    class Elsewhere(torch.nn.Module):
        def forward(self, **inputs):
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(model, **inputs).result()

    with pytest.raises(RuntimeError, match=r"ran another kernel than the one with the weights.*`accelerate launch`"):
        weighted_forward(Elsewhere(), {"input_ids": input_ids, "labels": input_ids}, torch.ones(1, 6), 1)
