import copy
import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput
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
from trl.trainer.utils import get_config_model_id, global_then_local_main_first

from .config import WITSFTConfig
from .data_collator import DataCollatorForWIT


logger = get_logger(__name__)

_MASK_COLUMNS = ("completion_mask", "assistant_masks")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def _name_roles(example: dict[str, Any]) -> dict[str, Any]:
    """ShareGPT calls the user `human` and the assistant `gpt`, which chat templates do not know."""
    turns = example["conversations"]
    return {"conversations": [{**turn, "from": _SHAREGPT_ROLES.get(turn["from"], turn["from"])} for turn in turns]}


def _label_regions(example: dict[str, Any], index: int) -> dict[str, list[int]]:
    """Replaces the `-100` convention of `labels`, or the mask columns, by `labels` of 1 (completion) and 0 (prompt)."""
    input_ids = example["input_ids"]
    masks = {name: example[name] for name in _MASK_COLUMNS if name in example}
    if "labels" in example:
        masks = {"labels": example["labels"]}
    for name, mask in masks.items():
        if len(mask) != len(input_ids):
            raise ValueError(
                f"Row {index}: `{name}` has {len(mask)} entries, but `input_ids` has {len(input_ids)}. Give each token "
                "exactly one."
            )
    if "labels" in example:
        for position, (token, label) in enumerate(zip(input_ids, example["labels"], strict=True)):
            if label not in (token, -100):
                raise ValueError(
                    f"Row {index}: the label at position {position} is {label}, but it must be the token itself "
                    f"({token}, completion) or -100 (prompt)."
                )
        return {"labels": [int(label != -100) for label in example["labels"]]}
    for name, mask in masks.items():
        if not set(mask) <= {0, 1}:
            raise ValueError(
                f"Row {index}: `{name}` holds {sorted(set(mask) - {0, 1})}, but it must hold 1 for a completion token "
                "and 0 for a prompt token. Weights are set by `prompt_loss_weight` and `completion_loss_weight`."
            )
    return {"labels": [int(all(mask[i] for mask in masks.values())) for i in range(len(input_ids))]}


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

    Besides what TRL logs, it logs `prompt_loss` and `completion_loss`: the unweighted mean negative log-likelihood per
    token of each region, in nats, over all micro-batches and ranks since the last log. In training a region of weight 0
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

        if self._is_vision_dataset:
            raise ValueError(
                "Data sets with images are not supported yet. Drop the image column, or use TRL's `SFTTrainer`."
            )
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            raise ValueError(
                "Context and sequence parallelism are not supported yet: they would split the tokens without their "
                "weights. Set `cp_size` and `sp_size` to 1."
            )
        if collator is None:
            self.data_collator = DataCollatorForWIT(**dataclasses.asdict(self.data_collator), **weights)
        if not self._skip_prepare_dataset:
            self.train_dataset = self._drop_rows_without_target(self.train_dataset)
        # On a CPU with AVX512-BF16, bitsandbytes packs 4-bit weights at the first evaluation, for a kernel that has no
        # gradient: all later training steps would silently lose the gradient through them
        for module in self.model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        # The labels count the divisor for every model, also where its own forward takes no `num_items_in_batch`
        self.model_accepts_loss_kwargs = True
        # Sums of `_loss_sums` since the last log, on this rank. MPS has no float64.
        dtype = torch.float32 if self.args.device.type == "mps" else torch.float64
        self._train_sums = torch.zeros(6, dtype=dtype, device=self.args.device)

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
        example = next(iter(dataset))
        if "input_ids" not in example:
            is_text = formatting_func is not None
            if is_conversational_from_value(example):
                with global_then_local_main_first():
                    dataset = dataset.map(_name_roles)
            example = maybe_convert_to_chatml(copy.deepcopy(example))
            whole_rows = copy.copy(args)
            whole_rows.max_length, whole_rows.shuffle_dataset = None, False
            self.completion_only_loss = True  # label the completion, whatever its weight
            chat_template = self.chat_template
            if not is_text and "messages" in example and is_conversational(example):
                whole_rows.assistant_only_loss = True
                if not has_generation_markers(processing_class.chat_template):
                    self.chat_template = get_training_chat_template(processing_class)
                if not is_chat_template_stop_token_trained(processing_class, chat_template=self.chat_template):
                    logger.warning_once(
                        "The chat template leaves the end-of-turn token out of the assistant's turn. It counts as "
                        "prompt, so the model may not learn to stop. Move it inside `{% generation %}` in the template."
                    )
            elif is_text or "prompt" not in example:
                logger.warning_once(
                    "The data set has no prompt to weight: every token is completion and `prompt_loss_weight` has no "
                    "effect. Pass prompt/completion or `messages` columns to use both weights."
                )
            dataset = super()._prepare_dataset(
                dataset, processing_class, whole_rows, False, formatting_func, dataset_name
            )
            self.chat_template = chat_template  # other data sets keep the template they have in TRL
        elif not {*_MASK_COLUMNS, "labels"} & set(example):
            logger.warning_once(
                "The tokenized data set has no `completion_mask`, `assistant_masks` or `labels` column: every token is "
                "completion and `prompt_loss_weight` has no effect."
            )

        map_kwargs: dict[str, Any] = {}
        if isinstance(dataset, Dataset):  # `IterableDataset.map` supports neither
            map_kwargs = {"num_proc": args.dataset_num_proc, "desc": f"Finding completions in {dataset_name} dataset"}
        masks = [name for name in _MASK_COLUMNS if name in get_dataset_column_names(dataset)]
        with global_then_local_main_first():
            dataset = dataset.map(_label_regions, with_indices=True, remove_columns=masks, **map_kwargs)
        dataset = super()._prepare_dataset(dataset, processing_class, args, packing, None, dataset_name)
        return dataset.rename_column("labels", "completion_mask")

    def _drop_rows_without_target(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """
        Drops the rows in which every token weighs 0, as TRL drops fully masked ones: not when packing, where such a row
        keeps its place. Raises `ValueError` if no row has a target. Evaluation keeps all: it measures both regions.
        """
        weights = (self.args.prompt_loss_weight, self.args.completion_loss_weight)
        regions = [region for region, weight in enumerate(weights) if weight != 0]

        def has_target(example):
            return any(region in regions for region in example["completion_mask"][1:])

        kept = dataset
        if len(regions) == 1 and not self.args.packing:
            desc = {"desc": "Dropping rows without target from train dataset"} if isinstance(dataset, Dataset) else {}
            kept = dataset.filter(has_target, **desc)
        if not any(map(has_target, kept)):
            lengths = [len(example["input_ids"]) for example in dataset]
            max_length = self.args.max_length
            lost = 0 if max_length is None else sum(length >= max_length for length in lengths)
            raise ValueError(
                f"No row of the train dataset has a token left to train on. The weights of prompt and completion are "
                f"{weights}, and {lost} of {len(lengths)} rows were cut at `max_length={max_length}`. Raise "
                "`max_length`, give the other region a weight, or check the data."
            )
        if isinstance(kept, Dataset) and len(kept) < len(dataset):
            logger.warning(
                f"Dropped {len(dataset) - len(kept)} of {len(dataset)} rows of the train dataset: no token of non-zero "
                f"weight was left, mostly for being cut at `max_length={self.args.max_length}`."
            )
        return kept

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if "completion_mask" not in self._signature_columns:
            self._signature_columns.append("completion_mask")

    def _reject_skip_prepare_without_labels(self, datasets, data_collator) -> None:
        # TRL's collator ignores the mask columns, so TRL asks for labels. Ours reads `completion_mask`.
        unread = {
            name: dataset
            for name, dataset in datasets.items()
            if "completion_mask" not in get_dataset_column_names(dataset)
        }
        super()._reject_skip_prepare_without_labels(unread, data_collator)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        try:
            token_weights, completion_mask = inputs.pop("token_weights"), inputs.pop("completion_mask")
        except KeyError as error:
            raise ValueError(
                f"The data collator returned no {error}. Use `wit_trl.DataCollatorForWIT` (the default), or return "
                "`token_weights` and `completion_mask` as it does."
            ) from error

        # TRL's loss is the sum of `-outputs.log_probs` over `num_items_in_batch`, so weighing the log-probabilities
        # that the model returns weighs the loss, and TRL does all the rest
        def weighted_model(fused_lm_head=False, **kwargs):
            if not fused_lm_head:  # the full logits, for `compute_metrics`
                return model(**kwargs)
            if not self.model.training:  # score both regions, whatever their weights
                kwargs["labels"] = inputs["input_ids"].masked_fill(completion_mask == -100, -100)
            outputs = model(fused_lm_head=True, **kwargs)
            # Aligned with `log_probs` (B, T' - 1): prompt learning puts virtual tokens in front, which weigh nothing
            pad = (outputs.log_probs.size(1) + 1 - token_weights.size(1), 0)
            weights = F.pad(token_weights, pad)[:, 1:].to(outputs.log_probs.device)
            regions = F.pad(completion_mask, pad, value=-100)[:, 1:].to(outputs.log_probs.device)
            self._record(_loss_sums(outputs.log_probs.detach(), outputs.label_mask, weights, regions))
            outputs.log_probs = outputs.log_probs * weights
            outputs.label_mask = weights != 0
            outputs.entropy = outputs.entropy * outputs.label_mask
            outputs.is_top1 = outputs.is_top1 & outputs.label_mask
            return outputs

        return super().compute_loss(weighted_model, inputs, return_outputs, num_items_in_batch)

    def _record(self, sums: torch.Tensor) -> None:
        if self.model.training:
            self._train_sums += sums.sum(0).to(self._train_sums)
        else:  # by row, so that the rows which fill up the last batch on several ranks are left out
            self._eval_sums += self.accelerator.gather_for_metrics(sums).cpu().double().sum(0)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training and "loss" in logs:  # a training step, on every rank
            logs.update(_region_losses(self.accelerator.reduce(self._train_sums).tolist()))
            self._train_sums.zero_()
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self._eval_sums = torch.zeros(6, dtype=torch.float64)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        *regions, weighted_sum, count = self._eval_sums.tolist()
        # `Trainer` averages the losses of the batches, which is no mean over tokens
        losses = {"loss": weighted_sum / max(count, 1), **_region_losses(regions)}
        output.metrics.update({f"{metric_key_prefix}_{name}": loss for name, loss in losses.items()})
        return output


def _loss_sums(
    log_probs: torch.Tensor, scored: torch.Tensor, weights: torch.Tensor, regions: torch.Tensor
) -> torch.Tensor:
    """
    Returns, for each row, the negative log-likelihood and the number of its scored prompt tokens, the same of its
    scored completion tokens, its weighted negative log-likelihood, and the number of tokens of non-zero weight. All
    arguments are `(B, T)`, the result is `(B, 6)` in float32.
    """
    nll = -log_probs.float()
    prompt, completion = scored & (regions == 0), scored & (regions == 1)
    columns = (nll * prompt, prompt, nll * completion, completion, nll * weights, weights != 0)
    return torch.stack([column.sum(1, dtype=torch.float32) for column in columns], dim=1)


def _region_losses(sums: list[float]) -> dict[str, float]:
    """Returns the mean negative log-likelihood of each region that has tokens, from the first sums of `_loss_sums`."""
    prompt_sum, prompt_count, completion_sum, completion_count, *_ = sums
    losses = {}
    if prompt_count:
        losses["prompt_loss"] = prompt_sum / prompt_count
    if completion_count:
        losses["completion_loss"] = completion_sum / completion_count
    return losses
