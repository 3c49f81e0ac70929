"""
Draws when the scale of the weights matters, and when their ratio alone does: how far the trainings with (0.2, 0.8) and
(0.25, 1) are apart, with AdamW, without and with a limit to the norm of the gradient.

python examples/which_weights/scale.py scale.png
"""

import sys
import tempfile

import torch
from matplotlib.figure import Figure
from transformers import LlamaForCausalLM, TrainerCallback

from wit_trl import WITSFTConfig, WITSFTTrainer
from wit_trl.embedded import embedded_config, load_stdlib_functions, train_embedded_tokenizer


PAIRS = ((0.2, 0.8), (0.25, 1.0))
LIMITS = {0.0: "no clipping", 1.0: "max_grad_norm = 1"}
STEPS = 60


class ParameterRecorder(TrainerCallback):
    """Keeps all parameters as one vector, before training and after each step."""

    def __init__(self):
        self.steps = []

    def record(self, args, state, control, model=None, **kwargs):
        self.steps.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))

    on_train_begin = on_step_end = record


def train(weights: tuple[float, float], limit: float) -> list[torch.Tensor]:
    """Returns the parameters after each step of a training of the embedded default."""
    dataset = load_stdlib_functions()
    tokenizer = train_embedded_tokenizer(dataset)
    torch.manual_seed(0)
    recorder = ParameterRecorder()
    args = WITSFTConfig(
        tempfile.mkdtemp(),
        prompt_loss_weight=weights[0],
        completion_loss_weight=weights[1],
        max_grad_norm=limit,
        max_steps=STEPS,
        max_length=256,
        learning_rate=2e-3,
        warmup_steps=10,
        adam_epsilon=1e-30,
        activation_checkpointing=False,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to="none",
        print_weight_report=False,
    )
    WITSFTTrainer(
        LlamaForCausalLM(embedded_config(tokenizer)),
        args,
        train_dataset=dataset["train"],
        processing_class=tokenizer,
        callbacks=[recorder],
    ).train()
    return recorder.steps


def main(path: str) -> None:
    """Draws the picture."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for limit, label in LIMITS.items():
        first, second = (train(weights, limit) for weights in PAIRS)
        apart = [
            (torch.linalg.norm(a - b) / torch.linalg.norm(a - first[0])).item()
            for a, b in zip(first[1:], second[1:], strict=True)
        ]
        print(f"{label}: {apart[-1]:.2g} of the way apart after {STEPS} steps")
        axes.semilogy(range(1, STEPS + 1), apart, label=label)
    axes.set(xlabel="step", ylabel="distance, as a share of the way from the start")
    axes.set_title(f"{PAIRS[0]} and {PAIRS[1]} under AdamW", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1])
