"""The training step and the evaluation against the formula, written as plain float64 loops."""

import inspect
import json
import resource
import threading
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from peft import PromptTuningConfig
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from wit_trl import DataCollatorForWIT, WITSFTConfig, WITSFTTrainer
from wit_trl.conversation.turns import Conversation
from wit_trl.data.preparation import DataPreparation

from ..helpers import WEIGHTS, StepRecorder, make_trainer
from ..reference import accuracy_by_region, formula, token_metrics, tokenize


@pytest.fixture
def rows(prompt_completion, tokenizer):
    """Eleven rows of uneven lengths and uneven shares of completion, cut at 64 tokens."""
    rows = [tokenize(tokenizer, row) for row in prompt_completion.select(range(11))]
    rows = [{key: value[:64] for key, value in row.items()} for row in rows]
    assert len({len(row["input_ids"]) for row in rows}) > 5
    return rows


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("weights", [WEIGHTS, (0.0, 0.5), (0.7, 0.0), (1.0, 1.0)])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (4, 2), (1, 8)])
def test_step_equals_the_formula(
    head, batch_size, accumulation, weights, padding_free, rows, make_model, tokenizer, config_kwargs
):
    # Eleven rows: the second step accumulates three, in one, one or three micro-batches
    config_kwargs |= {
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "max_steps": -1,
        "num_train_epochs": 1,
        "max_grad_norm": 0.0,
    }
    if padding_free:
        config_kwargs |= {"padding_free": True, "max_length": None}
    recorder = StepRecorder()
    trainer = make_trainer(make_model, tokenizer, rows, config_kwargs, weights, callbacks=[recorder])
    start = make_model().double()
    trainer.train()
    assert len(recorder.logs) == 2

    loss, region_losses = formula(start, rows[:8], weights)
    loss.backward()
    assert recorder.logs[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in start.named_parameters():
        gradient = recorder.gradients[0][name].double()
        assert torch.linalg.norm(gradient - parameter.grad) < 1e-5 * torch.linalg.norm(parameter.grad), name
    for name, region_loss, weight in zip(("prompt", "completion"), region_losses, weights, strict=True):
        if weight != 0:
            assert recorder.logs[0][f"{name}_loss"] == pytest.approx(region_loss, rel=1e-5)
        else:
            assert f"{name}_loss" not in recorder.logs[0]

    # The last, uneven step: the parameters after one step are the same for all batch sizes up to rounding
    after_one_step = make_model()
    optimizer = torch.optim.AdamW(after_one_step.parameters(), lr=1e-3, weight_decay=0.0)
    formula(after_one_step, rows[:8], weights)[0].backward()
    optimizer.step()
    expected, _ = formula(after_one_step.double(), rows[8:], weights)
    assert recorder.logs[1]["loss"] == pytest.approx(expected.item(), rel=1e-5)


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


def test_inputs_in_16_bits_do_not_round_the_weights(rows, make_model, tokenizer, config_kwargs, monkeypatch):
    trainer = make_trainer(make_model, tokenizer, rows, config_kwargs)
    batch = trainer.data_collator(rows[:2])

    def cast_as_deepspeed_does(self, inputs):
        return {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}

    monkeypatch.setattr(SFTTrainer, "_prepare_inputs", cast_as_deepspeed_does)
    assert torch.equal(trainer._prepare_inputs(dict(batch))["token_weights"], batch["token_weights"])


class SynchronisationCounter(TorchDispatchMode):
    """Counts the operations that make the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_loss_does_not_make_the_host_wait(head, rows, make_model, tokenizer, config_kwargs):
    trainer = make_trainer(make_model, tokenizer, rows, config_kwargs)
    trainer.model.train()
    batch = trainer.data_collator(rows[:2])
    with SynchronisationCounter() as forward:
        trainer.model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}, fused_lm_head=True)
    with SynchronisationCounter() as step:
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(50))
    # The one-pass head selects the scored tokens, as TRL's kernel does on GPUs
    assert step.count == forward.count + (head == "one_pass")


@pytest.mark.parametrize("packing", [False, "bfd", "bfd_split", "wrapped"])
def test_streaming_trains_like_the_data_set_in_memory(packing, prompt_completion, make_model, tokenizer, config_kwargs):
    if packing:
        config_kwargs |= {"packing": True, "packing_strategy": packing}
    losses = []
    for dataset in (prompt_completion, prompt_completion.to_iterable_dataset()):
        trainer = make_trainer(make_model, tokenizer, None, config_kwargs, train_dataset=dataset)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_streaming_from_a_generator_without_features(prompt_completion, make_model, tokenizer, config_kwargs):
    stream = IterableDataset.from_generator(lambda: iter(prompt_completion))
    trainer = make_trainer(
        make_model, tokenizer, None, config_kwargs, train_dataset=stream, eval_dataset=stream.take(3)
    )
    trainer.train()
    assert trainer.evaluate()["eval_prompt_loss"] > 0


def long_prompts(tokenizer, count=3):
    return [{"input_ids": [7] * 20, "completion_mask": [0] * 15 + [1] * 5} for _ in range(count)]


@pytest.mark.parametrize("tokenized", [False, True])
def test_prompt_that_fills_max_length_still_trains_its_prompt(tokenized, make_model, tokenizer, config_kwargs):
    config_kwargs |= {"max_length": 15}
    rows = long_prompts(tokenizer)
    rows.append({"input_ids": [7] * 10, "completion_mask": [0] * 8 + [1] * 2})  # the only one with a completion left
    if not tokenized:
        rows = [{"prompt": tokenizer.decode(row["input_ids"]), "completion": " And more."} for row in rows]
        rows[3] = {"prompt": "And", "completion": " more."}
    trainer = make_trainer(make_model, tokenizer, rows, config_kwargs)
    assert trainer.train_dataset["completion_mask"][:3] == [[0] * 15] * 3
    before = trainer.model.get_input_embeddings().weight.detach().clone()
    trainer.train()
    assert not torch.equal(trainer.model.get_input_embeddings().weight, before)


def test_prompt_that_fills_max_length_is_dropped_without_prompt_weight(
    rows, make_model, tokenizer, config_kwargs, caplog
):
    config_kwargs |= {"max_length": 64}
    data = [*rows[:4], {"input_ids": [7] * 80, "completion_mask": [0] * 70 + [1] * 10}]
    trainer = make_trainer(make_model, tokenizer, data, config_kwargs, (0, 1), eval_dataset=Dataset.from_list(data))
    assert len(trainer.train_dataset) == 4
    assert "Dropped 1 of 5 rows of the train dataset" in caplog.text
    # Evaluation measures the prompt of every row, whatever the weights
    assert len(trainer.eval_dataset) == 5


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_nothing_left_to_train_on_is_refused(packing, streaming, make_model, tokenizer, config_kwargs):
    config_kwargs |= {"max_length": 15, "packing": packing}
    short = {"input_ids": [7] * 5, "completion_mask": [0] * 5}  # never had a completion
    data = Dataset.from_list([*long_prompts(tokenizer), short])
    with pytest.raises(ValueError, match=r"No row .* left to train on.* 3 of 4 rows were lost to `max_length=15`"):
        make_trainer(
            make_model,
            tokenizer,
            None,
            config_kwargs,
            (0, 1),
            train_dataset=data.to_iterable_dataset() if streaming else data,
        )


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_no_completion_left_is_refused_though_prompts_have_a_weight(
    packing, streaming, make_model, tokenizer, config_kwargs
):
    config_kwargs |= {"max_length": 15, "packing": packing}
    data = Dataset.from_list([*long_prompts(tokenizer), {"input_ids": [7] * 5, "completion_mask": [0] * 5}])
    if streaming:
        data = data.to_iterable_dataset()
    arguments = (make_model, tokenizer, None, config_kwargs)
    with pytest.raises(
        ValueError, match=r"No row .* completion left to train on: 3 of 4 rows were lost to `max_length=15`.* Raise"
    ):
        make_trainer(*arguments, train_dataset=data)
    make_trainer(*arguments, (0.2, 0), train_dataset=data)


def test_plain_text_warns_that_there_is_no_prompt(make_model, tokenizer, config_kwargs, caplog):
    text = Dataset.from_dict({"text": ["An example of a text.", "And another one."]})
    logging_once = inspect.getmodule(DataPreparation).logger.warning_once
    logging_once.cache_clear()
    for _ in range(2):
        make_trainer(make_model, tokenizer, None, config_kwargs, train_dataset=text, eval_dataset=text)
    assert caplog.text.count("The data set has no prompt to weight") == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"completion_mask": [0, 1]},
            r"Row 1 of the train dataset: `completion_mask` has 2 entries, but `input_ids` has 3",
        ),
        ({"labels": [-100, 6]}, r"Row 1 of the train dataset: `labels` has 2 entries, but `input_ids` has 3"),
        (
            {"labels": [-100, 6, 9]},
            r"Row 1 of the train dataset: The label at position 2 is 9, but it must be the token itself, 7",
        ),
        (
            {"completion_mask": [0, 2, 1]},
            r"Row 1 of the train dataset: `completion_mask` holds \[2\], but it must hold 1 .* and 0",
        ),
        ({"assistant_masks": [0, 0, 1, 1]}, r"Row 1 of the train dataset: `assistant_masks` has 4 entries"),
    ],
)
def test_wrong_masks_are_refused_by_row(row, message, make_model, tokenizer, config_kwargs):
    (column,) = row
    good = {"input_ids": [5, 6, 7], column: [-100, 6, 7] if column == "labels" else [0, 1, 1]}
    with pytest.raises(ValueError, match=message):
        make_trainer(make_model, tokenizer, [good, {"input_ids": [5, 6, 7], **row}], config_kwargs)


def test_masks_of_both_kinds_must_agree(make_model, tokenizer, config_kwargs):
    row = {"input_ids": [5, 6, 7, 8], "completion_mask": [0, 1, 1, 1], "assistant_masks": [1, 1, 0, 1]}
    trainer = make_trainer(make_model, tokenizer, [row], config_kwargs)
    assert trainer.train_dataset["completion_mask"][:] == [[0, 1, 0, 1]]


def test_messages_mark_the_assistant_turns_with_their_end(messages, make_model, tokenizer, config_kwargs):
    trainer = make_trainer(make_model, tokenizer, None, config_kwargs, train_dataset=messages)
    for row, source in zip(trainer.train_dataset, messages, strict=True):
        marked = [token for token, region in zip(row["input_ids"], row["completion_mask"], strict=True) if region]
        turns = [m["content"].strip() + "<|eot_id|>" for m in source["messages"] if m["role"] == "assistant"]
        assert "".join(turns).startswith(tokenizer.decode(marked))  # `max_length` may cut it
        assert marked


@pytest.mark.parametrize("column", ["completion_mask", "assistant_masks"])
def test_unprepared_data_trains_from_its_masks(column, rows, make_model, tokenizer, config_kwargs):
    config_kwargs["dataset_kwargs"] = {"skip_prepare_dataset": True}
    data = Dataset.from_list(rows)
    data = data.rename_column("completion_mask", column) if column != "completion_mask" else data
    trainer = make_trainer(make_model, tokenizer, None, config_kwargs, train_dataset=data)
    trainer.train()
    loss, _ = formula(make_model().double(), rows[:4], WEIGHTS)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_compute_loss_func_is_refused(rows, make_model, tokenizer, config_kwargs):
    with pytest.raises(ValueError, match=r"`compute_loss_func` is not supported.* pass it to TRL's `SFTTrainer`"):
        make_trainer(make_model, tokenizer, rows, config_kwargs, compute_loss_func=lambda *args, **kwargs: None)


@pytest.mark.parametrize("missing", ["labels", "token_weights", "completion_mask"])
def test_collator_that_leaves_something_out_is_refused(missing, rows, make_model, tokenizer, config_kwargs):
    def collator(examples):
        batch = DataCollatorForWIT(pad_token_id=0)(examples)
        del batch[missing]
        return batch

    trainer = make_trainer(make_model, tokenizer, rows, config_kwargs, data_collator=collator)
    with pytest.raises(ValueError, match=rf"returned no \['{missing}'\]\. Use `wit_trl\.DataCollatorForWIT`"):
        trainer.train()


def test_collator_that_contradicts_the_weights_is_refused(rows, make_model, tokenizer, config_kwargs):
    with pytest.raises(ValueError, match=r"The weights of the `DataCollatorForWIT` contradict those"):
        make_trainer(
            make_model, tokenizer, rows, config_kwargs, (0.5, 1), data_collator=DataCollatorForWIT(pad_token_id=0)
        )


@pytest.mark.parametrize("changed", ["args", "data_collator"])
def test_weights_that_are_changed_later_are_refused(changed, rows, make_model, tokenizer, config_kwargs):
    trainer = make_trainer(make_model, tokenizer, rows, config_kwargs, eval_dataset=Dataset.from_list(rows))
    getattr(trainer, changed).prompt_loss_weight = 0.9
    for function in (trainer.train, trainer.evaluate, trainer.weight_report, trainer.create_model_card):
        with pytest.raises(ValueError, match=r"contradict those of the `WITSFTConfig`.* make a new trainer"):
            function()


def test_two_trainers_in_two_threads_keep_their_losses(rows, make_model, tokenizer, config_kwargs, tmp_path):
    # accelerate shares the state of gradient accumulation between all trainers of a process
    config_kwargs |= {"max_steps": 8, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 4}

    def make(weights):
        output = {"output_dir": str(tmp_path / str(weights))}
        return make_trainer(make_model, tokenizer, rows, config_kwargs | output, weights)

    def losses(trainer):
        return [log["loss"] for log in trainer.state.log_history if "loss" in log]

    def plain():
        args = SFTConfig(completion_only_loss=True, train_sampling_strategy="sequential", **config_kwargs)
        return SFTTrainer(make_model(), args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)

    together = [make((0.2, 0.8)), make((1.0, 0.1)), plain()]
    threads = [threading.Thread(target=trainer.train) for trainer in together]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = [make((0.2, 0.8)), make((1.0, 0.1)), plain()]
    for trainer, expected in zip(together, alone, strict=True):
        expected.train()
        assert losses(trainer) == pytest.approx(losses(expected), rel=1e-6)
    first, _ = formula(make_model().double(), rows[:4], (0, 1))
    assert losses(alone[2])[0] == pytest.approx(first.item(), rel=1e-5)  # TRL's own kernel, after all of ours


def test_encoder_decoder_is_refused(rows, tokenizer, config_kwargs):
    config = T5Config(vocab_size=500, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="`T5ForConditionalGeneration` is an encoder-decoder"):
        make_trainer(None, tokenizer, rows, config_kwargs, model=T5ForConditionalGeneration(config))


def test_own_collator_weighs_tokens_by_its_own_rule(rows, make_model, tokenizer, config_kwargs):
    def collator(examples):
        batch = DataCollatorForWIT(pad_token_id=0)(examples)
        batch["token_weights"] *= 0.5
        return batch

    trainer = make_trainer(make_model, tokenizer, rows, config_kwargs, data_collator=collator)
    trainer.train()
    loss, (prompt_loss, _) = formula(make_model().double(), rows[:4], WEIGHTS)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.5 * loss.item(), rel=1e-5)
    assert trainer.state.log_history[0]["prompt_loss"] == pytest.approx(prompt_loss, rel=1e-5)


@pytest.mark.parametrize(
    "options", [{"packing": True}, {"eval_packing": True}, {"padding_free": True, "max_length": None}]
)
@pytest.mark.parametrize("size", ["sp_size", "cp_size"])
def test_packing_where_sequences_are_split_is_refused(
    size, options, in_parallel, rows, make_model, tokenizer, config_kwargs
):
    in_parallel(**{size: 2})
    with pytest.raises(ValueError, match=r"Packing and padding-free batches .* Set `packing`, `eval_packing` and"):
        make_trainer(make_model, tokenizer, rows, config_kwargs | options)


@pytest.mark.parametrize("size", ["sp_size", "cp_size"])
def test_packed_evaluation_set_where_sequences_are_split_is_refused(
    size, in_parallel, rows, make_model, tokenizer, config_kwargs
):
    in_parallel(**{size: 2})
    trainer = make_trainer(make_model, tokenizer, rows, config_kwargs)
    packed = [{**row, "seq_lengths": [len(row["input_ids"])]} for row in rows]
    with pytest.raises(ValueError, match=r"Packing and padding-free batches .* Set `packing`, `eval_packing` and"):
        trainer.compute_loss(trainer.model.eval(), trainer.data_collator(packed))


@pytest.mark.parametrize("size", ["sp_size", "cp_size", "tp_size"])
def test_tokens_averaged_on_each_rank_where_sequences_are_split_are_refused(
    size, in_parallel, rows, make_model, tokenizer, config_kwargs
):
    in_parallel(**{size: 2})
    with pytest.raises(ValueError, match=r"`average_tokens_across_devices=False` is not supported .* Set it to True"):
        make_trainer(make_model, tokenizer, rows, config_kwargs | {"average_tokens_across_devices": False})


@pytest.mark.parametrize("size", ["sp_size", "cp_size"])
def test_prompt_learning_where_sequences_are_split_is_refused(
    size, in_parallel, rows, make_model, tokenizer, config_kwargs
):
    in_parallel(**{size: 2})
    prompt_tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match=r"Prompt learning is not supported under sequence or.* Use LoRA"):
        make_trainer(make_model, tokenizer, rows, config_kwargs, peft_config=prompt_tuning)


def test_zero3_without_reduce_scatter_under_sequence_parallelism_is_refused(
    in_parallel, rows, make_model, tokenizer, config_kwargs, monkeypatch
):
    zero_config = {"stage": 3, "reduce_scatter": False}
    in_parallel(SimpleNamespace(deepspeed_config={"zero_optimization": zero_config}), sp_size=2)
    monkeypatch.setattr("wit_trl.training.parallelism.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match=r"`reduce_scatter: false` is not supported .* Remove it from the DeepSpeed"):
        make_trainer(make_model, tokenizer, rows, config_kwargs)


@pytest.mark.parametrize(("asked", "multiple"), [(None, 4), (6, 12)])
@pytest.mark.parametrize("sizes", [{"sp_size": 4}, {"cp_size": 2}])  # context parallelism gives a rank two parts
def test_every_rank_of_a_sequence_gets_as_many_tokens(
    sizes, asked, multiple, in_parallel, rows, make_model, tokenizer, config_kwargs
):
    in_parallel(**sizes)
    trainer = make_trainer(make_model, tokenizer, rows, config_kwargs | {"pad_to_multiple_of": asked})
    batch = trainer.data_collator(rows[:2])
    assert {batch[name].size(1) % multiple for name in ("input_ids", "token_weights", "completion_mask")} == {0}


@pytest.mark.parametrize("columns", [["prompt", "completion"], ["messages"], ["conversations"]])
def test_formatting_func_that_trl_would_ignore_is_refused(columns, make_model, tokenizer, config_kwargs):
    rows = [dict.fromkeys(columns, "text")]
    with pytest.raises(ValueError, match=r"`formatting_func` makes plain text, but TRL reads the columns \['"):
        make_trainer(make_model, tokenizer, rows, config_kwargs, formatting_func=lambda row: "a")


@pytest.mark.parametrize("columns", [["instruction", "output"], ["prompt"]])
def test_unknown_columns_are_refused(columns, make_model, tokenizer, config_kwargs):
    rows = [dict.fromkeys(columns, "text")]
    message = rf"The train dataset has the columns \['{columns[0]}'.*but needs `prompt` and `completion`, .* Rename"
    with pytest.raises(ValueError, match=message):
        make_trainer(make_model, tokenizer, rows, config_kwargs)


@pytest.mark.parametrize(
    ("columns", "remedy"),
    [
        (["chosen", "rejected"], "preference data, for TRL's `DPOTrainer`.* rename `chosen` to `messages`"),
        (["question", "answer"], "Rename `question` to `prompt` and `answer` to `completion`"),
    ],
)
def test_columns_of_another_trainer_or_name_get_their_remedy(columns, remedy, make_model, tokenizer, config_kwargs):
    with pytest.raises(ValueError, match=remedy):
        make_trainer(make_model, tokenizer, [dict.fromkeys(columns, "text")], config_kwargs)


def test_empty_data_is_refused(rows, make_model, tokenizer, config_kwargs):
    empty = Dataset.from_dict({"prompt": [], "completion": []})
    with pytest.raises(ValueError, match=r"`train_dataset` is empty\. Check the file"):
        make_trainer(make_model, tokenizer, None, config_kwargs, train_dataset=empty)
    with pytest.raises(ValueError, match=r"The eval dataset is empty\. Check the file"):
        make_trainer(
            make_model, tokenizer, rows, config_kwargs, eval_dataset=IterableDataset.from_generator(lambda: iter(()))
        )


def test_conversation_without_template_or_assistant_is_refused(messages, make_model, tokenizer, config_kwargs):
    mute = Dataset.from_list([{"messages": [{"role": "user", "content": "Hello?"}]}])
    with pytest.raises(
        ValueError,
        match=r"Row 0 of the train dataset: `messages` has no assistant turn.*Its roles are \['user'\]",
    ):
        make_trainer(make_model, tokenizer, None, config_kwargs, train_dataset=mute)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="holds conversations, but there is no chat template, or no default one"):
        make_trainer(make_model, tokenizer, None, config_kwargs, train_dataset=messages)


def test_template_that_leaves_out_the_end_of_turn_warns(messages, make_model, tokenizer, config_kwargs, caplog):
    tokenizer.chat_template = (
        "{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>"
        "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}"
        "{% else %}{{ message.content }}{% endif %}<|eot_id|>{% endfor %}"
    )
    inspect.getmodule(Conversation).logger.warning_once.cache_clear()
    make_trainer(make_model, tokenizer, None, config_kwargs, train_dataset=messages)
    assert "The chat template leaves the end-of-turn token out of the assistant's turn" in caplog.text


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


def test_torch_format_trains_as_lists_do(rows, make_model, tokenizer, config_kwargs):
    losses = []
    for dataset in (Dataset.from_list(rows), Dataset.from_list(rows).with_format("torch")):
        trainer = make_trainer(make_model, tokenizer, None, config_kwargs, train_dataset=dataset)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == losses[1]


def test_signature_is_that_of_sft_trainer():
    assert inspect.signature(WITSFTTrainer) == inspect.signature(SFTTrainer)


def test_positional_arguments_and_plain_arguments_get_the_default_weights(rows, make_model, tokenizer, config_kwargs):
    config_kwargs["hub_token"] = "a-token"
    dataset = Dataset.from_list(rows)
    training_arguments = TrainingArguments(
        config_kwargs["output_dir"], use_cpu=True, report_to="none", hub_token="a-token", learning_rate=3e-4
    )
    for args in (SFTConfig(eos_token="<eos>", **config_kwargs), training_arguments):
        trainer = WITSFTTrainer(make_model(), args, None, dataset, processing_class=tokenizer)
        assert isinstance(trainer.args, WITSFTConfig)
        assert (trainer.args.prompt_loss_weight, trainer.args.completion_loss_weight) == WEIGHTS
        assert trainer.args.hub_token == "a-token"
        assert trainer.args.learning_rate == args.learning_rate
        assert trainer.args.bf16 == args.bf16
        assert trainer.data_collator.completion_loss_weight == 0.8


def test_arguments_with_fields_of_their_own_are_refused(rows, make_model, tokenizer, config_kwargs):
    @dataclass
    class OwnConfig(SFTConfig):
        own: int = 1

    with pytest.raises(
        ValueError, match=r"`args` is a `OwnConfig` with fields of its own, \['own'\]\. Make it a subclass"
    ):
        WITSFTTrainer(make_model(), OwnConfig(**config_kwargs), train_dataset=Dataset.from_list(rows))


def test_works_without_args(rows, make_model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make_model()
    model.save_pretrained("tiny")
    tokenizer.save_pretrained("tiny")
    trainer = WITSFTTrainer("tiny", train_dataset=Dataset.from_list(rows))
    assert trainer.args.output_dir == "tiny-WIT"
    assert isinstance(trainer.args, WITSFTConfig)


def test_model_card_cites_the_paper(rows, make_model, tokenizer, config_kwargs, tmp_path):
    trainer = make_trainer(make_model, tokenizer, rows, config_kwargs)
    trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "README.md").read_text()
    assert "On the Effect of Instruction Tuning Loss on Generalization" in card
    assert "huggingface.co/papers/2507.07817" in card
    assert "@article{chatterjee2025effect" in card
    assert "- wit\n" in card
    assert card.endswith("prompt_loss_weight: 0.2, completion_loss_weight: 0.8\n")
    assert "wit" in trainer.model.model_tags
    make_trainer(make_model, tokenizer, rows, config_kwargs | {"loss_type": "dft"}).create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert card.endswith("prompt_loss_weight: 0.2, completion_loss_weight: 0.8, loss_type: dft\n")


def test_gradient_checkpointing_changes_nothing(rows, make_model, tokenizer, config_kwargs):
    parameters = []
    for checkpointing in (False, True):
        config_kwargs["gradient_checkpointing"] = checkpointing
        trainer = make_trainer(make_model, tokenizer, rows, config_kwargs)
        trainer.train()
        assert trainer.model.is_gradient_checkpointing == checkpointing
        parameters.append(list(trainer.model.parameters()))
    for plain, checkpointed in zip(*parameters, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-6, atol=1e-8)


def test_resumed_training_ends_in_the_same_parameters(rows, make_model, tokenizer, config_kwargs, tmp_path):
    config_kwargs |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(make_model, tokenizer, rows, config_kwargs)
    whole.train()
    resumed = make_trainer(make_model, tokenizer, rows, config_kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for parameter, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(parameter, expected)
    assert json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["log_history"][-1]["step"] == 4


def test_resuming_with_other_weights_is_told(rows, make_model, tokenizer, config_kwargs, tmp_path, caplog):
    config_kwargs |= {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(make_model, tokenizer, rows, config_kwargs).train()
    for weights, told in (((0.2, 0.8), False), ((0.5, 0.8), True)):
        caplog.clear()
        trainer = make_trainer(make_model, tokenizer, rows, config_kwargs | {"max_steps": 2}, weights)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        message = "was trained with {'prompt_loss_weight': 0.2}, and is resumed with {'prompt_loss_weight': 0.5}"
        assert (message in caplog.text) == told


def test_full_disk_while_saving_leaves_the_checkpoint_before(rows, make_model, tokenizer, config_kwargs, tmp_path):
    config_kwargs |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(make_model, tokenizer, rows, config_kwargs | {"output_dir": str(tmp_path / "whole")})
    whole.train()

    class FullDisk(TrainerCallback):
        """From the third step on no file can grow beyond some kilobytes, which holds for the model's file too."""

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (16384, limits[1]))

    config_kwargs["output_dir"] = str(tmp_path / "cut_off")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(Exception, match="File too large"):
            make_trainer(make_model, tokenizer, rows, config_kwargs, callbacks=[FullDisk()]).train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "cut_off" / "checkpoint-4").exists()
    resumed = make_trainer(make_model, tokenizer, rows, config_kwargs)
    resumed.train(resume_from_checkpoint=True)
    for parameter, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("left", [[], ["checkpoint-2"]])
