"""What is logged, against plain float64 loops and TRL's own trainer."""

import pytest
from accelerate import Accelerator
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

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
