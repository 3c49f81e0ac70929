"""The benchmark for GPUs, with tiny cases on a CPU: that it runs, and that it refuses a head that is wrong."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from wit_trl.loss import one_pass


HEAD = (64, 32, 1000, 0.5, False)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    monkeypatch.delitem(sys.modules, "gpu", raising=False)
    import gpu

    monkeypatch.setattr(gpu, "SEQUENCE", 16)
    return gpu


def tiny_model():
    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=1000, **config))


def test_head_and_step_are_measured(gpu, capsys):
    gpu.check("cpu", *HEAD)
    contenders = ("products", "wit_trl", "trl", "full_logits")
    results = gpu.compare("head", contenders, lambda name: gpu.measured(gpu.head_call(name, "cpu", *HEAD), "cpu", 1))
    assert [*results] == [*contenders]
    for lora in (False, True):
        results = gpu.compare(
            "step", ("wit_trl", "trl"), lambda name, lora=lora: gpu.step(name, "cpu", tiny_model, 0.2, lora, 1)
        )
        assert [len(result["all_seconds"]) for result in results.values()] == [1, 1]
    found = gpu.curves("cpu", tiny_model, steps=3, seeds=(0, 1))
    assert found["kernels"] < found["seeds"]


def test_wrong_head_is_not_timed(gpu, monkeypatch):
    score = one_pass.score

    def wrong(logits, *args):
        score(logits, *args)
        logits *= 1.01

    monkeypatch.setattr(one_pass, "score", wrong)
    with pytest.raises(SystemExit, match="wrong on this device: nothing is timed"):
        gpu.check("cpu", *HEAD)


def test_contender_that_cannot_run_says_why(gpu, capsys):
    def measure(name):
        raise torch.OutOfMemoryError("out of memory")

    assert gpu.compare("head", ("wit_trl",), measure) == {}
    assert "did not run: OutOfMemoryError('out of memory')" in capsys.readouterr().out
