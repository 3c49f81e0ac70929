"""LoRA, DoRA, prompt learning, `modules_to_save` and 4-bit QLoRA: the weights follow the tokens."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from datasets import Dataset
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from wit_trl import WITSFTConfig, WITSFTTrainer

from ..reference import formula, tokenize


METHODS = {
    "lora": LoraConfig(r=4, task_type="CAUSAL_LM"),
    "dora": LoraConfig(r=4, use_dora=True, task_type="CAUSAL_LM"),
    "lora_modules_to_save": LoraConfig(r=4, modules_to_save=["lm_head", "embed_tokens"], task_type="CAUSAL_LM"),
    "prompt_tuning": PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "p_tuning": PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=16, task_type="CAUSAL_LM"),
    "prefix_tuning": PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
}


@pytest.fixture
def rows(prompt_completion, tokenizer):
    return [tokenize(tokenizer, row) for row in prompt_completion.select(range(8))]


@pytest.fixture
def train(rows, tokenizer, config_kwargs):
    """A function that trains for three steps and returns the trainer and its parameters before the first."""

    def train(model, **kwargs):
        trainer = WITSFTTrainer(
            model,
            WITSFTConfig(
                **config_kwargs | {"max_length": None, "learning_rate": 1e-2}, train_sampling_strategy="sequential"
            ),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            **kwargs,
        )
        start = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
        (prompt_loss, completion_loss), (prompt, completion) = region_losses(trainer, rows[:4])
        trainer.train()
        expected = (0.2 * prompt_loss * prompt + 0.8 * completion_loss * completion) / (prompt + completion)
        assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)
        return trainer, start

    return train


def region_losses(trainer, rows):
    """The mean negative log-likelihood and the number of tokens of prompt and completion: one row at a time, from the
    full logits of the model as PEFT runs it."""
    sums, counts = [0.0, 0.0], [0, 0]
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logits = trainer.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        log_probs = torch.log_softmax(logits[-ids.size(1) :].double(), dim=1)  # virtual tokens come first
        for t in range(1, ids.size(1)):
            sums[row["completion_mask"][t]] -= log_probs[t - 1, row["input_ids"][t]].item()
            counts[row["completion_mask"][t]] += 1
    return [s / n for s, n in zip(sums, counts, strict=True)], counts


@pytest.mark.parametrize("method", METHODS)
def test_weights_follow_the_tokens(head, method, train, make_model):
    trainer, start = train(make_model(), peft_config=METHODS[method])
    trained = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, start[name])}
    assert trained
    assert trained <= {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    if method == "lora_modules_to_save":
        assert any("lm_head.modules_to_save" in name for name in trained)
    # The first real token follows the virtual ones, yet has no weight, as the first of every document
    metrics = trainer.evaluate()
    (prompt_loss, completion_loss), _ = region_losses(trainer, trainer.eval_dataset)
    assert metrics["eval_prompt_loss"] == pytest.approx(prompt_loss, rel=1e-5)
    assert metrics["eval_completion_loss"] == pytest.approx(completion_loss, rel=1e-5)


def test_untrained_lora_has_the_loss_of_its_base(train, make_model, rows):
    trainer, _ = train(make_model(), peft_config=METHODS["lora"])
    loss, _ = formula(make_model().double(), rows[:4], (0.2, 0.8))
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_qlora_in_four_bits_on_cpu(train, make_model, tmp_path):
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    trainer, start = train(
        str(tmp_path / "base"),
        quantization_config=quantization,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    assert trainer.model.is_loaded_in_4bit
    base = trainer.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    assert base.quant_state.quant_type == "nf4"
    for name, parameter in trainer.model.named_parameters():
        assert parameter.requires_grad == ("lora" in name)
        if "lora_B" in name:
            assert not torch.equal(parameter, start[name]), name


# 8-bit layers round their inputs too, by row of the batch
@pytest.mark.parametrize(("bits", "tolerance"), [(4, 1e-5), (8, 1e-2)])
def test_quantized_head_trains_as_the_model_computes_it(
    bits, tolerance, head, rows, make_model, tokenizer, config_kwargs, tmp_path
):
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    load = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32} if bits == 4 else {"load_in_8bit": True}
    quantization = BitsAndBytesConfig(**load, llm_int8_skip_modules=["none"])
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantization)
    assert type(quantized.lm_head) is (Linear4bit if bits == 4 else Linear8bitLt)
    expected, _ = formula(quantized, rows[:4], (0.2, 0.8))
    trainer = WITSFTTrainer(
        str(tmp_path / "base"),
        WITSFTConfig(**config_kwargs | {"max_length": None}, train_sampling_strategy="sequential"),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        quantization_config=quantization,
        peft_config=METHODS["lora"],
    )
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(expected.item(), rel=tolerance)
    assert first["grad_norm"] > 0


def test_adapter_on_the_head_is_refused(train, make_model):
    with pytest.raises(ValueError, match="Remove `'lm_head'` from your `target_modules`"):
        train(make_model(), peft_config=LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))


def test_evaluation_leaves_qlora_its_gradient(make_model, rows, tokenizer, config_kwargs, tmp_path):
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    gradient_norms = []
    for eval_on_start in (False, True):
        trainer = WITSFTTrainer(
            str(tmp_path / "base"),
            WITSFTConfig(
                **config_kwargs | {"learning_rate": 1e-2, "max_steps": 1},
                eval_strategy="steps",
                eval_on_start=eval_on_start,
            ),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
            peft_config=METHODS["lora"],
        )
        trainer.train()
        gradient_norms += [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
    without_evaluation, with_evaluation = gradient_norms
    assert with_evaluation == pytest.approx(without_evaluation, rel=1e-6)


def test_saved_adapter_loads_onto_its_base(train, make_model, tmp_path):
    trainer, _ = train(make_model(), peft_config=METHODS["lora"])
    trainer.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make_model(), tmp_path / "adapter")
    ids = torch.arange(5, 15)[None]
    torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits)


def test_adapter_on_embeddings_that_the_head_shares_is_refused(train, make_model):
    model = make_model(tie_word_embeddings=True)
    peft_config = LoraConfig(
        target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 4]}, task_type="CAUSAL_LM"
    )
    with pytest.raises(ValueError, match=r"`trainable_token_indices` is not supported .* shares the weight"):
        train(model, peft_config=peft_config)


def test_template_that_adds_tokens_with_lora_is_refused_for_a_tied_head(
    make_model, rows, tokenizer, config_kwargs, tmp_path
):
    tokenizer.save_pretrained(tmp_path / "chat")
    chat = AutoTokenizer.from_pretrained(tmp_path / "chat")
    chat.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    chat.save_pretrained(tmp_path / "chat")
    for tied in (True, False):
        arguments = {
            "model": make_model(tie_word_embeddings=tied),
            "args": WITSFTConfig(**config_kwargs, chat_template_path=str(tmp_path / "chat")),
            "train_dataset": Dataset.from_list(rows),
            "processing_class": tokenizer,
            "peft_config": LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
        }
        if tied:
            with pytest.raises(ValueError, match="`trainable_token_indices` is not supported"):
                WITSFTTrainer(**arguments)
        else:
            WITSFTTrainer(**arguments).train()
