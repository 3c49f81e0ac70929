"""Training and evaluation on data with images, against plain float64 loops and TRL's own trainer."""

import functools
import re
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from trl import SFTConfig, SFTTrainer
from trl.data_utils import prepare_multimodal_messages
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from wit_trl import DataCollatorForVisionLanguageWIT, cli
from wit_trl.conversation.chat_template import training_chat_template

from ..conftest import DOCUMENTED
from ..helpers import WEIGHTS, StepRecorder, make_trainer
from ..vision_families import FAMILIES, MARKED_VICUNA, make_model, make_processor
from .test_endpoints import losses_and_parameters


pytestmark = pytest.mark.xdist_group("vision_trainer")
# What the template renders for an answer
COMPLETIONS = {
    "llava": " {}</s>",
    "qwen2_5_vl": "{}<|im_end|>\n",
    "idefics3": " {}<end_of_utterance>\n",
    "gemma3": "{}<end_of_turn>\n",
}


@pytest.fixture(scope="module", params=COMPLETIONS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def processor(name):
    return make_processor(name)


def picture(seed):
    height, width = 20 + 7 * seed % 30, 20 + 11 * seed % 30
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def rows(name):
    """Eleven conversations of one or two turns, every third without an image."""
    rows = []
    for i, (function, doc) in enumerate(DOCUMENTED[:11]):
        words = doc.split()
        turns = [("user", f"What does {function} do?"), ("assistant", " ".join(words[: 3 + i]))]
        if i % 2:
            turns += [("user", "And more?"), ("assistant", " ".join(words[3 + i : 6 + 2 * i]))]
        messages = [{"role": role, "content": content} for role, content in turns]
        # The processor of Idefics 3 marks no turns in a batch of unequal numbers of images, so TRL cannot train on it
        has_image = i % 3 or name == "idefics3"
        rows.append({"messages": messages, "images": [picture(i)] if has_image else []})
    return rows


def split(rows):
    return [
        {**{k: v for k, v in row.items() if k != "messages"}, "prompt": row["messages"][:-1]}
        | {"completion": row["messages"][-1:]}
        for row in rows
    ]


def tokenize(name, processor, row):
    """The model inputs of a row, and the region of each token, found by searching the tokens of the answers."""
    messages = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
    text = processor.apply_chat_template(
        prepare_multimodal_messages(messages, images=row["images"]),
        chat_template=training_chat_template(processor) if "messages" in row else None,
        tokenize=False,
    )
    images = [row["images"]] if row["images"] else None
    inputs = processor(text=[text], images=images, return_tensors="pt", add_special_tokens=False)
    input_ids = inputs["input_ids"][0].tolist()
    never = set(processor.tokenizer.convert_tokens_to_ids(FAMILIES[name].placeholders))
    regions = [-100 if token in never else 0 for token in input_ids]
    answers = [message for message in messages if message["role"] == "assistant"]
    for answer in answers if "messages" in row else answers[-1:]:
        text = COMPLETIONS[name].format(answer["content"])
        expected = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        (start,) = (i for i in range(len(input_ids)) if input_ids[i : i + len(expected)] == expected)
        regions[start : start + len(expected)] = [1] * len(expected)
    return inputs, regions


def region_sums(model, name, processor, rows):
    """Negative log-likelihoods (differentiable) and token counts of both regions, one row at a time."""
    sums, counts = [0.0, 0.0], [0, 0]
    for row in rows:
        inputs, regions = tokenize(name, processor, row)
        log_probs = torch.log_softmax(model(**inputs.to(model.dtype)).logits[0], dim=1)
        for t in range(1, len(regions)):
            if regions[t] != -100:
                sums[regions[t]] = sums[regions[t]] - log_probs[t - 1, inputs["input_ids"][0, t]]
                counts[regions[t]] += 1
    return sums, counts


def formula(model, name, processor, rows, weights):
    sums, counts = region_sums(model, name, processor, rows)
    count = sum(n for n, weight in zip(counts, weights, strict=True) if weight != 0)
    loss = sum(weight * s for weight, s in zip(weights, sums, strict=True)) / count
    return loss, [s.item() / n for s, n in zip(sums, counts, strict=True)]


def make_vision_trainer(name, processor, rows, config_kwargs, weights=WEIGHTS, **kwargs):
    """Returns a trainer of the family's model, with its processor in the place of a tokenizer."""
    make_family = functools.partial(make_model, name, processor)
    return make_trainer(make_family, processor, rows, config_kwargs, weights, **kwargs)


@pytest.fixture
def config_kwargs(config_kwargs):
    return config_kwargs | {"max_length": None}


@pytest.mark.parametrize("weights", [WEIGHTS, (0.0, 0.5)])
@pytest.mark.parametrize("kind", ["messages", "prompt_completion"])
def test_step_equals_the_formula(head, kind, weights, name, processor, rows, config_kwargs):
    # Eleven rows: the second step accumulates three, in two micro-batches
    config_kwargs |= {"gradient_accumulation_steps": 4, "max_steps": -1, "num_train_epochs": 1, "max_grad_norm": 0.0}
    rows = rows if kind == "messages" else split(rows)
    recorder = StepRecorder()
    trainer = make_vision_trainer(name, processor, rows, config_kwargs, weights, callbacks=[recorder])
    trainer.train()
    assert len(recorder.gradients) == 2

    reference = make_model(name, processor).double()
    loss, (prompt_loss, completion_loss) = formula(reference, name, processor, rows[:8], weights)
    loss.backward()
    assert recorder.logs[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert recorder.logs[0]["completion_loss"] == pytest.approx(completion_loss, rel=1e-5)
    assert recorder.logs[0].get("prompt_loss") == (pytest.approx(prompt_loss, rel=1e-5) if weights[0] else None)
    expected = {n: p.grad.float() for n, p in reference.named_parameters() if p.grad is not None}
    assert any("vis" in parameter for parameter in expected)  # also through the images
    torch.testing.assert_close(recorder.gradients[0], expected, rtol=1e-3, atol=1e-6)


@dataclass
class WithoutPlaceholders(DataCollatorForVisionLanguageModeling):
    """TRL's collator, with labels of -100 where a token stands for an image."""

    placeholders: tuple[int, ...] = ()

    def torch_call(self, examples):
        batch = super().torch_call(examples)
        batch["labels"][torch.isin(batch["input_ids"], torch.tensor(self.placeholders))] = -100
        return batch


@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("kind", ["messages", "prompt_completion", "text"])
def test_endpoints_equal_trl(kind, weights, name, processor, rows, config_kwargs):
    placeholders = FAMILIES[name].placeholders
    if kind == "prompt_completion":
        rows = split(rows)
    elif kind == "text":
        image = processor.image_token
        rows = [{"text": image * len(r["images"]) + r["messages"][1]["content"], "images": r["images"]} for r in rows]
    config_kwargs |= {"optim": "sgd", "learning_rate": 0.1}  # Adam amplifies what is zero but for rounding
    completion_only = weights == (0.0, 1.0)
    # TRL does not find the assistant's turns of LLaVA's own template
    template = MARKED_VICUNA if name == "llava" else training_chat_template(processor)
    collator = WithoutPlaceholders(
        processor,
        completion_only_loss=kind == "prompt_completion" and completion_only,
        assistant_only_loss=kind == "messages" and completion_only,
        chat_template=template if kind == "messages" else None,
        placeholders=tuple(processor.tokenizer.convert_tokens_to_ids(placeholders)),
    )
    expected = SFTTrainer(
        model=make_model(name, processor),
        args=SFTConfig(
            **config_kwargs,
            remove_unused_columns=kind != "text",  # TRL would remove the text
        ),
        data_collator=collator,
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
    )
    # For models that say that they take no `num_items_in_batch`, TRL takes the mean of the means of the micro-batches
    expected.model_accepts_loss_kwargs = True
    trainer = make_vision_trainer(
        name,
        processor,
        rows,
        {**config_kwargs, "train_sampling_strategy": expected.args.train_sampling_strategy},
        weights,
    )
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    losses, parameters = losses_and_parameters(trainer)
    expected_losses, expected_parameters = losses_and_parameters(expected)
    assert len(losses) == 3
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    torch.testing.assert_close(parameters, expected_parameters, rtol=1e-5, atol=1e-6)
    assert sum(p.equal(start) for p, start in zip(parameters, before, strict=True)) < len(before) / 2


@pytest.mark.parametrize("kind", ["messages", "prompt_completion"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_evaluation_is_exact_whatever_the_batch_size(kind, batch_size, name, processor, rows, config_kwargs):
    rows = rows if kind == "messages" else split(rows)
    config_kwargs["per_device_eval_batch_size"] = batch_size
    trainer = make_vision_trainer(name, processor, rows[:1], config_kwargs, eval_dataset=Dataset.from_list(rows))
    metrics = trainer.evaluate()
    loss, (prompt_loss, completion_loss) = formula(make_model(name, processor).double(), name, processor, rows, WEIGHTS)
    assert metrics["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["eval_prompt_loss"] == pytest.approx(prompt_loss, rel=1e-5)
    assert metrics["eval_completion_loss"] == pytest.approx(completion_loss, rel=1e-5)


@pytest.fixture(scope="module")
def llava():
    return make_processor("llava")


@pytest.fixture(scope="module")
def llava_rows():
    texts = [("What is it?", "A test of images."), ("And this?", "Return nothing."), ("Why?", "It is a longer answer.")]
    return [
        {
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            "images": [picture(i)],
        }
        for i, (question, answer) in enumerate(texts)
    ]


def first_loss(trainer):
    trainer.train()
    return trainer.state.log_history[0]["loss"]


def test_weights_of_rows_and_messages_multiply_terms_and_zero_leaves_them_out(llava, llava_rows, config_kwargs):
    config_kwargs |= {"max_steps": 1, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 1}
    weighted = [{**row, "weight": weight} for row, weight in zip(llava_rows, (2.5, 0.0, 1.0), strict=True)]
    weighted[2] = {**weighted[2], "messages": [dict(message) for message in weighted[2]["messages"]]}
    weighted[2]["messages"][0]["weight"], weighted[2]["messages"][1]["weight"] = 0.0, 0.5
    loss = first_loss(make_vision_trainer("llava", llava, weighted, config_kwargs))

    model = make_model("llava", llava).double()
    (prompt, completion), (num_prompt, num_completion) = region_sums(model, "llava", llava, llava_rows[:1])
    numerator, divisor = 2.5 * (0.2 * prompt + 0.8 * completion), num_prompt + num_completion
    inputs, regions = tokenize("llava", llava, llava_rows[2])
    log_probs = torch.log_softmax(model(**inputs.to(model.dtype)).logits[0], dim=1)
    # The header belongs to the answer's turn
    start = llava(text="USER: <image>\nWhy? ", images=llava_rows[2]["images"], add_special_tokens=False)
    for t in range(len(start["input_ids"][0]), len(regions)):
        numerator = numerator - 0.5 * WEIGHTS[regions[t]] * log_probs[t - 1, inputs["input_ids"][0, t]]
        divisor += 1
    assert loss == pytest.approx((numerator / divisor).item(), rel=1e-5)


@pytest.mark.parametrize("wrong", [{"weight": -1.0}, {"messages": [{"role": "user", "content": "What?"}]}])
def test_wrong_row_is_refused_before_the_training(wrong, llava, llava_rows, config_kwargs):
    rows = [{"weight": 1.0, **row} for row in llava_rows]
    rows[2] |= wrong
    with pytest.raises(
        ValueError, match=r"^Row 2 of the train dataset: (`weight` is -1.0|`messages` has no assistant)"
    ):
        make_vision_trainer("llava", llava, rows, config_kwargs)


def test_role_that_no_turn_with_images_has_is_told(llava, llava_rows, config_kwargs, caplog):
    make_vision_trainer("llava", llava, llava_rows, config_kwargs | {"role_loss_weights": {"sytem": 0.5}})
    assert "names ['sytem'], but the first 1,000 rows of the train dataset have only" in caplog.text


def test_stream_trains_as_the_data_set_does(llava, llava_rows, config_kwargs):
    kwargs = config_kwargs | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3, "max_steps": 2}
    dataset = Dataset.from_list([{**row, "weight": 1.5} for row in llava_rows])
    stream = make_vision_trainer("llava", llava, dataset.to_iterable_dataset(), kwargs, eval_dataset=dataset)
    expected = make_vision_trainer("llava", llava, dataset, kwargs)
    losses, parameters = losses_and_parameters(stream)
    expected_losses, expected_parameters = losses_and_parameters(expected)
    assert losses == expected_losses
    torch.testing.assert_close(parameters, expected_parameters)


def test_lora_trains_only_the_adapter(head, name, processor, rows, config_kwargs):
    lora = LoraConfig(target_modules=r".*language_model.*\.(q_proj|v_proj)" if name != "idefics3" else ["q_proj"])
    trainer = make_vision_trainer(name, processor, rows, config_kwargs | {"learning_rate": 0.1}, peft_config=lora)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    loss = first_loss(trainer)
    expected, _ = formula(make_model(name, processor).double(), name, processor, rows[:4], WEIGHTS)
    changed = {n for n, p in trainer.model.named_parameters() if not p.equal(before[n])}
    assert changed
    assert all("lora" in n for n in changed)
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_training_set_without_a_target_is_refused(llava, llava_rows, config_kwargs):
    with pytest.raises(ValueError, match=r"No example of the train dataset has a token left to train on"):
        make_vision_trainer("llava", llava, [{**row, "weight": 0} for row in llava_rows], config_kwargs)
    # One is enough
    make_vision_trainer("llava", llava, [{**row, "weight": i} for i, row in enumerate(llava_rows)], config_kwargs)


def test_image_cut_off_by_max_length_is_refused(llava, llava_rows, config_kwargs):
    config_kwargs["max_length"] = 10
    with pytest.raises(ValueError, match=r"increase `max_length`"):
        make_vision_trainer("llava", llava, llava_rows, config_kwargs)
    trainer = make_vision_trainer(
        "llava", llava, split(llava_rows), config_kwargs, (0.2, 0.0)
    )  # no completion is left either
    with pytest.raises(ValueError, match=r"`max_length=10` cuts off tokens of an image"):
        trainer.train()


def test_completion_cut_off_by_max_length_is_no_target(llava, llava_rows, config_kwargs):
    rows = split(llava_rows)
    config_kwargs["max_length"] = 40
    rows[0]["prompt"] = [{"role": "user", "content": "What is it? " * 20}]
    trainer = make_vision_trainer("llava", llava, rows, config_kwargs, (0.0, 1.0))
    batch = trainer.data_collator(rows)
    assert (batch["labels"] != -100).any(1).tolist() == [False, True, True]
    trainer.train()


def test_collator_that_contradicts_the_weights_is_refused(llava, llava_rows, config_kwargs):
    collator = DataCollatorForVisionLanguageWIT(llava)
    with pytest.raises(ValueError, match=r"The weights of the `DataCollatorForVisionLanguageWIT` contradict those"):
        make_vision_trainer("llava", llava, llava_rows, config_kwargs, (0.5, 1.0), data_collator=collator)
    make_vision_trainer("llava", llava, llava_rows, config_kwargs, data_collator=collator).train()


def test_first_wrong_example_is_named_before_training(llava, llava_rows, config_kwargs):
    rows = [{**row, "messages": row["messages"][:1]} for row in llava_rows]
    with pytest.raises(ValueError, match=r"Row 0 of the train dataset: `messages` has no assistant turn"):
        make_vision_trainer("llava", llava, rows, config_kwargs)


@pytest.mark.parametrize("size", ["sp_size", "cp_size"])
def test_images_where_sequences_are_split_are_refused(size, in_parallel, llava, llava_rows, config_kwargs):
    in_parallel(**{size: 2})
    with pytest.raises(
        ValueError, match=r"Data with images is not supported under sequence or context.* Set `sp_size`"
    ):
        make_vision_trainer("llava", llava, llava_rows, config_kwargs)


def test_training_starts_with_the_table(llava, llava_rows, config_kwargs, capsys):
    rows = [{**row, "weight": 0.5 * (i + 1)} for i, row in enumerate(llava_rows)]
    trainer = make_vision_trainer("llava", llava, rows, config_kwargs | {"max_steps": 1, "max_length": 40})
    trainer.train()
    output = capsys.readouterr().out
    batches = [trainer.data_collator([row]) for row in rows]
    for region, name in {0: "prompt", 1: "completion", -100: "never a target"}.items():
        count = sum(int((batch["completion_mask"] == region).sum()) for batch in batches)
        assert re.search(rf"{name} +[\d.]+ +{count} ", output), name
    assert "What is weighted in 3 rows" in output
    assert re.search(r"weights in the data +0\.5 to 1\.5", output)


def test_rows_of_a_larger_set_are_counted_in_part(llava, llava_rows, config_kwargs, monkeypatch, capsys):
    monkeypatch.setattr("wit_trl.trainer.IMAGE_ROWS", 2)
    make_vision_trainer("llava", llava, llava_rows, config_kwargs | {"max_steps": 1}).train()
    assert "What is weighted in the first 2 rows" in capsys.readouterr().out


def test_inspect_shows_the_images_as_one(llava, llava_rows, tmp_path, monkeypatch, capsys):
    make_model("llava", llava).save_pretrained(tmp_path / "model")
    llava.save_pretrained(tmp_path / "model")
    Dataset.from_list(llava_rows).to_parquet(tmp_path / "data.parquet")
    arguments = ["--model_name_or_path", tmp_path / "model", "--dataset_name", tmp_path / "data.parquet", "--rows", 1]
    monkeypatch.setattr("sys.argv", ["wit-trl", "inspect", *map(str, [*arguments, "--max_length", 200])])
    cli.main()
    output = capsys.readouterr().out
    images = llava(text="<image>", images=[picture(0)])["input_ids"][0].count(llava.image_token_id)
    assert f"[never a target 0]<image> x {images} " in output
    assert "[completion 0.8] A test of images.</s>" in output
    assert "What is weighted in 3 rows" in output


def test_inspect_shows_the_changed_rows_of_images(llava, llava_rows, tmp_path, monkeypatch, capsys):
    make_model("llava", llava).save_pretrained(tmp_path / "model")
    llava.save_pretrained(tmp_path / "model")
    plain, *others = llava_rows
    weighted, twice = ({**row, "messages": [dict(turn) for turn in row["messages"]]} for row in others)
    weighted["messages"][0]["weight"] = 0.5
    twice["messages"] *= 2
    Dataset.from_list([plain, weighted, twice]).to_parquet(tmp_path / "data.parquet")
    arguments = ["--model_name_or_path", tmp_path / "model", "--dataset_name", tmp_path / "data.parquet"]
    for settings, shown in {(): [1], ("--completion_turns", "last"): [1, 2]}.items():
        monkeypatch.setattr("sys.argv", ["wit-trl", "inspect", *map(str, arguments), "--only", "changed", *settings])
        cli.main()
        output = capsys.readouterr().out
        assert re.findall(r"^Row (\d+):", output, re.MULTILINE) == [*map(str, shown)]
        assert f"changed rows: {len(shown)} of the 3 searched" in output


def test_every_process_counts_a_share_of_the_rows(llava, llava_rows, config_kwargs, monkeypatch):
    trainer = make_vision_trainer("llava", llava, llava_rows, config_kwargs)
    whole = trainer.data_collator.tokenize_first_rows(llava_rows, 100)
    shares = []
    for rank in (0, 1):
        state = SimpleNamespace(process_index=rank, num_processes=2)
        monkeypatch.setattr("wit_trl.data.vision_collator.PartialState", lambda state=state: state)
        shares.append(trainer.data_collator.tokenize_first_rows(llava_rows, 100))
    assert shares == [whole[0::2], whole[1::2]]


def test_what_fails_on_one_process_fails_on_all(llava, llava_rows, config_kwargs, monkeypatch):
    trainer = make_vision_trainer("llava", llava, llava_rows, config_kwargs)
    elsewhere = [ValueError("wrong on another process")]
    monkeypatch.setattr("wit_trl.data.vision_collator.gather_object", lambda rows: rows + elsewhere)
    with pytest.raises(ValueError, match="wrong on another process"):
        trainer.weight_report()


def test_no_completion_left_is_refused_with_images(llava, llava_rows, config_kwargs):
    question = {"role": "user", "content": "Long? " * 50}
    rows = [{"messages": [question, *row["messages"][1:]], "images": []} for row in llava_rows]
    config_kwargs |= {"max_length": 16}
    with pytest.raises(ValueError, match=r"No example .* left to train on in its completion.* `max_length` is 16"):
        make_vision_trainer("llava", llava, rows, config_kwargs)
    make_vision_trainer("llava", llava, rows, config_kwargs, (0.2, 0.0))
