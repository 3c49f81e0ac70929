"""What is logged, against plain float64 loops and TRL's own trainer."""

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from trl import SFTConfig, SFTTrainer

from wit_trl import WITSFTTrainer

from ..helpers import WEIGHTS, StepRecorder, make_trainer
from ..reference import accuracy_by_region, formula, token_metrics


def test_metrics_of_trl_do_not_change(head, rows, make_model, tokenizer, config_kwargs):
    labelled = Dataset.from_list(rows)
    # TRL averages over micro-batches, we over tokens: the same for one micro-batch
    config_kwargs |= {"per_device_eval_batch_size": len(rows), "gradient_accumulation_steps": 1}
    expected = SFTTrainer(
        make_model(),
        SFTConfig(completion_only_loss=True, train_sampling_strategy="sequential", **config_kwargs),
        train_dataset=labelled,
        eval_dataset=labelled,
        processing_class=tokenizer,
    )
    trainer = make_trainer(make_model, tokenizer, rows, config_kwargs, (0, 1), eval_dataset=labelled)
    expected_metrics, metrics = expected.evaluate(), trainer.evaluate()
    for key in ("eval_entropy", "eval_mean_token_accuracy", "eval_num_tokens"):
        assert metrics[key] == pytest.approx(expected_metrics[key], rel=1e-6)
    trainer.train()
    expected.train()
    by_region = {f"{region}_{name}" for region in ("prompt", "completion") for name in ("loss", "mean_token_accuracy")}
    assert set(trainer.evaluate()) == set(expected.evaluate()) | {f"eval_{name}" for name in by_region}
    logged, expected_logged = trainer.state.log_history[-3], expected.state.log_history[-3]
    assert set(logged) == set(expected_logged) | {"completion_loss", "completion_mean_token_accuracy"}
    for key in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"):
        assert logged[key] == pytest.approx(expected_logged[key], rel=1e-6)


@pytest.mark.parametrize("logging_steps", [1, 2])
def test_metrics_cover_the_logging_interval(head, logging_steps, rows, make_model, tokenizer, config_kwargs):
    config_kwargs |= {"learning_rate": 0.0, "max_steps": 2, "logging_steps": logging_steps}
    recorder = StepRecorder()
    make_trainer(make_model, tokenizer, rows, config_kwargs, callbacks=[recorder]).train()
    assert len(recorder.logs) == 2 // logging_steps
    size = 4 * logging_steps
    for i, logs in enumerate(recorder.logs):
        seen = rows[i * size : (i + 1) * size]
        _, (prompt_loss, completion_loss) = formula(make_model().double(), seen, WEIGHTS)
        assert logs["prompt_loss"] == pytest.approx(prompt_loss, rel=1e-6)
        assert logs["completion_loss"] == pytest.approx(completion_loss, rel=1e-6)
        entropy, accuracy = token_metrics(make_model().double(), seen, WEIGHTS)
        assert logs["entropy"] == pytest.approx(entropy, rel=1e-6)
        assert logs["mean_token_accuracy"] == pytest.approx(accuracy)
        prompt_accuracy, completion_accuracy = accuracy_by_region(make_model().double(), seen)
        assert logs["prompt_mean_token_accuracy"] == pytest.approx(prompt_accuracy)
        assert logs["completion_mean_token_accuracy"] == pytest.approx(completion_accuracy)
        assert logs["num_tokens"] == sum(len(row["input_ids"]) for row in rows[: (i + 1) * size])


def test_metrics_are_reduced_once_per_logging_step(rows, make_model, tokenizer, config_kwargs, monkeypatch):
    calls = []
    for name in ("gather", "gather_for_metrics", "pad_across_processes", "reduce"):
        original = getattr(Accelerator, name)

        def counted(self, tensor, *args, name=name, original=original, **kwargs):
            calls.append(name)
            return original(self, tensor, *args, **kwargs)

        monkeypatch.setattr(Accelerator, name, counted)
    config_kwargs |= {"max_steps": 4, "logging_steps": 2, "gradient_accumulation_steps": 2}
    make_trainer(make_model, tokenizer, rows, config_kwargs).train()
    assert calls == ["reduce"] * 3  # with the summary at the end


