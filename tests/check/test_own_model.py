"""What `wit-trl check` says of the model, the template and the rows of a user."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from wit_trl.check import own_model
from wit_trl.check.checks import NO_MEMORY
from wit_trl.cli.loading import TRAIN_SPLIT, select_splits
from wit_trl.loss import one_pass

from ..helpers import make_trainer


@pytest.fixture
def trainer_of(make_model, tokenizer, config_kwargs):
    """A function that returns a trainer as `wit-trl check` makes it of all rows."""

    def make(rows, **kwargs):
        own = {"weights": (0.2, 0.8)} | {name: kwargs.pop(name) for name in ("peft_config",) if name in kwargs}
        return make_trainer(make_model, tokenizer, rows, config_kwargs | kwargs, **own)

    return make


@pytest.mark.parametrize(
    "kind", ["prompt_completion", "messages", "sharegpt", "text", "completion_mask", "assistant_masks", "labels"]
)
def test_a_step_equals_that_of_trl(kind, datasets_by_type, trainer_of):
    rows = datasets_by_type[kind][0].select(range(3))
    layout = {"packing": True, "completion_turns": "last"} if kind == "messages" else {"loss_divisor": "weights"}
    trainer = trainer_of(rows, **layout, learning_rate=1.0)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    (rows,) = select_splits({"train": rows}, {TRAIN_SPLIT: "train"}, trainer.processing_class, trainer.args)
    checks = list(own_model.check_endpoints(trainer, rows))
    assert [check.name[:6] for check in checks] == ["(0, 1)"] * 2 + ["(1, 1)"] * 2
    for check in checks:
        assert check.skipped is check.error is None
        assert check.figure < 1e-5
    for parameter, value in zip(trainer.model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)


def test_a_step_with_lora_and_its_dropout_equals_that_of_trl(prompt_completion, trainer_of):
    lora = LoraConfig(
        r=4, target_modules="all-linear", lora_dropout=0.5, task_type="CAUSAL_LM", init_lora_weights=False
    )
    trainer = trainer_of(prompt_completion, peft_config=lora)
    for check in own_model.check_endpoints(trainer, prompt_completion.select(range(3))):
        assert check.figure < 1e-5


def test_a_wrong_head_is_found_in_loss_and_gradient(prompt_completion, trainer_of, monkeypatch):
    trainer = trainer_of(prompt_completion)
    assert own_model.check_loss(trainer).figure < 1e-6
    score = one_pass.score

    def wrong(logits, params, scores, needs_gradient):
        score(logits, params, scores, needs_gradient)
        scores.nll.mul_(1.01)
        logits *= 1.01

    monkeypatch.setattr(one_pass, "score", wrong)
    checks = [own_model.check_loss(trainer), *own_model.check_endpoints(trainer, prompt_completion.select(range(3)))]
    assert [check.figure for check in checks] == pytest.approx([0.01] * 5, rel=1e-3)
    assert not any(check.is_right for check in checks)


def test_a_template_on_which_trl_finds_no_answer_is_no_fault(messages, trainer_of, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content }}<|eot_id|>{% endfor %}"
    skipped, *checks = own_model.check_endpoints(trainer_of(messages), messages.select(range(3)))
    assert skipped.skipped == "TRL cannot mark the answers of this template."
    assert skipped.is_right
    assert [check.is_right and check.skipped is None for check in checks] == [True, True]


def test_rows_with_weights_are_not_compared(prompt_completion, trainer_of):
    rows = prompt_completion.select(range(3)).add_column("weight", [1.0, 0.5, 1.0])
    checks = list(own_model.check_endpoints(trainer_of(rows), rows))
    assert [check.skipped for check in checks] == ["The rows have weights of their own, which TRL does not know."] * 2


def test_rows_that_trl_refuses_are_not_compared(trainer_of):
    rows = Dataset.from_list([{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}])
    trainer = trainer_of([{"prompt": "a", "completion": "b"}])
    for check in own_model.check_endpoints(trainer, rows):
        assert check.skipped.startswith("TRL does not train these rows: ")


def test_as_many_rows_as_fit(prompt_completion, trainer_of, monkeypatch):
    step, tried = own_model._step, []

    def in_little_memory(trainer):
        tried.append(len(trainer.train_dataset))
        if tried[-1] > 2:
            raise torch.OutOfMemoryError("no memory")
        return step(trainer)

    monkeypatch.setattr(own_model, "_step", in_little_memory)
    checks = list(own_model.check_endpoints(trainer_of(prompt_completion), prompt_completion.select(range(5))))
    assert all(check.figure < 1e-5 for check in checks)
    assert sorted({*tried}) == [2, 5]


def test_not_one_row_fits(prompt_completion, trainer_of, monkeypatch):
    def without_memory(trainer):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(own_model, "_step", without_memory)
    checks = list(own_model.check_endpoints(trainer_of(prompt_completion), prompt_completion.select(range(2))))
    assert [check.skipped for check in checks] == [NO_MEMORY] * 4
