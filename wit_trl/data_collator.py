from dataclasses import dataclass, replace
from typing import Any

import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling


REGION_COLUMNS = ("labels", "completion_mask", "assistant_masks", "attention_mask")


def token_regions(example: dict[str, Any]) -> list[int]:
    """
    Returns the region of each token of a tokenized example: 1 completion, 0 prompt, -100 never a target.

    It is read from `"labels"` (-100 marks the prompt), else from `"completion_mask"` and `"assistant_masks"` (the
    completion is what is in both), else every token is completion. A token with `"attention_mask"` 0 is padding.

    Raises:
        `ValueError`: a column does not have one entry for each token, or holds other values.
    """
    input_ids = torch.as_tensor(example["input_ids"])
    columns = {name: torch.as_tensor(example[name]) for name in REGION_COLUMNS if name in example}
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
      tokens, 0 where `"completion_mask"` is -100.
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
        weights = torch.zeros_like(region, dtype=torch.float32)
        weights[region == 0] = self.prompt_loss_weight
        weights[region == 1] = self.completion_loss_weight
        batch["completion_mask"] = region
        batch["token_weights"] = weights
        batch["labels"] = batch["input_ids"].masked_fill(weights == 0, -100)
        if self.padding_free:
            batch["example_lengths"] = torch.tensor([len(example["input_ids"]) for example in examples])
        return batch
