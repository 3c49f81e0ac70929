"""What the trainer refuses or warns of, and the remedy that it names."""

import inspect
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from datasets import Dataset, IterableDataset
from peft import PromptTuningConfig
from transformers import T5Config, T5ForConditionalGeneration
from trl import SFTConfig

from wit_trl import DataCollatorForWIT, WITSFTTrainer
from wit_trl.conversation.turns import Conversation
from wit_trl.data.preparation import DataPreparation

from ..helpers import make_trainer
from .test_step import long_prompts


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


def test_weights_of_the_collator_that_are_changed_later_are_refused(rows, make_model, tokenizer, config_kwargs):
    trainer = make_trainer(make_model, tokenizer, rows, config_kwargs, eval_dataset=Dataset.from_list(rows))
    trainer.data_collator.prompt_loss_weight = 0.9
    for function in (trainer.train, trainer.evaluate, trainer.weight_report, trainer.create_model_card):
        with pytest.raises(ValueError, match=r"contradict those of the `WITSFTConfig`.* make a new trainer"):
            function()


def test_arguments_with_fields_of_their_own_are_refused(rows, make_model, tokenizer, config_kwargs):
    @dataclass
    class OwnConfig(SFTConfig):
        own: int = 1

    with pytest.raises(
        ValueError, match=r"`args` is a `OwnConfig` with fields of its own, \['own'\]\. Make it a subclass"
    ):
        WITSFTTrainer(make_model(), OwnConfig(**config_kwargs), train_dataset=Dataset.from_list(rows))


def test_encoder_decoder_is_refused(rows, tokenizer, config_kwargs):
    config = T5Config(vocab_size=500, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="`T5ForConditionalGeneration` is an encoder-decoder"):
        make_trainer(None, tokenizer, rows, config_kwargs, model=T5ForConditionalGeneration(config))


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
