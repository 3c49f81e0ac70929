"""A trainer on a tiny model, and a recorder of what it does."""

from datasets import Dataset, IterableDataset
from transformers import TrainerCallback

from wit_trl import WITSFTConfig, WITSFTTrainer


WEIGHTS = (0.2, 0.8)


class StepRecorder(TrainerCallback):
    """Keeps the gradients of every optimizer step, of the parameters that have one, and the logs of every step."""

    def __init__(self):
        self.gradients, self.logs = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.logs.append(dict(logs))


def make_trainer(
    make_model, tokenizer, rows, config_kwargs, weights=WEIGHTS, model=None, trainer_class=WITSFTTrainer, **kwargs
):
    """Returns a trainer on rows, a list or a data set, which it takes in their order if `config_kwargs` says nothing
    else."""
    prompt_loss_weight, completion_loss_weight = weights
    defaults = {
        "prompt_loss_weight": prompt_loss_weight,
        "completion_loss_weight": completion_loss_weight,
        "train_sampling_strategy": "sequential",
    }
    args = WITSFTConfig(**defaults | config_kwargs)
    is_dataset = isinstance(rows, Dataset | IterableDataset)
    kwargs.setdefault("train_dataset", rows if is_dataset else Dataset.from_list(rows))
    return trainer_class(model=model or make_model(), args=args, processing_class=tokenizer, **kwargs)
