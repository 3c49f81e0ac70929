"""Evaluation: exact means over an evaluation set, and the loss of each row. `EvaluationMixin` has all of it."""

import copy
from typing import Any

from datasets import Dataset
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from ..data.collator import check_weights
from .metrics import EvaluationSums


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
        `"completion_tokens"`, the numbers of its tokens. Added up, they give the losses of `evaluate`. All processes
        must call it, and all get all rows, in the order of the data set. Nothing is logged.

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
        args = copy.copy(self.args)
        args.shuffle_dataset, args.train_sampling_strategy = False, "sequential"
        if not self._is_vision_dataset and "input_ids" not in dataset.column_names:
            dataset = self._prepare_dataset(dataset, self.processing_class, args, False, None, "eval")
        of_training, self.args = self.args, args
        try:
            self.evaluation_loop(self.get_test_dataloader(dataset), "Evaluation", prediction_loss_only=True)
        finally:
            self.args = of_training
        if self._eval_sums.is_empty:
            raise ValueError("`evaluate_rows` needs the loss of `WITSFTTrainer`, which a subclass has replaced.")
        return Dataset.from_dict(self._eval_sums.rows())

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluates as `Trainer` does. The metrics are those of the class where `compute_loss` was reached."""
        check_weights(self.data_collator, self.args)
        self._eval_sums = EvaluationSums(
            self.accelerator, self.args.loss_divisor, self.get_tp_size() * self.get_cp_size()
        )
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._eval_sums.is_empty:  # a subclass computes another loss, without this one
            return output
        metrics = self._eval_sums.metrics(output.metrics.get(f"{metric_key_prefix}_loss"))
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        of_trl = self._eval_sums.metrics_of_trl()
        of_trl["num_tokens"] = self._train_sums.num_tokens(self.accelerator) // self._tp_size
        self._metrics["eval"] |= {name: [value] for name, value in of_trl.items()}  # logged with TRL's prefix
        return output
