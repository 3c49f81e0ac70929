import copy
import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, sort_checkpoints
from trl import SFTTrainer
from trl.chat_template_utils import (
    get_training_chat_template,
    has_generation_markers,
    is_chat_template_stop_token_trained,
)
from trl.data_utils import (
    get_dataset_column_names,
    is_conversational,
    is_conversational_from_value,
    maybe_convert_to_chatml,
)
from trl.trainer.utils import FusedCausalLMOutput, get_config_model_id, global_then_local_main_first

from .config import WITSFTConfig
from .data_collator import REGION_COLUMNS, DataCollatorForWIT, token_regions
from .lm_head import align_with_targets, dequantize_lm_head, weighted_forward


logger = get_logger(__name__)

_NUM_TERMS = 8  # of `_loss_terms`
_TRL_COLUMNS = {"prompt", "completion", "messages", "conversations"}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def _name_roles(example: dict[str, Any]) -> dict[str, Any]:
    """ShareGPT calls the user `human` and the assistant `gpt`, which chat templates do not know."""
    turns = example["conversations"]
    return {"conversations": [{**turn, "from": _SHAREGPT_ROLES.get(turn["from"], turn["from"])} for turn in turns]}


def _label_regions(example: dict[str, Any], index: int) -> dict[str, list[int]]:
    try:
        return {"labels": token_regions(example)}
    except ValueError as error:
        raise ValueError(f"Row {index}: {error}") from error


