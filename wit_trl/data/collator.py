"""`DataCollatorForWIT`: TRL's batches of text, with a weight for each token."""

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..config import STRUCTURE_SETTINGS, WEIGHT_SETTINGS, WITSFTConfig
from ..weights import StructureWeights, set_targets
from .prepared_rows import SPANS_COLUMN, read_tokens


@dataclass
class DataCollatorForWIT(DataCollatorForLanguageModeling):
    """
    Data collator that gives every token its weight as a prediction target.

    Pads or flattens (`padding_free=True`) as TRL's [`~trl.trainer.sft_trainer.DataCollatorForLanguageModeling`] does.
    Rows packed with known boundaries (`"seq_lengths"`) are always flattened, so that documents stay apart. The region
    of a token comes from `"labels"` (-100 marks the prompt), `"completion_mask"` (1 completion, 0 prompt) or
    `"assistant_masks"`. Without any of them, every token is completion. Next to TRL's keys, the batch holds three
    tensors of the shape of `"input_ids"`:

    - `"completion_mask"` (`int64`): 1 completion, 0 prompt, -100 for a token that is never a target: padding, and the
      first token of every document, which nothing predicts.
    - `"token_weights"` (`float32`): `completion_loss_weight` on completion tokens, `prompt_loss_weight` on prompt
      tokens, 0 where `"completion_mask"` is -100; times the `"weight"` and the `"token_weights"` of an example.
    - `"labels"` (`int64`): the token where its weight is not zero, -100 elsewhere. So the labels count the divisor of
      the loss and the weights scale its numerator.

    They describe the token *at* a position, not the one predicted there: the loss shifts. In a flattened batch,
    `"example_lengths"` gives the number of tokens of each example.

    Args:
        pad_token_id (`int`):
            Token ID to use for padding.
        padding_free (`bool`, *optional*, defaults to `False`):
            Flatten all documents of the batch into one row. Documents of a packed row are told apart by its
            `"seq_lengths"`.
        return_position_ids (`bool`, *optional*, defaults to `False`):
            Return position IDs in padded batches too.
        pad_to_multiple_of (`int`, *optional*):
            Pad the length to a multiple of this value.
        prompt_loss_weight (`float`, *optional*, defaults to `0.2`):
            Weight of a prompt token.
        completion_loss_weight (`float`, *optional*, defaults to `0.8`):
            Weight of a completion token.

    Example:
    ```python
    >>> from wit_trl import DataCollatorForWIT

    >>> collator = DataCollatorForWIT(pad_token_id=0, prompt_loss_weight=0.0, completion_loss_weight=0.8)
    >>> batch = collator(
    ...     [
    ...         {"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1]},
    ...         {"input_ids": [5, 9], "completion_mask": [0, 1]},
    ...     ]
    ... )
    >>> batch["token_weights"]
    tensor([[0.0000, 0.0000, 0.8000, 0.8000],
            [0.0000, 0.8000, 0.0000, 0.0000]])
    >>> batch["labels"]
    tensor([[-100, -100,    7,    8],
            [-100,    9, -100, -100]])
    >>> batch["completion_mask"]
    tensor([[-100,    0,    1,    1],
            [-100,    1, -100, -100]])
    ```
    """

    prompt_loss_weight: float = 0.2
    completion_loss_weight: float = 0.8

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        if "seq_lengths" in examples[0] and not self.padding_free:
            # TRL's class has the field, which mypy does not see
            return replace(self, padding_free=True).torch_call(examples)  # type: ignore[call-arg]
        rows, weights, spans = [], [], []
        for example in examples:
            input_ids, regions, of_tokens = read_tokens(example)
            # The region travels as `labels`, which the parent pads with -100 and sets to -100 where a document starts
            rows.append({**example, "input_ids": input_ids, "labels": regions})
            weights.append(of_tokens)
            if SPANS_COLUMN in example:
                spans.append(np.asarray(example[SPANS_COLUMN]))
        batch = super().torch_call(rows)
        region = batch["labels"]
        region[:, 0] = -100
        data_weights = torch.ones_like(region, dtype=torch.float32)
        lengths = torch.tensor([*map(len, weights)])
        in_rows = torch.arange(region.size(1)) < (lengths.sum() if self.padding_free else lengths[:, None])
        data_weights[in_rows.expand_as(region)] = torch.from_numpy(np.concatenate(weights))
        if spans:
            batch[SPANS_COLUMN] = torch.zeros_like(region)
            batch[SPANS_COLUMN][in_rows.expand_as(region)] = torch.from_numpy(np.concatenate(spans)).long()
        set_targets(batch, region, data_weights, (self.prompt_loss_weight, self.completion_loss_weight))
        if self.padding_free:
            batch["example_lengths"] = lengths
        return batch


def weight_settings(collator: type, args: WITSFTConfig) -> dict[str, Any]:
    """Returns the settings of the weights that a collator of this package needs."""
    names = {field.name for field in fields(collator)}
    return {name: getattr(args, name) for name in WEIGHT_SETTINGS if name in names}


def check_weights(collator: Any, args: WITSFTConfig) -> None:
    """
    Raises `ValueError` if a collator of this package has other weights than the [`WITSFTConfig`] (one of them was given
    others, or changed later), or if no preparation applies the weights of the structure.
    """
    expected = weight_settings(type(collator), args) if is_dataclass(collator) else {}
    actual = {name: getattr(collator, name) for name in expected}
    if changed := [name for name, value in expected.items() if (actual[name] or None) != (value or None)]:
        pairs = ", ".join(f"{name} is {actual[name]} and {expected[name]}" for name in changed)
        raise ValueError(
            f"The weights of the `{type(collator).__name__}` contradict those of the `WITSFTConfig`: {pairs}. Pass the "
            "same ones to both, or no collator. To train with other weights later, make a new trainer: the data was "
            "prepared for the old ones."
        )
    skips = (args.dataset_kwargs or {}).get("skip_prepare_dataset")
    if skips and not {*STRUCTURE_SETTINGS} <= {*expected} and args.structure_weights != StructureWeights():
        raise ValueError(
            f"{', '.join(f'`{name}`' for name in STRUCTURE_SETTINGS)} are applied when the data set is prepared, which "
            "`skip_prepare_dataset` skips. Give the rows `token_weights` instead."
        )
