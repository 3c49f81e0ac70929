"""The loss on the model and the first rows of a user: against the model's own logits, and against `SFTTrainer`."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer, maybe_convert_to_chatml

from ..config import LOSS_SETTINGS, WITSFTConfig
from ..conversation.messages import SHAREGPT_ROLES
from ..data.columns import MESSAGE_COLUMNS
from ..loss.functions import wit_loss
from ..trainer import WITSFTTrainer
from ..training.attributes import set_for_now
from .checks import NO_MEMORY, TRAINING_LIMIT, Check, compare
from .kernels import LIMITS
from .trainers import ENDPOINTS


# In 16 bits a gradient is rounded in each layer. Ten times what SmolLM2-135M showed in bfloat16
_GRADIENT_LIMITS = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
# What leaves the model as it is, and the loss of a step to the weights alone
_ONE_STEP: dict[str, Any] = {
    **{name: WITSFTConfig.__dataclass_fields__[name].default for name in LOSS_SETTINGS},
    "completion_only_loss": None,
    "neftune_noise_alpha": None,
    "max_steps": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0.0,
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "train_sampling_strategy": "sequential",
    "shuffle_dataset": False,
    "dataloader_drop_last": False,
    "logging_strategy": "steps",
    "logging_steps": 1,
    "report_to": "none",
    "print_weight_report": False,
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "disable_tqdm": True,
    "model_init_kwargs": None,
    "chat_template_path": None,  # model and tokenizer are made
}


@torch.no_grad()
def check_loss(trainer: WITSFTTrainer) -> Check:
    """Compares the loss of the first micro-batch with that of the model's own logits."""
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    inputs = trainer._prepare_inputs(inputs)
    ignored = ("labels", "token_weights", "completion_mask", "example_lengths")

    def measure():
        divisor = trainer.loss_divisor(inputs["token_weights"], None)
        with trainer.compute_loss_context_manager(), set_for_now(trainer, aux_loss_enabled=False):
            logits = trainer.model(**{name: x for name, x in inputs.items() if name not in ignored}).logits
            # In float64, since `cross_entropy` sums up a row of float32 to four digits alone; row by row, which is less
            rows = zip(logits.split(1), inputs["labels"].split(1), inputs["token_weights"].split(1), strict=True)
            expected = sum(wit_loss(z.double(), labels, weights, divisor) for z, labels, weights in rows)
            return ((trainer.compute_loss(trainer.model, inputs) - expected) / expected).abs().item()

    remedy = "The fused head scores the tokens of this model otherwise than its logits do. Report it with the model."
    name = f"loss of {int((inputs['labels'] != -100).sum())} tokens of the data"
    return compare(name, LIMITS.get(_dtype(trainer), TRAINING_LIMIT), remedy, measure)


def _dtype(trainer: SFTTrainer) -> torch.dtype:
    """Returns the data type that the model computes in."""
    return torch.bfloat16 if trainer.args.bf16 else torch.float16 if trainer.args.fp16 else trainer.model.dtype


class _Step(TrainerCallback):
    """Keeps the gradients of a step, and has dropout drop the same."""

    def on_step_begin(self, args, state, control, **kwargs):
        torch.manual_seed(0)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = [x.grad.detach().cpu() for x in model.parameters() if x.grad is not None]


def _step(trainer: SFTTrainer) -> tuple[float, list[torch.Tensor]]:
    """Returns loss and gradients of the first step of a training that changes nothing."""
    step = _Step()
    trainer.add_callback(step)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.state.log_history[0]["loss"], step.gradients