def test_resuming_without_a_complete_checkpoint_is_refused(left, rows, make_model, tokenizer, config_kwargs, tmp_path):
    trainer = make_trainer(make_model, tokenizer, rows, config_kwargs)
    for name in left:
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="no complete checkpoint"):
        trainer.train(resume_from_checkpoint=True)


@pytest.fixture
def make_experts():
    """A function that returns the same tiny Mixture-of-Experts model at every call."""

    def make():
        torch.manual_seed(0)
        return MixtralForCausalLM(
            MixtralConfig(
                vocab_size=500,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=4,
                num_local_experts=4,
                output_router_logits=True,
                router_aux_loss_coef=0.1,
                pad_token_id=0,
                experts_implementation="eager",  # the others have no float64
            )
        )

    return make


def test_auxiliary_loss_of_experts_is_added(head, rows, make_experts, tokenizer, config_kwargs):
    trainer = make_trainer(make_experts, tokenizer, rows, config_kwargs, eval_dataset=Dataset.from_list(rows))
    evaluated = trainer.evaluate()
    trainer.train()
    first = trainer.state.log_history[0]
    loss, _ = formula(make_experts().double(), rows[:4], WEIGHTS)
    assert first["loss"] == pytest.approx(loss.item() + 0.1 * first["aux_loss"], rel=1e-5)
    assert first["aux_loss"] > 1
    assert evaluated["eval_loss"] == pytest.approx(formula(make_experts().double(), rows, WEIGHTS)[0].item(), rel=1e-6)


