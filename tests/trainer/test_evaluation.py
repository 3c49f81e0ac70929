"""The evaluation against the formula, written as plain float64 loops."""

import pytest
from datasets import Dataset

from wit_trl import WITSFTConfig, WITSFTTrainer

from ..helpers import WEIGHTS, make_trainer
from ..reference import accuracy_by_region, formula, token_metrics


@pytest.mark.parametrize("weights", [WEIGHTS, (0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_evaluation_is_exact_for_every_batch_size(
    head, batch_size, weights, rows, make_model, tokenizer, config_kwargs
):
    config_kwargs["per_device_eval_batch_size"] = batch_size
    trainer = make_trainer(make_model, tokenizer, rows, config_kwargs, weights, eval_dataset=Dataset.from_list(rows))
    metrics = trainer.evaluate()
    loss, (prompt_loss, completion_loss) = formula(make_model().double(), rows, weights)
    assert metrics["eval_loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert metrics["eval_prompt_loss"] == pytest.approx(prompt_loss, rel=1e-6)
    assert metrics["eval_completion_loss"] == pytest.approx(completion_loss, rel=1e-6)
    entropy, accuracy = token_metrics(make_model().double(), rows, weights)
    assert metrics["eval_entropy"] == pytest.approx(entropy, rel=1e-6)
    assert metrics["eval_mean_token_accuracy"] == pytest.approx(accuracy)
    prompt_accuracy, completion_accuracy = accuracy_by_region(make_model().double(), rows)
    assert metrics["eval_prompt_mean_token_accuracy"] == pytest.approx(prompt_accuracy)
    assert metrics["eval_completion_mean_token_accuracy"] == pytest.approx(completion_accuracy)


def test_padding_free_and_packed_evaluation_equal_the_padded_one(head, rows, make_model, tokenizer, config_kwargs):
    results = []
    for mode in ({}, {"padding_free": True, "max_length": None}, {"eval_packing": True}):
        trainer = make_trainer(make_model, tokenizer, rows, config_kwargs | mode, eval_dataset=Dataset.from_list(rows))
        metrics = trainer.evaluate()
        results.append([metrics[f"eval_{name}"] for name in ("loss", "prompt_loss", "completion_loss")])
    assert results[1] == pytest.approx(results[0], rel=1e-6)
    assert results[2] == pytest.approx(results[0], rel=1e-6)


def test_best_model_can_be_chosen_by_completion_loss(rows, make_model, tokenizer, config_kwargs, tmp_path):
    config_kwargs |= {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "best",
        "metric_for_best_model": "eval_completion_loss",
        "greater_is_better": False,
        "load_best_model_at_end": True,
    }
    trainer = make_trainer(make_model, tokenizer, rows, config_kwargs, eval_dataset=Dataset.from_list(rows))
    trainer.train()
    logged = [log["eval_completion_loss"] for log in trainer.state.log_history if "eval_completion_loss" in log]
    assert trainer.state.best_metric == min(logged)


@pytest.mark.parametrize("train_on", ["pairs", "chat"])
def test_several_evaluation_sets_and_later_data(
    train_on, prompt_completion, messages, make_model, tokenizer, config_kwargs
):
    data = {"pairs": prompt_completion.select(range(5)), "chat": messages.select(range(5))}
    trainer = WITSFTTrainer(
        make_model(),
        WITSFTConfig(**config_kwargs),
        train_dataset=data[train_on],
        eval_dataset=data,
        processing_class=tokenizer,
    )
    for name, dataset in trainer.eval_dataset.items():
        regions = [region for mask in dataset["completion_mask"] for region in mask]
        assert set(regions) == {0, 1}, name
    assert trainer.chat_template is None  # TRL's training template is for the messages alone
    metrics = trainer.evaluate()
    # The same data handed over later, under another prefix and prepared already
    for name in data:
        later = trainer.evaluate(data[name], metric_key_prefix="test")
        predicted = trainer.predict(trainer.eval_dataset[name]).metrics
        for loss in ("loss", "prompt_loss", "completion_loss"):
            assert later[f"test_{loss}"] == pytest.approx(metrics[f"eval_{name}_{loss}"], rel=1e-6)
            assert predicted[f"test_{loss}"] == pytest.approx(metrics[f"eval_{name}_{loss}"], rel=1e-6)


def test_compute_metrics_gets_logits_and_labels(rows, make_model, tokenizer, config_kwargs):
    seen = {}

    def compute_metrics(prediction):
        seen["logits"], seen["labels"] = prediction.predictions, prediction.label_ids
        return {"answer": 42}

    trainer = make_trainer(
        make_model,
        tokenizer,
        rows,
        config_kwargs,
        (0, 1),
        eval_dataset=Dataset.from_list(rows),
        compute_metrics=compute_metrics,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_answer"] == 42
    assert seen["logits"].shape == (*seen["labels"].shape, 500)
    completions = sum(sum(row["completion_mask"]) for row in rows)
    assert (seen["labels"] != -100).sum() == completions  # the prompt's weight is zero
    _, (prompt_loss, _) = formula(make_model().double(), rows, (0, 1))
    assert metrics["eval_prompt_loss"] == pytest.approx(prompt_loss, rel=1e-6)


def test_padding_in_the_data_is_never_a_target(rows, make_model, tokenizer, config_kwargs):
    padded = [
        {
            "input_ids": row["input_ids"] + [0] * 5,
            "attention_mask": [1] * len(row["input_ids"]) + [0] * 5,
            "completion_mask": row["completion_mask"] + [0] * 5,
        }
        for row in rows
    ]
    config_kwargs["max_length"] = None
    trainer = make_trainer(make_model, tokenizer, padded, config_kwargs, eval_dataset=Dataset.from_list(padded))
    metrics = trainer.evaluate()
    _, (prompt_loss, completion_loss) = formula(make_model().double(), rows, WEIGHTS)
    assert metrics["eval_prompt_loss"] == pytest.approx(prompt_loss, rel=1e-6)
    assert metrics["eval_completion_loss"] == pytest.approx(completion_loss, rel=1e-6)


def test_prepared_data_is_not_packed_twice(rows, make_model, tokenizer, config_kwargs):
    config_kwargs["packing"] = True
    data = Dataset.from_list(rows)
    trainer = make_trainer(make_model, tokenizer, rows, config_kwargs, eval_dataset=data)
    expected = trainer.evaluate()["eval_prompt_loss"]
    assert trainer.evaluate({"again": data})["eval_again_prompt_loss"] == pytest.approx(expected, rel=1e-6)
    assert trainer.evaluate(trainer.eval_dataset)["eval_prompt_loss"] == pytest.approx(expected, rel=1e-6)