@pytest.mark.parametrize("eval_strategy", ["no", "steps"])
def test_last_log_covers_the_steps_since_the_one_before(eval_strategy, rows, make_model, tokenizer, config_kwargs):
    config_kwargs |= {"learning_rate": 0.0, "max_steps": 2, "logging_steps": 4}
    config_kwargs |= {"eval_strategy": eval_strategy, "eval_steps": 2}
    trainer = make_trainer(make_model, tokenizer, rows, config_kwargs, eval_dataset=Dataset.from_list(rows))
    trainer.train()
    last = trainer.state.log_history[-1]
    assert last["num_tokens"] == sum(len(row["input_ids"]) for row in rows[:8])
    _, (prompt_loss, completion_loss) = formula(make_model().double(), rows[:8], WEIGHTS)
    assert last["prompt_loss"] == pytest.approx(prompt_loss, rel=1e-6)
    assert last["completion_loss"] == pytest.approx(completion_loss, rel=1e-6)


@pytest.mark.parametrize("kind", ["auto_find_batch_size", "interrupted"])
def test_failed_tries_are_in_no_log(kind, rows, make_model, tokenizer, config_kwargs):
    class Failing(WITSFTTrainer):
        failures = 0

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            if self.state.global_step == 1 and not self.failures:
                self.failures += 1
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            return loss

    config_kwargs |= {"learning_rate": 0.0, "max_steps": 2, "logging_steps": 2, "gradient_accumulation_steps": 1}
    config_kwargs |= {"auto_find_batch_size": kind == "auto_find_batch_size", "per_device_train_batch_size": 4}
    trainer = make_trainer(make_model, tokenizer, rows, config_kwargs, trainer_class=Failing)
    if kind == "interrupted":
        with pytest.raises(torch.cuda.OutOfMemoryError):
            trainer.train()
    trainer.train()
    batch_size = trainer._train_batch_size
    assert batch_size == 4 if kind == "interrupted" else batch_size < 4
    logs, seen = trainer.state.log_history[0], rows[: 2 * batch_size]
    _, (prompt_loss, completion_loss) = formula(make_model().double(), seen, WEIGHTS)
    assert logs["prompt_loss"] == pytest.approx(prompt_loss, rel=1e-6)
    assert logs["completion_loss"] == pytest.approx(completion_loss, rel=1e-6)
    assert logs["num_tokens"] == sum(len(row["input_ids"]) for row in seen)


def test_tokens_of_a_second_training_are_added(rows, make_model, tokenizer, config_kwargs):
    trainer = make_trainer(make_model, tokenizer, rows, config_kwargs | {"max_steps": 1})
    for trained in (1, 2):
        trainer.train()
        expected = trained * sum(len(row["input_ids"]) for row in rows[:4])
        assert trainer.state.log_history[0]["num_tokens"] == expected


def test_stream_that_ends_within_an_accumulation_goes_on_with_its_start(rows, make_model, tokenizer, config_kwargs):
    stream = IterableDataset.from_generator(lambda: iter(rows[:3]))
    config_kwargs |= {"learning_rate": 0.0, "per_device_train_batch_size": 1, "max_steps": 3, "max_grad_norm": 0.0}
    recorder = StepRecorder()
    make_trainer(make_model, tokenizer, stream, config_kwargs, callbacks=[recorder]).train()
    for step, numbers in enumerate(((0, 1), (2, 0), (1, 2))):
        model = make_model().double()
        loss, (_, completion_loss) = formula(model, [rows[number] for number in numbers], WEIGHTS)
        loss.backward()
        assert recorder.logs[step]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert recorder.logs[step]["completion_loss"] == pytest.approx(completion_loss, rel=1e-6)
        for name, gradient in recorder.gradients[step].items():
            torch.testing.assert_close(gradient.double(), model.get_parameter(name).grad, rtol=1e-4, atol=1e-7)
