"""The algorithm of the paper as a plain training loop of its own, and what follows from its formula."""

import math
import statistics

import pytest
import torch
from datasets import Dataset
from torch.optim import AdamW

from wit_trl import WITSFTTrainer, to_trl_format

from .helpers import make_trainer


STEPS, BATCH, ACCUMULATION, LEARNING_RATE, DECAY = 6, 2, 2, 1e-3, 0.1


class DecaysAll(WITSFTTrainer):
    """As the paper, which decays norms and biases too (docs/reproduce.md)."""

    def get_decay_parameter_names(self, model):
        return [name for name, _ in model.named_parameters()]


@pytest.fixture
def pairs(prompt_completion):
    """Prompts and responses as the original script takes them."""
    return [
        {"prompt": row["prompt"] + " ", "response": row["completion"] + "###eos_token###"}
        for row in prompt_completion.select(range(STEPS * BATCH * ACCUMULATION))
    ]


def original_loop(model, tokenizer, pairs, weights, max_length):
    """The losses of each step. Everything is written out: tokens, shift, divisor, schedule and optimizer."""
    optimizer = AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=DECAY)
    warm_up = math.ceil(0.2 * STEPS)
    losses = []
    for step in range(STEPS):
        numerators, count = [], 0
        rows = pairs[step * BATCH * ACCUMULATION : (step + 1) * BATCH * ACCUMULATION]
        for row in rows:
            prompt = row["prompt"].removesuffix(" ")
            response = row["response"].replace("###eos_token###", tokenizer.eos_token)
            input_ids = tokenizer(prompt + " " + response)["input_ids"][:max_length]
            length = len(tokenizer(prompt)["input_ids"])
            of_tokens = [weights[position >= length] for position in range(len(input_ids))]
            logits = model(torch.tensor([input_ids])).logits[0, :-1]
            log_probs = torch.log_softmax(logits.float(), dim=1)
            targets, of_targets = torch.tensor(input_ids[1:]), torch.tensor(of_tokens[1:])
            nll = -log_probs.gather(1, targets[:, None]).squeeze(1)
            numerators.append((of_targets * nll).sum())
            count += int((of_targets != 0).sum())
        loss = sum(numerators) / count
        if step < warm_up:
            scale = step / warm_up
        else:
            scale = 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (STEPS - warm_up)))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * scale
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("weights", [(0.0, 1.0), (0.4, 0.6), (0.2, 0.8), (1.0, 0.4), (1.0, 0.0)])
def test_trains_as_the_original_algorithm(weights, pairs, make_model, tokenizer, config_kwargs):
    tokenizer.chat_template = None
    config_kwargs |= {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "learning_rate": LEARNING_RATE,
        "weight_decay": DECAY,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.2,
        "max_grad_norm": 0.0,
    }
    data = to_trl_format(Dataset.from_list(pairs), tokenizer)
    model = make_model()
    start = [parameter.detach().clone() for parameter in model.parameters()]
    trainer = make_trainer(
        *(make_model, tokenizer, None, config_kwargs, weights),
        model=model,
        train_dataset=data,
        trainer_class=DecaysAll,
    )
    trainer.train()
    expected = make_model()
    losses = original_loop(expected, tokenizer, pairs, weights, config_kwargs["max_length"])
    logged = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert logged == pytest.approx(losses, rel=1e-6)
    for parameter, other, before in zip(model.parameters(), expected.parameters(), start, strict=True):
        moved = torch.linalg.norm(other - before)
        assert moved > 0
        assert torch.linalg.norm(parameter - other) < 0.01 * moved


def test_only_the_ratio_of_the_weights_matters_unless_gradients_are_clipped(
    prompt_completion, make_model, tokenizer, config_kwargs
):
    """AdamW does not see the scale of a loss, but for its epsilon. A limit does that clips some of the gradients."""
    start = torch.cat([parameter.detach().flatten() for parameter in make_model().parameters()])

    def train(weights, limit):
        model = make_model()
        arguments = config_kwargs | {"max_steps": 8, "max_grad_norm": limit, "adam_epsilon": 1e-30}
        data = {"train_dataset": prompt_completion, "model": model}
        trainer = make_trainer(make_model, tokenizer, None, arguments, weights, **data)
        trainer.train()
        norms = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), norms

    def apart(limit):
        (first, _), (second, norms) = (train(weights, limit) for weights in ((0.2, 0.8), (0.25, 1.0)))
        return (torch.linalg.norm(first - second) / torch.linalg.norm(first - start)).item(), norms

    difference, norms = apart(0.0)
    assert difference < 1e-5
    limit = statistics.median(norms)
    assert min(norms) < limit < max(norms)
    assert apart(limit)[0] > 1000 * difference
