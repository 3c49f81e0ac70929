"""`WITSFTTrainer`: TRL's `SFTTrainer` with the weighted loss."""

import functools
from dataclasses import replace
from types import MethodType
from typing import Any, ClassVar

import torch
from accelerate.utils import ParallelismConfig
from datasets import Dataset
from transformers.trainer_utils import TrainOutput
from trl import SFTTrainer

from ._upstream import keep_gradient_of_4bit_weights
from .config import WITSFTConfig
from .data.collator import DataCollatorForWIT, check_weights, weight_settings
from .data.columns import MESSAGE_COLUMNS, check_train_dataset
from .data.preparation import DataPreparation
from .data.training_rows import TrainingRows, check_image_rows, prepare_rows
from .data.vision_collator import DataCollatorForVisionLanguageWIT, explain_cut_images
from .loss.lm_head import check_logits, prepare_lm_head, weighted_forward
from .loss.token_factors import TOKEN_FACTORS, NamedFactors
from .report.weight_report import WeightReport, print_report, weigh
from .training.attributes import set_for_now
from .training.checkpoints import LossWeightsCallback, checkpoint_to_resume
from .training.evaluation import EvaluationMixin
from .training.metrics import TERMS, TERMS_OF_SPANS, EvaluationSums, TrainingSums, token_terms
from .training.model_card import PAPER, complete_card
from .training.parallelism import PACKED_MESSAGE, ParallelMixin
from .weights import MASK_COLUMNS, pop_weights


IMAGE_ROWS = 100  # of data with images that are counted: each image is processed for it


