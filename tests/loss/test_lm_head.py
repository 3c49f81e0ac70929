import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from trl.kernels import ChunkedLogProbFunction
from trl.trainer import utils

from wit_trl import _upstream, weighted_linear_cross_entropy
from wit_trl.loss import lm_head
from wit_trl.loss.lm_head import _WeightedKernel, prepare_lm_head, weighted_forward

from ..helpers import make_trainer


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


def prepared(model):
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    prepare_lm_head(model)
    return model


def make_inputs(vocab_size):
    """Arguments of `weighted_forward`: targets of both regions, and some tokens that are none."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(vocab_size, (3, 9), generator=generator)
    weights = torch.tensor([0.2, 0.8, 0.0])[torch.randint(3, (3, 9), generator=generator)]
    return {"input_ids": input_ids, "labels": input_ids.masked_fill(weights == 0, -100)}, weights


@pytest.mark.parametrize("factors", [None, lambda nll, entropy: torch.exp(-nll) / (1 + entropy)])
def test_both_heads_return_the_same(factors, make_model):
    results = []
    for fused_head in ("one_pass", "trl"):
        model = prepared(make_model())
        inputs, weights = make_inputs(model.config.vocab_size)
        outputs = weighted_forward(model, inputs, weights, 7, factors, fused_head)
        (3 * outputs.loss).backward()
        per_token = [outputs.log_probs, outputs.entropy, outputs.is_top1, outputs.label_mask]
        assert not any(values.requires_grad for values in per_token)
        results.append([outputs.loss, *per_token, *(parameter.grad for parameter in model.parameters())])
    for one_pass, trl in zip(*results, strict=True):
        torch.testing.assert_close(trl, one_pass)


@pytest.mark.parametrize("fused_head", ["one_pass", "trl"])
def test_token_that_a_bias_makes_impossible_leaves_the_entropy_of_the_others(fused_head, make_model):
    model = make_model()
    model.lm_head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
    inputs, weights = make_inputs(model.config.vocab_size)
    with torch.no_grad():
        model.lm_head.bias[next(i for i in range(100) if i not in inputs["input_ids"])] = -torch.inf
        log_probs = model(inputs["input_ids"]).logits[:, :-1].double().log_softmax(-1)
    expected = torch.special.entr(log_probs.exp()).sum(-1).masked_fill(inputs["labels"][:, 1:] == -100, 0)
    outputs = weighted_forward(prepared(model), inputs, weights, 7, None, fused_head)
    torch.testing.assert_close(outputs.entropy.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused_head", ["one_pass", "trl"])
def test_factors_get_the_scored_tokens_alone(fused_head, make_model):
    seen = []

    def factors(nll, entropy):
        assert not nll.requires_grad
        assert not entropy.requires_grad
        seen.append(nll.clone())
        result = torch.exp(-nll)
        nll.zero_()  # which is a copy
        return result

    model = prepared(make_model())
    inputs, weights = make_inputs(model.config.vocab_size)
    outputs = weighted_forward(model, inputs, weights, 7, factors, fused_head)
    scored = inputs["labels"][:, 1:] != -100
    torch.testing.assert_close(torch.cat(seen), -outputs.log_probs[scored])
    expected = -(outputs.log_probs * outputs.log_probs.exp() * weights[:, 1:]).sum() / 7
    torch.testing.assert_close(outputs.loss.detach(), expected)


@pytest.mark.parametrize("virtual", [0, 2])
@pytest.mark.parametrize("all_scored", [True, False])
def test_kernel_takes_labelled_rows_alone_as_well_as_all_rows(all_scored, virtual):
    """The first is what TRL hands over on a GPU."""
    torch.manual_seed(0)
    scored = torch.ones(2, 4, dtype=torch.bool) if all_scored else torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1]]).bool()
    hidden_states, weight = torch.randn(2, virtual + 4, 5), torch.randn(11, 5)
    targets, weights = torch.randint(11, (2, virtual + 4)), torch.rand(2, 4) * scored
    mask = F.pad(scored, (virtual, 0))
    results = []
    for rows, labels in ((hidden_states[mask], targets[mask]), (hidden_states.flatten(0, 1), targets.flatten())):
        kernel = _WeightedKernel(weights, scored, 3, None)
        log_probs, entropy, _, nll, is_top1 = kernel(rows, weight, None, labels, 1.0, 32768, None, 1.0, ())
        if len(labels) == mask.numel():  # as TRL masks them
            entropy, nll, is_top1 = (values[mask.flatten()] for values in (entropy, nll, is_top1))
        results.append([log_probs.sum(), entropy, nll, is_top1])
    for labelled, every in zip(*results, strict=True):
        torch.testing.assert_close(labelled, every)


def train(make_model, tokenizer, rows, config_kwargs, **arguments):
    """Returns the logs of each step and an evaluation, and the parameters at the end."""
    arguments = {**config_kwargs, "fused_head": "trl", **arguments}
    model, data = make_model(max_position_embeddings=4096), Dataset.from_list(rows)
    trainer = make_trainer(make_model, tokenizer, rows, arguments, model=model, eval_dataset=data)
    trainer.train()
    logs = [*trainer.state.log_history[: trainer.state.global_step], trainer.evaluate()]
    logs = [{name: value for name, value in log.items() if "second" not in name and "time" not in name} for log in logs]
    return logs, {name: parameter.tolist() for name, parameter in trainer.model.named_parameters()}


MODES = {
    "padded": {},
    "padding_free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True},
    "dft": {"loss_type": "dft", "loss_divisor": "weights"},
}


@pytest.mark.parametrize("mode", MODES)
def test_trl_head_needs_nothing_private(mode, make_model, tokenizer, rows, config_kwargs, monkeypatch):
    expected = train(make_model, tokenizer, rows, config_kwargs, **MODES[mode])
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", ChunkedLogProbFunction)  # where another test has hooked it
    for name in ("_KernelHook", "_kernel", "use_kernel", "dequantized_weight", "trained_copy"):
        monkeypatch.delattr(_upstream, name)
    for name in ("_WeightedKernel", "use_kernel", "dequantized_weight", "trained_copy"):
        monkeypatch.delattr(lm_head, name)
    actual = train(make_model, tokenizer, rows, config_kwargs, **MODES[mode])
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction
    assert actual == expected


def test_hook_is_installed_where_the_one_pass_head_runs(make_model, monkeypatch):
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", ChunkedLogProbFunction)
    model = prepared(make_model())
    inputs, weights = make_inputs(model.config.vocab_size)
    for fused_head, kernel in (("trl", ChunkedLogProbFunction), ("one_pass", _upstream._KernelHook)):
        weighted_forward(model, inputs, weights, 7, None, fused_head)
        assert utils._ChunkedLogProbFunction is kernel


def test_shift_labels_take_the_weights_of_their_position(head, make_model):
    model = prepared(make_model())
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
    model = prepared(make_model())
    input_ids = torch.arange(6)[None]

    class Elsewhere(torch.nn.Module):
        def forward(self, **inputs):
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(model, **inputs).result()

    with pytest.raises(RuntimeError, match=r"ran another kernel than the one with the weights.*`accelerate launch`"):
        weighted_forward(Elsewhere(), {"input_ids": input_ids, "labels": input_ids}, torch.ones(1, 6), 1)