class WITSFTTrainer(SFTTrainer):
    """
    Trainer for Weighted Instruction Tuning (WIT).

    The only differences from [`~trl.SFTTrainer`] are the loss and what feeds it. With \\( w_t \\) the weight of a
    token's region (prompt or completion) and \\( N \\) the number of tokens whose weight is not zero, over all
    micro-batches and ranks of the optimizer step, the loss is, in nats,

    $$\\mathcal{L} = -\\frac{1}{N} \\sum_t w_t \\log p(x_t \\mid x_{<t})$$

    The completion region is what TRL would train on by itself: the completion of a prompt-completion data set, the
    assistant's turns of a conversation, all of a plain text. All other tokens are the prompt.

    Takes the arguments of [`~trl.SFTTrainer`], except that `compute_loss_func` is refused; any other `args` than a
    [`WITSFTConfig`] get its default weights.

    `entropy` and `mean_token_accuracy` are means over tokens, where TRL averages those of micro-batches. Besides what
    TRL logs, it logs `prompt_loss` and `completion_loss`: the unweighted mean negative log-likelihood per token of each
    region, in nats, over all micro-batches and ranks since the last log. In training a region of weight 0
    is not computed and so not logged. In evaluation `eval_prompt_loss`, `eval_completion_loss` and `eval_loss` are
    exact means over the evaluation set, whatever the batch size; the first two compare runs with different weights,
    which losses do not. `eval_loss` is the weighted loss alone, without any auxiliary loss of a Mixture-of-Experts
    model (`eval_aux_loss`).

    Raises:
        `ValueError`: `compute_loss_func` is passed; the data collator does not return `token_weights`; the data set
        leaves no token to train on; images, context or sequence parallelism are used.

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
        if not {"image", "images"}.isdisjoint(columns):
            raise ValueError(
                "Data sets with images are not supported yet. Drop the image column, or use TRL's `SFTTrainer`."
            )
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
            config = WITSFTConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init})
        arguments["args"] = config
        weights = {name: getattr(config, name) for name in ("prompt_loss_weight", "completion_loss_weight")}
        collator = arguments.get("data_collator")
        if isinstance(collator, DataCollatorForWIT) and any(getattr(collator, k) != v for k, v in weights.items()):
            raise ValueError(
                f"The weights of the `DataCollatorForWIT` contradict those of the `WITSFTConfig`, {weights}. Pass the "
                "same ones to both, or no collator."
            )

        super().__init__(**arguments)

        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            raise ValueError(
                "Context and sequence parallelism are not supported yet: they would split the tokens without their "
                "weights. Set `cp_size` and `sp_size` to 1."
            )
        if collator is None:
            self.data_collator = DataCollatorForWIT(**dataclasses.asdict(self.data_collator), **weights)
        # On a CPU with AVX512-BF16, bitsandbytes packs 4-bit weights at the first evaluation, for a kernel that has no
        # gradient: all later training steps would silently lose the gradient through them
        for module in self.model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        if getattr(self.model, "is_quantized", False):
            dequantize_lm_head(self.model)
        # The labels count the divisor for every model, also where its own forward takes no `num_items_in_batch`
        self.model_accepts_loss_kwargs = True
        # On this rank: sums of `_loss_terms`, then of auxiliary losses and of micro-batches, since the last log, and of
        # tokens since the start. MPS has no float64.
        dtype = torch.float32 if self.args.device.type == "mps" else torch.float64
        self._train_sums = torch.zeros(_NUM_TERMS + 3, dtype=dtype, device=self.args.device)
        self._eval_sums = torch.zeros(_NUM_TERMS, dtype=torch.float64)

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        args: WITSFTConfig,
        packing: bool,
        formatting_func: Callable[[dict], str] | None,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        # TRL carries one column through truncation and packing: `labels`, -100 where it would not train. First TRL
        # tokenizes whole rows and labels the completion; then the labels become regions (0 or 1, so that no row looks
        # fully masked); then TRL truncates and packs those. The weights have no part in it, so one cache serves all.
        is_train, self._train_is_prepared = not self._train_is_prepared, True  # TRL prepares it first
        example = next(iter(dataset), None)
        if example is None:
            raise ValueError(f"The {dataset_name} dataset is empty. Check the file, the split and any filter.")
        if {"seq_lengths", "completion_mask"} <= set(example):
            return dataset  # packed already
        if "input_ids" not in example:
            dataset = self._tokenize_whole_rows(dataset, example, processing_class, args, formatting_func, dataset_name)
        elif set(REGION_COLUMNS[:3]).isdisjoint(example):
            logger.warning_once(
                "The tokenized data set has no `labels`, `completion_mask` or `assistant_masks` column: every token is "
                "completion and `prompt_loss_weight` has no effect."
            )

        map_kwargs: dict[str, Any] = {}
        if isinstance(dataset, Dataset):  # `IterableDataset.map` supports neither
            map_kwargs = {"num_proc": args.dataset_num_proc, "desc": f"Finding completions in {dataset_name} dataset"}
        used = [name for name in REGION_COLUMNS if name != "labels" and name in get_dataset_column_names(dataset)]
        with global_then_local_main_first():
            whole_rows = dataset.map(_label_regions, with_indices=True, remove_columns=used, **map_kwargs)
        rows_args = copy.copy(args)
        rows_args.shuffle_dataset = args.shuffle_dataset and packing
        dataset = super()._prepare_dataset(whole_rows, processing_class, rows_args, packing, None, dataset_name)
        dataset = dataset.rename_column("labels", "completion_mask")
        if is_train:
            dataset = self._drop_rows_without_target(dataset, whole_rows, args)
        if args.shuffle_dataset and not packing:
            dataset = dataset.shuffle(seed=args.seed)
        return dataset

    def _tokenize_whole_rows(self, dataset, example, processing_class, args, formatting_func, dataset_name):
        """Has TRL tokenize the rows without cutting them, with `labels` of -100 outside the completion region."""
        if formatting_func is None and is_conversational_from_value(example):
            with global_then_local_main_first():
                dataset = dataset.map(_name_roles)
        example = maybe_convert_to_chatml(copy.deepcopy(example))
        known = ({"prompt", "completion"}, {"messages"}, {args.dataset_text_field})
        if formatting_func is None and not any(columns <= set(example) for columns in known):
            raise ValueError(
                f"The {dataset_name} dataset has the columns {list(example)}, but needs `prompt` and `completion`, "
                f"`messages`, `conversations`, `{args.dataset_text_field}` or `input_ids`. Rename its columns, or make "
                "plain text of them with `formatting_func`."
            )
        args = copy.copy(args)
        args.max_length, args.shuffle_dataset = None, False
        self.completion_only_loss = True  # label the completion, whatever its weight
        chat_template = self.chat_template
        if formatting_func is None and "messages" in example and is_conversational(example):
            if processing_class.chat_template is None:
                raise ValueError(
                    "The data set holds conversations, but the tokenizer has no chat template. Set "
                    "`chat_template_path` to a template file or to a model that has one."
                )
            args.assistant_only_loss = True
            if not has_generation_markers(processing_class.chat_template):
                self.chat_template = get_training_chat_template(processing_class)
            if not is_chat_template_stop_token_trained(processing_class, chat_template=self.chat_template):
                logger.warning_once(
                    "The chat template leaves the end-of-turn token out of the assistant's turn. It counts as prompt, "
                    "so the model may not learn to stop. Move it inside `{% generation %}` in the template."
                )
        elif formatting_func is not None or "prompt" not in example:
            logger.warning_once(
                "The data set has no prompt to weight: every token is completion and `prompt_loss_weight` has no "
                "effect. Pass prompt/completion or `messages` columns to use both weights."
            )
        try:
            return super()._prepare_dataset(dataset, processing_class, args, False, formatting_func, dataset_name)
        except RuntimeError as error:
            if "no assistant tokens" not in str(error):
                raise
            raise ValueError(
                f"A conversation of the {dataset_name} dataset has no assistant turn, so it has no completion. Remove "
                "such rows."
            ) from error
        finally:
            self.chat_template = chat_template  # other data sets keep the template they have in TRL

    @staticmethod
    def _drop_rows_without_target(
        dataset: Dataset | IterableDataset, whole_rows: Dataset | IterableDataset, args: WITSFTConfig
    ) -> Dataset | IterableDataset:
        """
        Drops the rows of the training set in which every token weighs 0, where TRL drops fully masked ones: after
        truncation, but not after packing. Raises `ValueError` if no row has a target. Evaluation sets keep all their
        rows, since both regions are measured.
        """
        weights = (args.prompt_loss_weight, args.completion_loss_weight)

        def has_target(regions):
            return any(weights[region] != 0 for region in regions[1:] if region != -100)

        kept = dataset
        if 0 in weights and args.max_length is not None and not args.packing:
            desc = {"desc": "Dropping rows without target from train dataset"} if isinstance(dataset, Dataset) else {}
            kept = dataset.filter(has_target, input_columns="completion_mask", **desc)
        if not any(has_target(example["completion_mask"]) for example in kept):
            had_target = [has_target(example["labels"]) for example in whole_rows]
            raise ValueError(
                f"No row of the train dataset has a token left to train on. The weights of prompt and completion are "
                f"{weights}, and {sum(had_target)} of {len(had_target)} rows were lost to `max_length="
                f"{args.max_length}`. Raise `max_length`, give the other region a weight, or check the data."
            )
        if isinstance(kept, Dataset) and len(kept) < len(dataset):
            logger.warning(
                f"Dropped {len(dataset) - len(kept)} of {len(dataset)} rows of the train dataset: they have no token "
                f"of non-zero weight within `max_length={args.max_length}`."
            )
        return kept

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        if resume_from_checkpoint is True:
            (resume_from_checkpoint,) = broadcast_object_list([_last_complete_checkpoint(self.args.output_dir)])
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"There is no complete checkpoint in `{self.args.output_dir}` to resume from. Check the folder, or "
                    "train from the start without `resume_from_checkpoint`."
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in REGION_COLUMNS if name not in self._signature_columns]

    def _reject_skip_prepare_without_labels(self, datasets, data_collator) -> None:
        """Allows what TRL rejects: data that skips preparation with masks but no labels. Our collator reads masks."""

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        prepared = super()._prepare_inputs(inputs)
        if "token_weights" in inputs:  # which DeepSpeed casts to 16 bits with all floats, and so rounds
            prepared["token_weights"] = inputs["token_weights"].to(self.args.device)
        return prepared

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        example_lengths = inputs.pop("example_lengths", None)
        try:
            token_weights, completion_mask = inputs.pop("token_weights"), inputs.pop("completion_mask")
        except KeyError as error:
            raise ValueError(
                f"The data collator returned no {error}. Use `wit_trl.DataCollatorForWIT` (the default), or return "
                "`token_weights` and `completion_mask` as it does."
            ) from error

        training = self.model.training
        inputs["use_cache"] = False
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        if not training:  # score both regions, whatever their weights
            inputs["labels"] = inputs["input_ids"].masked_fill(completion_mask == -100, -100)
        outputs, nll = weighted_forward(model, inputs, token_weights)

        # As in TRL: the divisor counts the tokens of all ranks, over which the gradients are averaged. The auxiliary
        # loss is a mean over the micro-batch.
        divisor = (token_weights[:, 1:] != 0).sum() if num_items_in_batch is None else num_items_in_batch
        loss = -outputs.log_probs.sum() / torch.as_tensor(divisor).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if self.aux_loss_enabled:
            steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps

        length = nll.size(1)
        terms = _loss_terms(
            nll,
            outputs,
            align_with_targets(token_weights, length).to(nll.device),
            align_with_targets(completion_mask, length, fill=-100).to(nll.device),
        )
        terms = terms[:, length + 1 - token_weights.size(1) :]  # without virtual tokens
        if training:
            num_tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
            self._train_sums[:_NUM_TERMS] += terms.sum((0, 1)).to(self._train_sums)
            if self.aux_loss_enabled:
                self._train_sums[-3] += outputs.aux_loss.detach()
            self._train_sums[-2] += 1
            self._train_sums[-1] += num_tokens
        else:
            self._eval_sums += self._sum_over_ranks(terms, example_lengths)
            if self.aux_loss_enabled:
                aux_loss = self.accelerator.gather_for_metrics(outputs.aux_loss).mean().item()
                self._metrics["eval"]["aux_loss"].append(aux_loss)

        if return_outputs:  # the logits, for `compute_metrics`
            with torch.no_grad():
                outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        return (loss, outputs) if return_outputs else loss

    def _sum_over_ranks(self, terms: torch.Tensor, example_lengths: torch.Tensor | None) -> torch.Tensor:
        """Adds up the terms by example, to leave out the examples that only fill up the last batch on several ranks."""
        if example_lengths is None:
            by_example = terms.sum(1)
        else:  # all in one row, without the first token, which nothing predicts
            example = torch.repeat_interleave(example_lengths.to(terms.device))[1:]
            by_example = terms.new_zeros(len(example_lengths), _NUM_TERMS)
            by_example.index_add_(0, example, terms[0, : len(example)])
        return self.accelerator.gather_for_metrics(by_example).cpu().double().sum(0)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not {"loss", "train_loss"}.isdisjoint(logs):  # a training step or the end of training, on every rank
            *terms, aux_loss, micro_batches, num_tokens = self.accelerator.reduce(self._train_sums).tolist()
            self._train_sums[:-1].zero_()
            if micro_batches:
                self._total_train_tokens = int(num_tokens) // self._tp_size
                logs.update({"num_tokens": self._total_train_tokens, **_token_metrics(terms), **_region_losses(terms)})
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
        losses = {"loss": weighted_sum / max(count, 1), **_region_losses(terms)}
        output.metrics.update({f"{metric_key_prefix}_{name}": loss for name, loss in losses.items()})
        num_tokens = int(self.accelerator.reduce(self._train_sums)[-1]) // self._tp_size
        for name, value in {"num_tokens": num_tokens, **_token_metrics(terms)}.items():
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


def _loss_terms(
    nll: torch.Tensor, outputs: FusedCausalLMOutput, weights: torch.Tensor, regions: torch.Tensor
) -> torch.Tensor:
    """
    Returns, for each token, its negative log-likelihood and 1 if it is a scored prompt token, the same if it is a
    scored completion token, and if its weight is not zero its weighted negative log-likelihood, 1, the entropy, and
    whether it is the most likely token. All arguments are `(B, T)`, the result is `(B, T, 8)` in float32.
    """
    nll, entropy = nll.float(), outputs.entropy.detach().float()
    prompt, completion = outputs.label_mask & (regions == 0), outputs.label_mask & (regions == 1)
    weighted = weights != 0
    by_region = (nll * prompt, prompt, nll * completion, completion)
    by_weight = (nll * weights, weighted, entropy * weighted, outputs.is_top1 & weighted)
    return torch.stack(by_region + by_weight, dim=-1)


def _token_metrics(terms: list[float]) -> dict[str, float]:
    """Returns the metrics that TRL logs for the tokens it trains, from sums of `_loss_terms`."""
    *_, count, entropy, correct = terms
    return {"entropy": entropy / max(count, 1), "mean_token_accuracy": correct / max(count, 1)}


def _region_losses(sums: list[float]) -> dict[str, float]:
    """Returns the mean negative log-likelihood of each region that has tokens, from sums of `_loss_terms`."""
    prompt_sum, prompt_count, completion_sum, completion_count, *_ = sums
    losses = {}
    if prompt_count:
        losses["prompt_loss"] = prompt_sum / prompt_count
    if completion_count:
        losses["completion_loss"] = completion_sum / completion_count
    return losses
