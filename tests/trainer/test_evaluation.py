"""The evaluation against the formula, written as plain float64 loops."""

import time

import pytest
from datasets import Dataset
from transformers import TrainerCallback

from wit_trl import DataCollatorForWIT, WITSFTConfig, WITSFTTrainer

from ..helpers import WEIGHTS, make_trainer
from ..reference import accuracy_by_region, formula, region_sums, token_metrics


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


class SlowAtFirst(DataCollatorForWIT):
    """Its first batch comes last where a loader does not keep the order."""

    def torch_call(self, examples):
        time.sleep(0.3 * (examples[0]["input_ids"][0] == 7))
        return super().torch_call(examples)


@pytest.mark.parametrize(
    "settings",
    [
        {"dataloader_drop_last": True},
        {"accelerator_config": {"dispatch_batches": True}},
        {"accelerator_config": {"dispatch_batches": True, "split_batches": True, "even_batches": False}},
        {"dataloader_num_workers": 2, "dataloader_in_order": False},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    ],
    ids=str,
)
def test_every_row_is_evaluated_whatever_the_settings_of_loaders(settings, rows, make_model, tokenizer, config_kwargs):
    rows[0]["input_ids"][0] = 7
    data = Dataset.from_list(rows)
    config_kwargs |= {"per_device_eval_batch_size": 4} | settings
    collator = SlowAtFirst(pad_token_id=0)
    trainer = make_trainer(make_model, tokenizer, rows, config_kwargs, eval_dataset=data, data_collator=collator)
    trainer.evaluate(data.select(range(2)))  # whose rows a persistent worker would go on with
    loss, _ = formula(make_model().double(), rows, WEIGHTS)
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert trainer.predict(trainer.eval_dataset).metrics["test_loss"] == pytest.approx(loss.item(), rel=1e-6)
    found = trainer.evaluate_rows(data)
    sums = [region_sums(make_model().double(), [row]) for row in rows]
    assert found["completion_nll"] == pytest.approx([nll[1].item() for nll, _ in sums], rel=1e-6)
    assert found["completion_tokens"] == [count[1] for _, count in sums]
    assert len(trainer.get_train_dataloader()) == (5 if "dataloader_drop_last" in settings else 6)  # as it was set


@pytest.mark.parametrize("loss_divisor", ["count", "weights"])
def test_evaluation_set_without_a_weight_has_no_loss(loss_divisor, rows, make_model, tokenizer, config_kwargs, caplog):
    without = Dataset.from_list([row | {"weight": 0.0} for row in rows])
    config_kwargs |= {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    config_kwargs |= {"load_best_model_at_end": True, "loss_divisor": loss_divisor}
    trainer = make_trainer(make_model, tokenizer, rows, config_kwargs, eval_dataset=without)
    metrics = trainer.evaluate()
    assert "eval_loss" not in metrics
    _, (prompt_loss, _) = formula(make_model().double(), rows, WEIGHTS)
    assert metrics["eval_prompt_loss"] == pytest.approx(prompt_loss, rel=1e-6)
    assert "No token of the evaluation set has a weight, so it has no `eval_loss`" in caplog.text
    with pytest.raises(KeyError, match="`metric_for_best_model` training argument is set to 'eval_loss'"):
        trainer.train()  # no model is the best of all by a loss of 0


@pytest.mark.parametrize("event", ["on_step_end", "on_substep_end", "on_log"])
def test_rows_and_predictions_in_a_callback_log_nothing(event, rows, make_model, tokenizer, config_kwargs):
    data = Dataset.from_list(rows)

    def train(function):
        callback = TrainerCallback()
        setattr(callback, event, lambda *_, **__: function(trainer) and None)
        trainer = make_trainer(make_model, tokenizer, rows, config_kwargs, callbacks=[callback], eval_dataset=data)
        trainer.train()
        return [
            {name: x for name, x in log.items() if "runtime" not in name and "per_second" not in name}
            for log in trainer.state.log_history
        ]

    expected = train(lambda trainer: None)
    assert train(lambda trainer: trainer.evaluate_rows()) == expected
    assert train(lambda trainer: trainer.predict(trainer.eval_dataset)) == expected