def _difference(gradients: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Returns the norm of the difference over the norm."""
    pairs = [(a.double(), b.double()) for a, b in zip(gradients, expected, strict=True)]
    differences, norms = zip(*((torch.linalg.norm(a - b), torch.linalg.norm(b)) for a, b in pairs), strict=True)
    return math.hypot(*differences) / math.hypot(*norms)


def _as_in_trl(rows: Dataset, trains_all: bool) -> tuple[Dataset, dict[str, Any]]:
    """Returns what `SFTTrainer` trains rows with: the whole sequences, or the completion region alone."""
    columns = set(rows.column_names)
    if "input_ids" in columns:
        rows = rows.select_columns(["input_ids"]) if trains_all else rows
        return rows, {"completion_only_loss": not trains_all and "completion_mask" in columns}
    if "conversations" in columns:  # whose roles TRL does not know
        found = [maybe_convert_to_chatml(row)["messages"] for row in rows]
        messages = [[{**turn, "role": SHAREGPT_ROLES.get(turn["role"], turn["role"])} for turn in x] for x in found]
        rows = Dataset.from_dict({"messages": messages})
    return rows, {
        "completion_only_loss": not trains_all and "completion" in columns,
        "assistant_only_loss": not trains_all and not columns.isdisjoint(MESSAGE_COLUMNS),
    }


def _endpoint(trainer: WITSFTTrainer, rows: Dataset, weights: tuple[float, float]) -> list[Check]:
    """Compares loss and gradients of a step on rows with those of `SFTTrainer`, on the same model."""
    prompt, completion = weights
    name = f"({prompt:g}, {completion:g}) as SFTTrainer, "
    args = dataclasses.replace(
        trainer.args,
        **_ONE_STEP | {"prompt_loss_weight": prompt, "completion_loss_weight": completion},
        per_device_train_batch_size=len(rows),
        assistant_only_loss=trainer.args.assistant_only_loss and prompt == 0,
    )
    fields = {field.name: getattr(args, field.name) for field in dataclasses.fields(SFTConfig) if field.init}
    rows_of_trl, of_trl = _as_in_trl(rows, trains_all=prompt == 1)
    try:
        expected = SFTTrainer(
            trainer.model,
            SFTConfig(**fields | of_trl),
            train_dataset=rows_of_trl,
            processing_class=trainer.processing_class,
        )
    except Exception as error:  # whatever TRL raises on rows that it does not know
        reason = f"TRL does not train these rows: {type(error).__name__}: {error}"
        if of_trl.get("assistant_only_loss"):
            reason = "TRL cannot mark the answers of this template."
        return [Check(f"{name}the data", math.nan, 0.0, "", skipped=reason)]
    found = WITSFTTrainer(trainer.model, args, train_dataset=rows, processing_class=trainer.processing_class)

    batch, batch_of_trl = (next(iter(x.get_train_dataloader())) for x in (found, expected))
    regions = batch["completion_mask"]
    difference: str | None = None
    if not torch.equal(batch["input_ids"], batch_of_trl["input_ids"]):
        difference = "TRL's template for training makes other tokens."
    elif not torch.equal(batch["token_weights"], ((regions == 1) | (regions == 0) & (prompt == 1)).float()):
        difference = "The rows have weights of their own, which TRL does not know."
    name += f"{{}} of {int((batch['labels'] != -100).sum())} tokens of the data"
    if difference is not None:
        return [Check(name.format("step"), math.nan, 0.0, "", skipped=difference)]
    steps = functools.cache(lambda: (_step(found), _step(expected)))

    def loss() -> float:
        (a, _), (b, _) = steps()
        return abs(a - b) / abs(b)

    dtype = _dtype(trainer)
    remedy = "A step differs from that of `SFTTrainer`. `wit-trl inspect` shows which tokens have a weight. "
    remedy += "If they are right, set another `fused_head`."
    return [
        compare(name.format("loss"), LIMITS.get(dtype, TRAINING_LIMIT), remedy, loss),
        compare(
            name.format("gradient"),
            _GRADIENT_LIMITS.get(dtype, TRAINING_LIMIT),
            remedy,
            lambda: _difference(*(gradients for _, gradients in steps())),
        ),
    ]


def check_endpoints(trainer: WITSFTTrainer, rows: Dataset) -> Iterator[Check]:
    """Compares a step at (0, 1) and at (1, 1) with that of `SFTTrainer`, on as many of the rows as fit."""
    for weights in ENDPOINTS:
        count = len(rows)
        checks = _endpoint(trainer, rows, weights)
        while count > 1 and any(check.skipped == NO_MEMORY for check in checks):
            count //= 2
            checks = _endpoint(trainer, rows.select(range(count)), weights)
        yield from checks
