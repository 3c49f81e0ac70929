from dataclasses import dataclass, replace
from typing import Any

import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling


NO_PROMPT_MESSAGE = (
    "The data set has no prompt to weight: every token is completion and `prompt_loss_weight` has no effect. Pass "
    "prompt/completion or `messages` columns to use both weights."
)
REGION_COLUMNS = ("labels", "completion_mask", "assistant_masks", "attention_mask")


def token_regions(example: dict[str, Any]) -> list[int]:
    """
    Returns the region of each token of a tokenized example: 1 completion, 0 prompt, -100 never a target.

    It is read from `"labels"` (-100 marks the prompt), else from `"completion_mask"` and `"assistant_masks"` (the
    completion is what is in both), else every token is completion. A token with `"attention_mask"` 0 is padding.

    Raises:
        `ValueError`: a column does not have one entry for each token, or holds other values.
    """
    input_ids = _token_values(example, "input_ids")
    if len(input_ids) == 0 or input_ids.is_floating_point() or (input_ids < 0).any():
        raise ValueError(f"`input_ids` must be the numbers of one token or more, but is {example['input_ids']!r}.")
    columns = {name: _token_values(example, name) for name in REGION_COLUMNS if name in example}
    for name, column in columns.items():
        if len(column) != len(input_ids):
            raise ValueError(
                f"`{name}` has {len(column)} entries, but `input_ids` has {len(input_ids)}. Give each token one."
            )
    padding = columns.pop("attention_mask", torch.ones_like(input_ids)) == 0
    if "labels" in columns:
        labels = columns["labels"]
        wrong = (labels != input_ids) & (labels != -100)
        if wrong.any():
            position = int(wrong.nonzero()[0])
            raise ValueError(
                f"The label at position {position} is {labels[position].item()}, but it must be the token itself, "
                f"{input_ids[position].item()} (completion), or -100 (prompt)."
            )
        columns = {"labels": labels != -100}
    regions = torch.ones_like(input_ids)
    for name, mask in columns.items():
        if not ((mask == 0) | (mask == 1) | (mask == -100)).all():
            raise ValueError(
                f"`{name}` holds {sorted(set(mask.tolist()) - {0, 1, -100})}, but it must hold 1 for a completion "
                "token and 0 for a prompt token. Weights are set by `prompt_loss_weight` and `completion_loss_weight`."
            )
        regions = regions.minimum(mask.to(regions.dtype))
    return regions.masked_fill(padding, -100).tolist()


def _token_values(example: dict[str, Any], name: str) -> torch.Tensor:
    try:
        values = torch.as_tensor(example.get(name))
    except (TypeError, ValueError, RuntimeError):  # torch has all three for what are no numbers
        values = torch.empty(())
    if values.ndim != 1:
        raise ValueError(f"`{name}` must be a list with a number for each token, but is {example.get(name)!r}.")
    return values


def token_weights(example: dict[str, Any]) -> torch.Tensor:
    """
    Returns the weight that the data itself gives each token of a tokenized example, in float32: its `"token_weights"`
    times the `"weight"` of the row. What is missing or `None` is 1.

    Raises:
        `ValueError`: a weight is negative, not finite or not a number, or not every token has one.
    """
    length = len(example["input_ids"])
    weights = torch.ones(length)
    if example.get("token_weights") is not None:
        weights = check_weights(example["token_weights"], "`token_weights`")
        if weights.shape != (length,):
            entries = " x ".join(map(str, weights.shape))
            raise ValueError(
                f"`token_weights` has {entries} entries, but `input_ids` has {length}. Give each token one number."
            )
    return weights * check_weight(example.get("weight"), "`weight`")


def check_weights(values: Any, name: str) -> torch.Tensor:
    """Returns weights as a tensor. Raises `ValueError` unless they are finite numbers that are not negative."""
    try:
        weights = torch.as_tensor(values, dtype=torch.float32)
    except (OverflowError, TypeError, ValueError, RuntimeError):  # torch has them all for what is no number
        weights = torch.tensor(torch.nan)
    if not (weights.isfinite() & (weights >= 0)).all():
        raise ValueError(f"{name} is {values!r}, but a weight must be a finite number (no text) that is not negative.")
    return weights


def check_weight(value: Any, name: str) -> float:
    """Returns a single weight, 1 for `None`. Raises `ValueError` unless it is a finite number that is not negative."""
    weight = check_weights(1 if value is None else value, name)
    if weight.ndim > 0:
        raise ValueError(f"{name} is {value!r}, but must be one number.")
    return weight.item()


def set_targets(
    batch: dict[str, Any],
    region: torch.Tensor,
    data_weights: torch.Tensor,
    prompt_loss_weight: float,
    completion_loss_weight: float,
) -> None:
    """
    Sets `"completion_mask"`, `"token_weights"` and `"labels"` of a batch from the region of each token and the weight
    that the data gives it, both of the shape of `"input_ids"`.
    """
    weights = torch.zeros_like(data_weights)
    weights[region == 0] = prompt_loss_weight
    weights[region == 1] = completion_loss_weight
    weights *= data_weights
    batch["completion_mask"] = region
    batch["token_weights"] = weights
    batch["labels"] = batch["input_ids"].masked_fill(weights == 0, -100)


@dataclass
class DataCollatorForWIT(DataCollatorForLanguageModeling):
    """
    Data collator that gives every token its weight as a prediction target.

    Pads or flattens (`padding_free=True`) as TRL's [`~trl.trainer.sft_trainer.DataCollatorForLanguageModeling`] does.
    Rows packed with known boundaries (`"seq_lengths"`) are always flattened, so that documents stay apart. The region
    of a token comes from `"labels"` (-100 marks the prompt), `"completion_mask"` (1 completion, 0 prompt) or
    `"assistant_masks"`; without any of them, every token is completion. Next to TRL's keys, the batch holds three
    tensors of the shape of `"input_ids"`:

    - `"completion_mask"` (`int64`): 1 completion, 0 prompt, -100 for a token that is never a target: padding, and the
      first token of every document, which nothing predicts.
    - `"token_weights"` (`float32`): `completion_loss_weight` on completion tokens, `prompt_loss_weight` on prompt
      tokens, 0 where `"completion_mask"` is -100; times the `"weight"` and the `"token_weights"` of an example.
    - `"labels"` (`int64`): the token where its weight is not zero, -100 elsewhere. So the labels count the divisor of
      the loss and the weights scale its numerator.

    They hold for the token *at* a position, not for the one predicted there: the loss shifts. In a
    flattened batch, `"example_lengths"` gives the number of tokens of each example.

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
            # mypy does not follow TRL's class, which has the field
            return replace(self, padding_free=True).torch_call(examples)  # type: ignore[call-arg]
        # The region travels as `labels`, which the parent pads with -100 and sets to -100 where a document starts
        batch = super().torch_call([{**example, "labels": token_regions(example)} for example in examples])
        region = batch["labels"]
        region[:, 0] = -100
        data_weights = torch.ones_like(region, dtype=torch.float32)
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        in_rows = torch.arange(region.size(1)) < (lengths.sum() if self.padding_free else lengths[:, None])
        data_weights[in_rows.expand_as(region)] = torch.cat([token_weights(example) for example in examples])
        set_targets(batch, region, data_weights, self.prompt_loss_weight, self.completion_loss_weight)
        if self.padding_free:
            batch["example_lengths"] = lengths
        return batch
