"""The training step against the formula, written as plain float64 loops."""

import threading

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MixtralConfig, MixtralForCausalLM
from trl import SFTConfig, SFTTrainer

from wit_trl import DataCollatorForWIT
from wit_trl.loss.lm_head import check_logits

from ..helpers import WEIGHTS, StepRecorder, make_trainer
from ..reference import formula


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
    check_logits(trainer.model, batch, "auto")  # once in a training
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


@pytest.mark.parametrize(("asked", "multiple"), [(None, 4), (6, 12)])
@pytest.mark.parametrize("sizes", [{"sp_size": 4}, {"cp_size": 2}])  # context parallelism gives a rank two parts
def test_every_rank_of_a_sequence_gets_as_many_tokens(
    sizes, asked, multiple, in_parallel, rows, make_model, tokenizer, config_kwargs
):
    in_parallel(**sizes)
    trainer = make_trainer(make_model, tokenizer, rows, config_kwargs | {"pad_to_multiple_of": asked})
    batch = trainer.data_collator(rows[:2])
    assert {batch[name].size(1) % multiple for name in ("input_ids", "token_weights", "completion_mask")} == {0}


def test_torch_format_trains_as_lists_do(rows, make_model, tokenizer, config_kwargs):
    losses = []
    for dataset in (Dataset.from_list(rows), Dataset.from_list(rows).with_format("torch")):
        trainer = make_trainer(make_model, tokenizer, None, config_kwargs, train_dataset=dataset)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == losses[1]


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
    check_logits(trainer.model, trainer.data_collator(rows[:2]), "auto")  # of a few tokens it builds them
    trainer.model.lm_head.forward = lambda hidden_states: pytest.fail("the LM head ran on every position")
    trainer.train()
