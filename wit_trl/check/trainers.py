"""Training, side by side: `SFTTrainer` and `WITSFTTrainer`, and the same work split in other ways."""

import tempfile
from typing import Any, NamedTuple

import torch
from transformers import LlamaForCausalLM, PrinterCallback
from trl import SFTConfig, SFTTrainer

from ..embedded import embedded_config, load_stdlib_functions, train_embedded_tokenizer


LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {},
    "padding-free": {"padding_free": True},
    "packed": {"packing": True, "max_length": 256},
}
# Weights of prompt and completion, and what `SFTTrainer` trains with them
ENDPOINTS = {(0.0, 1.0): {"completion_only_loss": True}, (1.0, 1.0): {"completion_only_loss": False}}
# Rows of a micro-batch and micro-batches of a step
SPLITS = ((4, 1), (2, 2), (1, 4))
ROWS, STEPS = 8, 2


class Trained(NamedTuple):
    """What a training leaves behind."""

    losses: torch.Tensor  # of each step, in nats
    change: torch.Tensor  # of all parameters, on the first rank


class TinyTraining:
    """Trains the embedded model on rows of the embedded data, with plain gradient descent and in float32."""

    def __init__(self, device: str, rows: int = ROWS):
        dataset = load_stdlib_functions()
        self.device = device
        self.tokenizer = train_embedded_tokenizer(dataset)
        self.rows = dataset["train"].select(range(rows))

    def __call__(self, trainer_class: type[SFTTrainer], config_class: type[SFTConfig], **arguments: Any) -> Trained:
        torch.manual_seed(0)
        model = LlamaForCausalLM(embedded_config(self.tokenizer))
        before = {name: x.detach().clone() for name, x in model.named_parameters()}
        with tempfile.TemporaryDirectory() as folder:
            args = config_class(
                folder,
                **{
                    "max_length": None,
                    "max_steps": STEPS,
                    "per_device_train_batch_size": 4,
                    # The parameters then differ as the gradients do
                    "optim": "sgd",
                    "learning_rate": 0.1,
                    "max_grad_norm": 0.0,
                    "lr_scheduler_type": "constant",
                    "train_sampling_strategy": "sequential",
                    "logging_steps": 1,
                    "save_strategy": "no",
                    "report_to": "none",
                    "bf16": False,
                    "use_cpu": self.device == "cpu",
                    "disable_tqdm": True,
                    **arguments,
                },
            )
            trainer = trainer_class(model, args, train_dataset=self.rows, processing_class=self.tokenizer)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        losses = torch.tensor([log["loss"] for log in trainer.state.log_history if "loss" in log])
        after = trainer.model.state_dict()
        if trainer.args.world_size > 1:
            after = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # whole, where the model is sharded
        if not trainer.is_world_process_zero():
            return Trained(losses, torch.tensor(()))
        return Trained(losses, torch.cat([(after[name].cpu() - x).flatten() for name, x in before.items()]))


def differences(found: Trained, expected: Trained) -> dict[str, float]:
    """Returns the norm of the difference over the norm, of the losses and of the change of the parameters."""
    return {
        name: (torch.linalg.norm(a - b) / torch.linalg.norm(b)).item()
        for name, a, b in zip(("losses", "parameters"), found, expected, strict=True)
    }
