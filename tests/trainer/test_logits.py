"""The logits that are trained are those of the model, also where some tokens are impossible."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from wit_trl.loss.lm_head import check_logits

from ..helpers import make_trainer
from ..reference import formula


@pytest.mark.parametrize("region", [0, 1])
@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 0.0)])
def test_impossible_token_of_weight_zero_leaves_the_other_losses_alone(
    weights, region, head, make_model, tokenizer, rows, config_kwargs
):
    model = make_model()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(500))
    in_region = {token for row in rows for token in tokens_of(row, region)}
    impossible = min(in_region - {token for row in rows for token in tokens_of(row, 1 - region)})
    with torch.no_grad():
        model.lm_head.bias[impossible] = -torch.inf
    trainer = make_trainer(
        make_model, tokenizer, rows, config_kwargs, weights, model=model, eval_dataset=Dataset.from_list(rows)
    )
    metrics = trainer.evaluate()
    _, by_region = formula(model.double(), rows, weights)
    of_other_region = ("eval_prompt_loss", "eval_completion_loss")[1 - region]
    assert metrics[of_other_region] == pytest.approx(by_region[1 - region], rel=1e-5)
    if weights[region] == 0:
        assert metrics["eval_loss"] == pytest.approx(by_region[1 - region], rel=1e-5)


def tokens_of(row, region):
    return [t for t, r in zip(row["input_ids"][1:], row["completion_mask"][1:], strict=True) if r == region]


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "vocab_size": 500,
    "pad_token_id": 0,
    "max_position_embeddings": 66,
}
BERT = {**SIZES, "is_decoder": True}
EXPERTS = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 1}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 500}
OPT = {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32}


def make_causal_lm(model_type, config):
    """A tiny model whose logits are as large as those of a trained one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.5)
    return model


def train(model, make_model, tokenizer, rows, config_kwargs, **arguments):
    arguments = config_kwargs | {"max_steps": 1, "prompt_loss_weight": 1, "completion_loss_weight": 1} | arguments
    data = Dataset.from_list(rows[:4])
    return make_trainer(make_model, tokenizer, rows[:4], arguments, model=model, eval_dataset=data)


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("recurrent_gemma", {**SIZES, "logits_soft_cap": 3.0, "attention_window_size": 16}),
        ("xlstm", {"hidden_size": 64, "num_heads": 2, "num_blocks": 2, "vocab_size": 500}),
        ("modernbert-decoder", {**SIZES, "sep_token_id": 1, "cls_token_id": 1, "eos_token_id": 1, "bos_token_id": 1}),
        ("bert", BERT),
        ("roberta", BERT),
        ("electra", {**BERT, "embedding_size": 32}),
    ],
)
def test_model_whose_logits_are_not_those_of_the_head_is_refused(
    model_type, config, make_model, tokenizer, rows, config_kwargs
):
    model = make_causal_lm(model_type, config)
    trainer = train(model, make_model, tokenizer, rows, config_kwargs)
    message = (
        rf"`{type(model).__name__}` computes its logits in another way .* differ by up to \S+ nats.*`wit_trl.wit_loss`"
    )
    with pytest.raises(ValueError, match=message):
        trainer.train()
    with pytest.raises(ValueError, match=message):
        trainer.evaluate()


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("llama", SIZES),
        ("gemma2", {**SIZES, "final_logit_softcapping": 3.0}),
        ("cohere", {**SIZES, "logit_scale": 0.3}),
        ("granite", {**SIZES, "logits_scaling": 4.0}),
        ("gpt2", GPT2),
        ("opt", OPT),
        ("mixtral", EXPERTS),
        ("granitemoe", {**EXPERTS, "router_aux_loss_coef": 0.0}),
        ("phimoe", {**EXPERTS, "router_aux_loss_coef": 0.0}),
        ("llama4_text", {**EXPERTS, "intermediate_size_mlp": 64, "router_aux_loss_coef": 0.0}),
    ],
)
def test_model_trains_and_evaluates_its_own_logits(model_type, config, make_model, tokenizer, rows, config_kwargs):
    model = make_causal_lm(model_type, config)
    expected = formula(copy.deepcopy(model).eval(), rows[:4], (1, 1))[0].item()
    trainer = train(model, make_model, tokenizer, rows, config_kwargs, learning_rate=0.0)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)
    trainer.train()


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("granitemoe", EXPERTS),
        ("phimoe", EXPERTS),
        ("llama4_text", {**EXPERTS, "intermediate_size_mlp": 64}),
    ],
)
def test_experts_that_trl_does_not_count_are_named(model_type, config, make_model, tokenizer, rows, config_kwargs):
    model = make_causal_lm(model_type, config)
    trainer = train(model, make_model, tokenizer, rows, config_kwargs)
    with pytest.raises(ValueError, match=rf"`{type(model).__name__}` does not run .*set `router_aux_loss_coef=0`"):
        trainer.train()


def test_logits_are_compared_once_and_leave_the_model_alone(make_model, tokenizer, rows, config_kwargs):
    model = make_model(attention_dropout=0.1)
    model.model.layers[0].eval()
    in_training = {name: module.training for name, module in model.named_modules()}
    forwards = []
    model.model.register_forward_hook(lambda module, args, output: forwards.append(output.last_hidden_state.size(1)))
    trainer = train(model, make_model, tokenizer, rows, config_kwargs)
    inputs = trainer.data_collator(rows[:2])
    state = torch.get_rng_state()
    check_logits(model, inputs, "auto")
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == in_training
    assert forwards == [8, 8]
    trainer.train()
    trainer.evaluate()
    assert 8 not in forwards[2:]


def test_tokens_beyond_those_of_the_model_are_refused(make_model, tokenizer, rows, config_kwargs):
    foreign = [{**row, "input_ids": [*row["input_ids"][:-1], 500]} for row in rows]
    trainer = train(make_model(), make_model, tokenizer, foreign, config_kwargs)
    with pytest.raises(ValueError, match=r"the token 500, but `LlamaForCausalLM` has 500 tokens\. Tokenize"):
        trainer.train()
