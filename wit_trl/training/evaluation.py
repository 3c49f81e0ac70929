"""Evaluation: exact means over an evaluation set, and the loss of each row. `EvaluationMixin` has all of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

from .attributes import set_for_now
from .metrics import EvaluationSums


logger = get_logger(__name__)


class EvaluationMixin(Trainer):
    """
    What [`WITSFTTrainer`] does otherwise in evaluation.

    `compute_loss` adds each batch to `_eval_sums`. The metrics are formed from these sums at the end, so they depend
    neither on the batch size nor on the number of ranks.
    """

    def evaluate_rows(self, eval_dataset: Dataset | str | None = None) -> Dataset:
        """
        Returns how well the model predicts each row: a data set with the columns `"prompt_nll"` and `"completion_nll"`,
        the sums of the unweighted negative log-likelihoods of a region in nats, and `"prompt_tokens"` and
        `"completion_tokens"`, the numbers of its tokens; where `span_loss_weights` are set, the same of each span
        (`"completion_thinking_nll"`, ...). Added up, they give the losses of `evaluate`. All processes must call it,
        and all get all rows, in the order of the data set. Nothing is logged.

        Args:
            eval_dataset (`Dataset` or `str`, *optional*):
                Rows of any type, or the name of an evaluation set. Defaults to `self.eval_dataset`, whose rows are in
                another order than they came in where `shuffle_dataset` is set.

        Raises:
            `ValueError`: the rows cannot be told apart, because they are a stream or are packed.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if not isinstance(dataset, Dataset):
            raise ValueError(
                f"`evaluate_rows` needs a `Dataset`, but got a `{type(dataset).__name__}`. Name one of several "
                "evaluation sets, or store the rows of a stream: `Dataset.from_list(list(stream.take(1000)))`."
            )
        if "seq_lengths" in dataset.column_names:
            raise ValueError(
                "`evaluate_rows` cannot tell packed rows apart. Pass the rows that were packed, or set "
                "`eval_packing=False`."
            )
        with set_for_now(self.args, shuffle_dataset=False, train_sampling_strategy="sequential"):
            if not self._is_vision_dataset and "input_ids" not in dataset.column_names:
                dataset = self._prepare_dataset(dataset, self.processing_class, self.args, False, None, "eval")
            self.evaluation_loop(self.get_test_dataloader(dataset), "Evaluation", prediction_loss_only=True)
        self._metrics["eval"].clear()  # which the next log would hold
        if self._eval_sums.is_empty:
            raise ValueError("`evaluate_rows` needs the loss of `WITSFTTrainer`, which a subclass has replaced.")
        return Dataset.from_dict(self._eval_sums.rows())

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        """Predicts as `Trainer` does. Nothing is logged."""
        output = super().predict(*args, **kwargs)
        self._metrics["eval"].clear()
        return output

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """Returns the data loader of an evaluation set: every row once, whatever the settings of the training."""
        with self._every_row():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """Returns the data loader of a test set: every row once, whatever the settings of the training."""
        with self._every_row():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _every_row(self) -> Iterator[None]:
        config = self.accelerator.dataloader_config
        # Dispatching hides which row is which, so only a stream may have it
        dispatch = False if config.dispatch_batches is False else None
        # Persistent workers would go on with the first set that they had
        order = {"dataloader_drop_last": False, "dataloader_in_order": True, "dataloader_persistent_workers": False}
        with set_for_now(config, dispatch_batches=dispatch, even_batches=True), set_for_now(self.args, **order):
            yield

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluates as `Trainer` does, but for the metrics: these are exact, unless `compute_loss` was replaced."""
        self.check_settings()
        self._eval_sums = EvaluationSums(
            self.accelerator, self.args.loss_divisor, self.terms, self.get_tp_size() * self.get_cp_size()
        )
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._eval_sums.is_empty:  # a subclass replaced `compute_loss`
            return output
        metrics = self._eval_sums.metrics(output.metrics.pop(f"{metric_key_prefix}_loss", None))
        if "loss" not in metrics:
            logger.warning(
                f"No token of the evaluation set has a weight, so it has no `{metric_key_prefix}_loss`: 0 would be the "
                "best of all. Raise `max_length`, look for weights of 0 in the data, or set `metric_for_best_model` to "
                "the loss of a region."
            )
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        of_trl = self._eval_sums.metrics_of_trl()
        of_trl["num_tokens"] = self._train_sums.num_tokens(self.accelerator) // self._tp_size
        self._metrics["eval"] |= {name: [value] for name, value in of_trl.items()}  # logged with TRL's prefix
        return output