class WITSFTTrainer(EvaluationMixin, ParallelMixin, SFTTrainer):
    """
    Trainer for Weighted Instruction Tuning (WIT).

    Two things differ from [`~trl.SFTTrainer`]: the loss, and what feeds it. With \\( w_t \\) the weight of a token and
    \\( N \\) the number of tokens whose weight is not zero, over all micro-batches and ranks of the optimizer step, the
    loss is, in nats,

    $$\\mathcal{L} = -\\frac{1}{N} \\sum_t w_t \\log p(x_t \\mid x_{<t})$$

    With `loss_divisor="weights"`, \\( N \\) is the sum of the weights. In training, `token_factors` multiply them.

    The completion region is what TRL would train on by itself: the completion of a prompt-completion data set, the
    assistant's turns of a conversation, all of a plain text. All other tokens are the prompt. The weight of a token is
    that of its region, times what the data says: `"weight"` of a row or a message, `"token_weights"` of tokenized rows.

    Takes the arguments of [`~trl.SFTTrainer`], except that `compute_loss_func` is refused; any other `args` than a
    [`WITSFTConfig`] get its default weights.

    Besides what TRL logs, it logs the unweighted means of each region over all tokens since the last log: `prompt_loss`
    and `completion_loss`, in nats per token, `prompt_mean_token_accuracy` and `completion_mean_token_accuracy`. In
    training, a region of weight 0 is not computed. Evaluation has them always, with the prefix `eval_`: exact means
    over the evaluation set, whatever the batch size and the number of ranks, as `eval_loss` is. They compare runs of
    different weights. `loss` does not, nor do `entropy` and `mean_token_accuracy`, means over tokens with a weight.
    With `span_loss_weights`, the loss of each span is logged too, such as `completion_thinking_loss`.

    What it overrides is below, in [`EvaluationMixin`] and in [`ParallelMixin`]. All else is inherited unchanged.

    Raises:
        `ValueError`: `compute_loss_func` is passed; the model is an encoder-decoder; the data collator does not return
        `token_weights`; a row cannot be trained on, or no row leaves a token to train on; something is combined with
        sequence, context or tensor parallelism that would be wrong there ([`ParallelMixin`]).

    Example:
    ```python
    >>> from datasets import load_dataset
    >>> from wit_trl import WITSFTConfig, WITSFTTrainer

    >>> trainer = WITSFTTrainer(
    ...     model="Qwen/Qwen2.5-0.5B",
    ...     args=WITSFTConfig(prompt_loss_weight=0.2, completion_loss_weight=0.8, output_dir="Qwen2.5-0.5B-WIT"),
    ...     train_dataset=load_dataset("trl-lib/Capybara", split="train"),
    ... )
    >>> trainer.train()
    ```
    """

    _tag_names: ClassVar = ["trl", "sft", "wit"]
    _name = "WIT"
    _paper: ClassVar = PAPER

    @functools.wraps(SFTTrainer.__init__, assigned=())
    def __init__(
        self,
        model,
        args=None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        compute_loss_func=None,
        *more_args,
        **kwargs,
    ):
        if compute_loss_func is not None:
            raise ValueError(
                "`compute_loss_func` is not supported: `WITSFTTrainer` computes the weighted loss. Remove it, override "
                "`compute_loss` in a subclass, or pass it to TRL's `SFTTrainer`."
            )
        args = WITSFTConfig.of(args, model)
        columns = check_train_dataset(train_dataset, kwargs.get("formatting_func"), args)
        self._loss_settings = args.loss_settings
        self._assistant_only_loss = args.assistant_only_loss
        has_messages = not columns.isdisjoint(MESSAGE_COLUMNS)
        self._messages_are_new = has_messages and not self._assistant_only_loss
        self._training_rows: TrainingRows | None = None  # until the training set, which comes first, is prepared

        # TRL's constructor refuses templates that it does not know, where ours finds the completion by itself, names of
        # factors that it does not know, and DFT under sequence parallelism, where TRL's loss is the model's
        put_aside: dict[str, Any] = {"assistant_only_loss": False} if has_messages else {}
        if args.loss_type not in ("nll", "dft") or (args.parallelism_config or ParallelismConfig()).sp_enabled:
            put_aside["loss_type"] = "nll"
        with set_for_now(args, **put_aside):
            super().__init__(
                model, args, data_collator, train_dataset, eval_dataset, processing_class, None, *more_args, **kwargs
            )

        if data_collator is None:
            collator_class = DataCollatorForVisionLanguageWIT if self._is_vision_dataset else DataCollatorForWIT
            self.data_collator = collator_class(**vars(self.data_collator), **weight_settings(collator_class, args))
            if self._is_vision_dataset:
                check_image_rows(self.train_dataset, self.data_collator, self.args)
        self.check_settings()
        self.prepare_parallelism()
        keep_gradient_of_4bit_weights(self.model)
        prepare_lm_head(self.model)
        # The labels count the divisor for every model, also where its own forward takes no `num_items_in_batch`
        self.model_accepts_loss_kwargs = True
        self.terms = [*TERMS, *(TERMS_OF_SPANS if self.args.span_loss_weights else ())]  # of the metrics
        self._train_sums = TrainingSums(self.args.device, self.terms)
        self._eval_sums = EvaluationSums(self.accelerator, self.args.loss_divisor, self.terms)
        self.add_callback(LossWeightsCallback)
        self.add_callback(self._train_sums)

    def check_settings(self) -> None:
        """Raises `ValueError` if a setting of the loss is no longer that with which the trainer was made."""
        self.args.check_unchanged(self._loss_settings)
        check_weights(self.data_collator, self.args)

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        is_train = self._training_rows is None and dataset_name == "train"  # evaluation sets follow
        templates = self.chat_template, self._assistant_only_loss
        preparation = DataPreparation(args, processing_class, dataset_name, packing, formatting_func, *templates)
        rows = prepare_rows(dataset, preparation, is_train)
        if is_train:
            self._training_rows = rows
        return rows.dataset

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """
        Trains as [`~trl.SFTTrainer`] does, after a table of what is weighted. `resume_from_checkpoint=True` passes over
        a checkpoint whose saving was cut off.

        Raises:
            `ValueError`: there is no complete checkpoint to resume from, or a setting of the loss was changed.
        """
        self.check_settings()
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args)
        if self.args.print_weight_report and (self._is_vision_dataset or self.is_world_process_zero()):
            print_report(self.weight_report, self.args.max_length, self._messages_are_new)
        return super().train(checkpoint, *args, **kwargs)

    def weight_report(self) -> WeightReport:
        """
        Returns what the weights do to the training set as it is now, also if `train_dataset` was replaced.

        Of data with images it counts the first rows, of which each process takes a share: all of them must call it.

        Raises:
            `ValueError`: the rows or their weights are not known, because they are not tokenized, are read through a
            transform, or are weighed by another data collator.
        """
        self.check_settings()
        dataset, structure = self.train_dataset, self.args.structure_weights
        weights = self.args.prompt_loss_weight, self.args.completion_loss_weight
        settings: dict[str, Any] = {"loss_divisor": self.args.loss_divisor}
        if factors := self._factors_in_use():
            settings["token_factors"] = factors.meaning
        if isinstance(self.data_collator, DataCollatorForVisionLanguageWIT):
            rows = self.data_collator.tokenize_first_rows(dataset, IMAGE_ROWS)
            partial = not isinstance(dataset, Dataset) or len(rows) < len(dataset)
            report = weigh(rows, weights, partial=partial, structure=structure)
            return replace(report, thinking_left_out=None, **settings)
        if not isinstance(self.data_collator, DataCollatorForWIT):
            raise ValueError("The data collator is another one than `DataCollatorForWIT`, which may weigh otherwise.")
        known = self._training_rows
        if known is None or dataset is not known.dataset:  # it was replaced, or its preparation was skipped
            known = TrainingRows(dataset)
        return replace(weigh(dataset, weights, known.lengths, structure=structure), dropped=known.dropped, **settings)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if self._is_vision_dataset:  # collated as it is; and TRL would remove the text
            columns = [self.args.dataset_text_field, "weight"]
        else:
            columns = [*MASK_COLUMNS, "attention_mask", "token_weights", "token_spans", "weight"]
        self._signature_columns += [name for name in columns if name not in self._signature_columns]

    def _reject_skip_prepare_without_labels(self, datasets, data_collator) -> None:
        """Allows what TRL rejects: data that skips preparation with masks but no labels. Our collator reads masks."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes TRL's model card, with the settings of the loss."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            self.check_settings()
            complete_card(self.args)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        prepared = super()._prepare_inputs(inputs)
        if "token_weights" in inputs:  # which DeepSpeed casts to 16 bits with all floats, and so rounds
            prepared["token_weights"] = inputs["token_weights"].to(self.args.device)
        return prepared

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """
        Returns the weighted loss of a micro-batch, a scalar in nats, and what the model returns if `return_outputs`.
        Where a subclass returns another loss, `eval_loss` is its mean over the batches, as in `Trainer`.
        """
        inputs = dict(inputs)
        example_lengths = inputs.pop("example_lengths", None)
        if example_lengths is not None and self.splits_sequences():
            raise ValueError(PACKED_MESSAGE)
        token_weights, completion_mask, spans = pop_weights(inputs)

        inputs["use_cache"] = False
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        if not self.model.training:  # score both regions, whatever their weights
            inputs["labels"] = inputs["input_ids"].masked_fill(completion_mask == -100, -100)
        divisor = self.loss_divisor(token_weights, num_items_in_batch)
        factors = self._factors_in_use() if self.model.training else None
        function = None if factors is None else factors.function
        check_logits(model, inputs, self.args.fused_head)
        with explain_cut_images(self.args.max_length):
            outputs = weighted_forward(model, inputs, token_weights, divisor, function, self.args.fused_head)
        loss, aux_loss = outputs.loss, outputs.aux_loss if self.aux_loss_enabled else None
        if aux_loss is not None:  # a mean over the micro-batch, as in TRL
            steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + self.router_aux_loss_coef * aux_loss.to(loss.device) / steps
        device = outputs.log_probs.device
        first = completion_mask.size(1) - outputs.log_probs.size(1)  # the first target
        of_tokens = (x[:, first:].to(device) for x in (token_weights, completion_mask, spans))
        terms = token_terms(outputs, *of_tokens, self.terms)
        if self.model.training:
            loss = self.scale_gradient(loss)
            num_tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
            self._train_sums.add(terms, num_tokens, aux_loss)
        else:
            own = loss if self._overrides("compute_loss", "prediction_step") else None
            self._eval_sums.add(terms, example_lengths, own, aux_loss)

        if not return_outputs:
            return loss
        with torch.no_grad():  # the logits, for `compute_metrics`
            return loss, model(**{name: value for name, value in inputs.items() if name != "labels"})

    def _overrides(self, *names: str) -> bool:
        """Whether one of these methods is another one than here: of a subclass, or set on the class or on `self`."""
        return any(getattr(self, name) != MethodType(_OWN_METHODS[name], self) for name in names)

    def token_factors(self, nll: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        """
        Returns a factor for the loss of each token in training, without gradient: 1, or with `loss_type="dft"` the
        probability of the token. Override it for a loss that depends on what the model predicts.

        The kernels call it while the logits exist, with some of the scored tokens at a time, so each factor has to
        follow from its own token. The factors multiply the weights of the tokens, but leave the divisor alone: a token
        of factor 0 is counted. Evaluation, and the losses of the regions, are without them. In float16, factors above
        64 may overflow.

        Args:
            nll (`torch.Tensor` of shape `(N,)`):
                Negative log-likelihood of each token, in nats: its probability is `torch.exp(-nll)`.
            entropy (`torch.Tensor` of shape `(N,)`):
                Entropy of the prediction, in nats.
        """
        factors = TOKEN_FACTORS[self.args.loss_type]
        return torch.ones_like(nll) if factors is None else factors.function(nll, entropy)

    def _factors_in_use(self) -> NamedFactors | None:
        """Returns what multiplies the loss of each token in training, `None` where nothing is to be computed."""
        if self._overrides("token_factors"):
            return NamedFactors(f"{type(self).__name__}.token_factors", self.token_factors)
        return TOKEN_FACTORS[self.args.loss_type]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs as [`~trl.SFTTrainer`] does, with the metrics of each region."""
        if not {"loss", "train_loss"}.isdisjoint(logs):  # a training step or the end of training, on every rank
            logs.update(self._train_sums.metrics_since_last_call(self.accelerator, self._tp_size))
            self._total_train_tokens = logs.get("num_tokens", self._total_train_tokens)
        super().log(logs, start_time)


_OWN_METHODS = {name: getattr(WITSFTTrainer, name) for name in ("compute_loss", "prediction_step", "token_factors")}