def test_auxiliary_loss_of_experts_is_that_of_trl(head, rows, make_experts, tokenizer, config_kwargs):
    datasets = {"train_dataset": Dataset.from_list(rows), "eval_dataset": Dataset.from_list(rows)}
    trainer = make_trainer(make_experts, tokenizer, rows, config_kwargs, (1, 1), **datasets)
    args = SFTConfig(completion_only_loss=False, train_sampling_strategy="sequential", **config_kwargs)
    expected = SFTTrainer(make_experts(), args, processing_class=tokenizer, **datasets)
    assert trainer.evaluate()["eval_aux_loss"] == pytest.approx(expected.evaluate()["eval_aux_loss"], rel=1e-6)
    trainer.train()
    expected.train()
    for log, expected_log in zip(trainer.state.log_history[:3], expected.state.log_history[:3], strict=True):
        for key in ("loss", "grad_norm", "aux_loss"):
            assert log[key] == pytest.approx(expected_log[key], rel=1e-5)


def test_divisor_counts_for_models_that_take_no_loss_arguments(head, rows, make_model, tokenizer, config_kwargs):
    model = make_model()
    model.accepts_loss_kwargs = False
    trainer = make_trainer(make_model, tokenizer, rows, config_kwargs, model=model)
    trainer.train()
    loss, _ = formula(make_model().double(), rows[:4], WEIGHTS)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_full_logits_are_never_built_in_training(head, rows, make_model, tokenizer, config_kwargs):
    trainer = make_trainer(make_model, tokenizer, rows, config_kwargs)
    trainer.model.lm_head.forward = lambda hidden_states: pytest.fail("the LM head ran on every position")
    trainer.train()
