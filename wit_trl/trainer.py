import copy
import dataclasses
import functools
import inspect
import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainerState, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, sort_checkpoints
from trl import SFTTrainer
from trl.data_utils import get_dataset_column_names
from trl.trainer.utils import get_config_model_id

from .config import WITSFTConfig
from .data_collator import NO_PROMPT_MESSAGE, REGION_COLUMNS, DataCollatorForWIT
from .data_preparation import DataPreparation, checked_formatting
from .lm_head import align_with_targets, dequantize_lm_head, weighted_forward
from .metrics import NUM_TERMS, loss_terms, region_losses, token_metrics
from .sequence_parallel import (
    PACKED_MESSAGE,
    check_sequence_parallelism,
    collate_shifted,
    shift_targets,
    skip_batches,
    split_targets,
)
from .summary import print_summary
from .vision_data_collator import DataCollatorForVisionLanguageWIT


logger = get_logger(__name__)

_TRL_COLUMNS = {"prompt", "completion", "messages", "conversations"}


class WITSFTTrainer(SFTTrainer):
    """
    Trainer for Weighted Instruction Tuning (WIT).

    The only differences from [`~trl.SFTTrainer`] are the loss and what feeds it. With \\( w_t \\) the weight of a token
    and \\( N \\) the number of tokens whose weight is not zero, over all micro-batches and ranks of the optimizer step,
    the loss is, in nats,

    $$\\mathcal{L} = -\\frac{1}{N} \\sum_t w_t \\log p(x_t \\mid x_{<t})$$

    The completion region is what TRL would train on by itself: the completion of a prompt-completion data set, the
    assistant's turns of a conversation, all of a plain text. All other tokens are the prompt. The weight of a token is
    that of its region, times what the data says: `"weight"` of a row, `"weight"` of a message, `"token_weights"` beside
    `"input_ids"`.

    Takes the arguments of [`~trl.SFTTrainer`], except that `compute_loss_func` is refused; any other `args` than a
    [`WITSFTConfig`] get its default weights.

    `entropy` and `mean_token_accuracy` are means over tokens, where TRL averages those of micro-batches. Besides what
    TRL logs, it logs `prompt_loss` and `completion_loss`: the unweighted mean negative log-likelihood per token of each
    region, in nats, over all micro-batches and ranks since the last log. In training a region of weight 0
    is not computed and so not logged. In evaluation `eval_prompt_loss`, `eval_completion_loss` and `eval_loss` are
    exact means over the evaluation set, whatever the batch size and the number of ranks (but of a stream on several
    ranks, with the rows that accelerate fills up the last batch with); the first two compare runs with different
    weights, which losses do not. `eval_loss` is the weighted loss alone, without any auxiliary loss of a
    Mixture-of-Experts model (`eval_aux_loss`).

    Raises:
        `ValueError`: `compute_loss_func` is passed; the data collator does not return `token_weights`; a row cannot be
        trained on, or no row leaves a token to train on; sequence or context parallelism is used with images,
        packing, padding-free batches or prompt learning, or one of them or tensor parallelism with
        `average_tokens_across_devices=False`.

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

    _train_is_prepared = False
    _whole_train_rows: Dataset | IterableDataset | None = None
    _tag_names: ClassVar = ["trl", "sft", "wit"]
    _name = "WIT"
    _paper: ClassVar = {
        "title": "On the Effect of Instruction Tuning Loss on Generalization",
        "id": "2507.07817",
        "citation": textwrap.dedent("""\
            @article{chatterjee2025effect,
                title   = {{On the Effect of Instruction Tuning Loss on Generalization}},
                author  = {Anwoy Chatterjee and H S V N S Kowndinya Renduchintala and Sumit Bhatia and
                           Tanmoy Chakraborty},
                journal = {Transactions of the Association for Computational Linguistics},
                volume  = 13,
                pages   = {1360--1380},
                year    = 2025
            }"""),
    }

    @functools.wraps(SFTTrainer.__init__, assigned=())
    def __init__(self, *args: Any, **kwargs: Any):
        arguments = inspect.signature(super().__init__).bind(*args, **kwargs).arguments
        if arguments.get("compute_loss_func") is not None:
            raise ValueError(
                "`compute_loss_func` is not supported: `WITSFTTrainer` computes the weighted loss. Remove it, or pass "
                "it to TRL's `SFTTrainer`."
            )
        dataset = arguments.get("train_dataset")
        if isinstance(dataset, Dataset) and len(dataset) == 0:
            raise ValueError("`train_dataset` is empty. Check the file, the split and any filter it comes from.")
        columns = get_dataset_column_names(dataset) if isinstance(dataset, Dataset | IterableDataset) else []
        if arguments.get("formatting_func") and not _TRL_COLUMNS.isdisjoint(columns):
            raise ValueError(
                f"`formatting_func` makes plain text, but TRL reads the columns {sorted(_TRL_COLUMNS & set(columns))} "
                "instead of it. Drop `formatting_func` (the chat template does its work), or rename these columns to "
                "train on the text, in which every token is completion."
            )
        config = arguments.get("args")
        if config is None:
            model = arguments["model"]
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            config = WITSFTConfig(f"{model_name.split('/')[-1]}-WIT")
        elif isinstance(config, TrainingArguments) and not isinstance(config, WITSFTConfig):
            fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}
            if added := fields.keys() - {f.name for f in dataclasses.fields(WITSFTConfig)}:
                raise ValueError(
                    f"`args` is a `{type(config).__name__}` with fields of its own, {sorted(added)}. Make it a "
                    "subclass of `WITSFTConfig`."
                )
            config = WITSFTConfig(**fields)
        if config.assistant_only_loss and not {"messages", "conversations"}.isdisjoint(columns):
            # TRL refuses templates that it does not know. It is what the completion of a conversation is here.
            config = copy.copy(config)
            config.assistant_only_loss = False
        arguments["args"] = config
        weights = {name: getattr(config, name) for name in ("prompt_loss_weight", "completion_loss_weight")}
        collator = arguments.get("data_collator")
        of_wit = isinstance(collator, DataCollatorForWIT | DataCollatorForVisionLanguageWIT)
        if of_wit and any(getattr(collator, k) != v for k, v in weights.items()):
            raise ValueError(
                f"The weights of the `{type(collator).__name__}` contradict those of the `WITSFTConfig`, {weights}. "
                "Pass the same ones to both, or no collator."
            )

        super().__init__(**arguments)

        if collator is None:
            collator_class = DataCollatorForVisionLanguageWIT if self._is_vision_dataset else DataCollatorForWIT
            self.data_collator = collator_class(**vars(self.data_collator), **weights)
            if self._is_vision_dataset:
                self._check_vision_dataset()
        if (self._splits_sequences or self.get_tp_size() > 1) and not self.args.average_tokens_across_devices:
            raise ValueError(
                "`average_tokens_across_devices=False` is not supported where ranks share or repeat a sequence "
                "(tensor, context, sequence parallelism), which would then weigh it differently. Set it to True."
            )
        if self._splits_sequences:
            check_sequence_parallelism(self.args, self.model, self.accelerator, self._is_vision_dataset)
            if isinstance(self.data_collator, DataCollatorForWIT):  # so that all ranks get as many tokens
                parts = self.get_sp_size() if self.get_cp_size() == 1 else 2 * self.get_cp_size()
                self.data_collator.pad_to_multiple_of = math.lcm(self.data_collator.pad_to_multiple_of or 1, parts)
        # On a CPU with AVX512-BF16, bitsandbytes packs 4-bit weights at the first evaluation, for a kernel that has no
        # gradient: all later training steps would silently lose the gradient through them
        for module in self.model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        if getattr(self.model, "is_quantized", False):
            dequantize_lm_head(self.model)
        # The labels count the divisor for every model, also where its own forward takes no `num_items_in_batch`
        self.model_accepts_loss_kwargs = True
        # On this rank: sums of `loss_terms`, then of auxiliary losses and of micro-batches, since the last log, and of
        # tokens since the start. MPS has no float64.
        dtype = torch.float32 if self.args.device.type == "mps" else torch.float64
        self._train_sums = torch.zeros(NUM_TERMS + 3, dtype=dtype, device=self.args.device)
        self._eval_sums = torch.zeros(NUM_TERMS, dtype=torch.float64)

    @property
    def _splits_sequences(self) -> bool:
        return self.get_sp_size() > 1 or self.get_cp_size() > 1

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        args: WITSFTConfig,
        packing: bool,
        formatting_func: Callable[[dict], str] | None,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        # TRL tokenizes whole rows and labels the completion, whatever its weight. From there on, each token needs its
        # region and the weight that the data gives it, where TRL has labels.
        is_train, self._train_is_prepared = not self._train_is_prepared, True  # TRL prepares it first
        preparation = DataPreparation(args, packing, dataset_name)
        columns = set(preparation.first_row(dataset))
        if {"seq_lengths", "completion_mask"} <= columns:
            return dataset  # packed already
        if "input_ids" not in columns:
            if formatting_func is None:
                dataset = preparation.check_rows(dataset, processing_class, self.chat_template)
            else:
                logger.warning_once(NO_PROMPT_MESSAGE)
                formatting_func = checked_formatting(formatting_func)
            self.completion_only_loss = True
            whole_args = copy.copy(args)
            whole_args.max_length, whole_args.shuffle_dataset = None, False
            dataset = super()._prepare_dataset(
                dataset, processing_class, whole_args, False, formatting_func, dataset_name
            )
        whole_rows = preparation.find_regions(dataset)
        dataset = preparation.fit_to_length(whole_rows)
        if is_train:  # evaluation sets keep all their rows, since both regions are measured
            self._whole_train_rows = whole_rows  # for `rows_to_inspect`
            dataset = preparation.drop_rows_without_target(dataset, whole_rows)
        if args.shuffle_dataset:
            dataset = dataset.shuffle(seed=args.seed)
        return dataset

    def _check_vision_dataset(self) -> None:
        """
        Raises `ValueError` if a row is wrong but for its images, which are not read, or if none has a target: it stops
        at the first that has one.
        """
        dataset = self.train_dataset
        if isinstance(dataset, Dataset) and dataset.format["type"] != "custom":
            texts = dataset.remove_columns([name for name in ("image", "images") if name in dataset.column_names])
            DataPreparation(self.args, False, "train").map_rows(texts, self.data_collator.check_row, "Checking rows")
        if not any((self.data_collator([row])["labels"] != -100).any() for row in self.train_dataset):
            raise ValueError(
                "No example of the train dataset has a token left to train on. The weights of prompt and completion "
                f"are {(self.args.prompt_loss_weight, self.args.completion_loss_weight)}, and `max_length` is "
                f"{self.args.max_length}. Raise `max_length`, give the other region a weight, or check the data."
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        if resume_from_checkpoint is True:
            (resume_from_checkpoint,) = broadcast_object_list([_last_complete_checkpoint(self.args.output_dir)])
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"There is no complete checkpoint in `{self.args.output_dir}` to resume from. Check the folder, or "
                    "train from the start without `resume_from_checkpoint`."
                )
        if self.is_world_process_zero():
            print_summary(self)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if self._is_vision_dataset:  # collated as it is; and TRL would remove the text
            columns = [self.args.dataset_text_field, "weight"]
        else:
            columns = [*REGION_COLUMNS, "token_weights", "weight"]
        self._signature_columns += [name for name in columns if name not in self._signature_columns]

    def _reject_skip_prepare_without_labels(self, datasets, data_collator) -> None:
        """Allows what TRL rejects: data that skips preparation with masks but no labels. Our collator reads masks."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            with Path(self.args.output_dir, "README.md").open("a", encoding="utf-8") as card:
                card.write(
                    "\n## Weights of the loss\n\nprompt_loss_weight: "
                    f"{self.args.prompt_loss_weight}, completion_loss_weight: {self.args.completion_loss_weight}\n"
                )

    def get_train_dataloader(self) -> DataLoader:
        if self.get_sp_size() == 1:
            return super().get_train_dataloader()
        with patch.object(self, "data_collator", functools.partial(collate_shifted, self.data_collator)):
            return super().get_train_dataloader()

    def _prepare_context_parallel_inputs(
        self, model: torch.nn.Module, inputs: dict[str, Any]
    ) -> tuple[Callable, dict[str, Any]]:
        if self.get_cp_size() == 1:
            return super()._prepare_context_parallel_inputs(model, inputs)
        context, inputs = super()._prepare_context_parallel_inputs(model, shift_targets(inputs))
        return split_targets(context, inputs), inputs

    def _run_epoch(self, **kwargs: Any) -> None:
        if self.get_sp_size() == 1:
            return super()._run_epoch(**kwargs)
        # DeepSpeed's data loader has no epochs: it would go on behind the end of the last one, in which `Trainer` would
        # lose a step, and in its order. Nor can accelerate skip its batches to resume.
        loader = kwargs["train_dataloader"]
        loader.dl.set_epoch(kwargs["epoch"])
        loader.iter = iter(loader.dl)
        loader.micro_batches.clear()
        with patch("transformers.trainer.skip_first_batches", skip_batches):
            return super()._run_epoch(**kwargs)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        if self.get_sp_size() == 1:
            return super()._get_num_items_in_batch(batch_samples, device)
        # `Trainer` looks for `labels`, of which DeepSpeed leaves `shift_labels`, and divides the sum over all ranks by
        # `sp_size`, as if those that share a sequence held the same tokens
        batch_samples = [{"labels": batch["shift_labels"], **batch} for batch in batch_samples]
        return super()._get_num_items_in_batch(batch_samples, device) * self.get_sp_size()

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        prepared = super()._prepare_inputs(inputs)
        if "token_weights" in inputs:  # which DeepSpeed casts to 16 bits with all floats, and so rounds
            prepared["token_weights"] = inputs["token_weights"].to(self.args.device)
        return prepared

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        example_lengths = inputs.pop("example_lengths", None)
        if example_lengths is not None and self._splits_sequences:
            raise ValueError(PACKED_MESSAGE)
        needed = {"token_weights", "completion_mask", "shift_labels" if "shift_labels" in inputs else "labels"}
        if missing := needed - {name for name, value in inputs.items() if value is not None}:
            raise ValueError(
                f"The data collator returned no {sorted(missing)}. Use `wit_trl.DataCollatorForWIT` (the default), or "
                "return all that it does."
            )
        token_weights, completion_mask = inputs.pop("token_weights"), inputs.pop("completion_mask")

        training = self.model.training
        inputs["use_cache"] = False
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        if not training:  # score both regions, whatever their weights
            inputs["labels"] = inputs["input_ids"].masked_fill(completion_mask == -100, -100)
        try:
            outputs, nll = weighted_forward(model, inputs, token_weights)
        except ValueError as error:
            if "Image features and image tokens do not match" not in str(error) or self.args.max_length is None:
                raise
            raise ValueError(
                f"`max_length={self.args.max_length}` cuts off tokens of an image, but not the image. Raise it, or set "
                "it to `None`."
            ) from error

        # As in TRL: the divisor counts the tokens of all ranks, over which the gradients are averaged. The auxiliary
        # loss is a mean over the micro-batch.
        divisor = (token_weights[:, 1:] != 0).sum() if num_items_in_batch is None else num_items_in_batch
        loss = -outputs.log_probs.sum() / torch.as_tensor(divisor).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if self.aux_loss_enabled:
            steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
        if training and self.get_sp_size() > 1 and not is_deepspeed_zero3_enabled():
            # The logged loss is the mean over all ranks, and so is the gradient in ZeRO-3. In the other stages,
            # DeepSpeed divides the sum of the gradients by the number of ranks over `sp_size`.
            loss = loss.detach() + (loss - loss.detach()) / self.get_sp_size()

        length = nll.size(1)
        terms = loss_terms(
            nll,
            outputs,
            align_with_targets(token_weights, length).to(nll.device),
            align_with_targets(completion_mask, length, fill=-100).to(nll.device),
        )
        if training:
            num_tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
            self._train_sums[:NUM_TERMS] += terms.sum((0, 1)).to(self._train_sums)
            if self.aux_loss_enabled:
                self._train_sums[-3] += outputs.aux_loss.detach()
            self._train_sums[-2] += 1
            self._train_sums[-1] += num_tokens
        else:
            terms = terms[:, length + 1 - token_weights.size(1) :]  # without virtual tokens
            self._eval_sums += self._sum_over_ranks(terms, example_lengths)
            if self.aux_loss_enabled:
                aux_loss = self.accelerator.gather_for_metrics(outputs.aux_loss).mean().item()
                self._metrics["eval"]["aux_loss"].append(aux_loss)

        if return_outputs:  # the logits, for `compute_metrics`
            with torch.no_grad():
                outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        return (loss, outputs) if return_outputs else loss

    def _sum_over_ranks(self, terms: torch.Tensor, example_lengths: torch.Tensor | None) -> torch.Tensor:
        """
        Adds up the terms by example, to leave out what does not count: examples that only fill up the last batch on
        several ranks, and batches that ranks repeat under tensor and context parallelism.
        """
        if example_lengths is None:
            by_example = terms.sum(1)
        else:  # all in one row, without the first token, which nothing predicts
            example = torch.repeat_interleave(example_lengths.to(terms.device))[1:]
            by_example = terms.new_zeros(len(example_lengths), NUM_TERMS)
            by_example.index_add_(0, example, terms[0, : len(example)])
        repeats, state = self.get_tp_size() * self.get_cp_size(), self.accelerator.gradient_state
        if state.in_dataloader and state.remainder < 0:  # a stream: what fills up its last batch cannot be told
            return self.accelerator.reduce(by_example.sum(0)).cpu().double() / repeats
        # As accelerate's `gather_for_metrics`, which does not know of repeated batches. Their ranks follow each other.
        gathered = self.accelerator.gather(by_example).unflatten(0, (-1, repeats, len(by_example)))[:, 0].flatten(0, 1)
        if state.end_of_dataloader and state.remainder > 0:
            gathered = gathered[: state.remainder]
        return gathered.cpu().double().sum(0)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not {"loss", "train_loss"}.isdisjoint(logs):  # a training step or the end of training, on every rank
            *terms, aux_loss, micro_batches, num_tokens = self.accelerator.reduce(self._train_sums).tolist()
            self._train_sums[:-1].zero_()
            if micro_batches:
                self._total_train_tokens = int(num_tokens) // self._tp_size
                logs.update({"num_tokens": self._total_train_tokens, **token_metrics(terms), **region_losses(terms)})
                if self.aux_loss_enabled:
                    logs["aux_loss"] = aux_loss / micro_batches
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self._eval_sums.zero_()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        *_, weighted_sum, count, _, _ = terms = self._eval_sums.tolist()
        # `Trainer` averages the losses of the batches, which is no mean over tokens
        losses = {"loss": weighted_sum / max(count, 1), **region_losses(terms)}
        output.metrics.update({f"{metric_key_prefix}_{name}": loss for name, loss in losses.items()})
        num_tokens = int(self.accelerator.reduce(self._train_sums)[-1]) // self._tp_size
        for name, value in {"num_tokens": num_tokens, **token_metrics(terms)}.items():
            self._metrics["eval"][name] = [value]  # which TRL logs with its prefix
        return output


def _last_complete_checkpoint(output_dir: str) -> str | None:
    """Returns the last checkpoint whose saving was not cut off, by a kill or a full disk: its state is written last."""
    for folder in reversed(sort_checkpoints(output_dir)):
        try:
            TrainerState.load_from_json(str(Path(folder, TRAINER_STATE_NAME)))
            return folder
        except (OSError, ValueError):
            logger.warning(f"{folder} is incomplete, because its saving was cut off. Looking for an earlier one.")
    return None
