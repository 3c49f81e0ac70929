"""What the two weights do to a training set: counts, shares and lengths, from its rows."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.compute as pc
from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from .._upstream import get_dataset_column_names
from ..weights import REGIONS, StructureWeights, token_regions, token_weights


logger = get_logger(__name__)

# Rows that are counted at most: of a stream, each is prepared for it; of rows that nobody prepared, each is read in
# Python; of a prepared `Dataset`, a million take a few seconds
STREAMED_ROWS, STORED_ROWS = 1000, 1_000_000
# Next to `completion_mask` and `token_weights`, which hold all of it once rows are prepared
_COLUMNS_THE_COLLATOR_READS = {"labels", "assistant_masks", "attention_mask", "weight"}
# Below this share of the weight a region is as good as left out
NEGLIGIBLE_SHARE = 0.001


@dataclass(frozen=True)
class RowLengths:
    """
    What rows were before truncation, packing and dropping, as the preparation notes it in columns of these names.

    Args:
        prompt_length (`np.ndarray`): Number of prompt tokens of each row, its first token included.
        completion_length (`np.ndarray`): Number of completion tokens of each row.
        truncated (`np.ndarray`): Whether the row is cut to `max_length`.
        completion_lost (`np.ndarray`): Whether it loses all completion tokens in this way.
    """

    prompt_length: np.ndarray
    completion_length: np.ndarray
    truncated: np.ndarray
    completion_lost: np.ndarray

    @classmethod
    def read(cls, dataset: Dataset | IterableDataset | list[dict[str, Any]]) -> "RowLengths | None":
        """Returns the lengths of all rows, or of the first rows of a stream. `None` if no preparation noted them."""
        columns = dataset[0] if isinstance(dataset, list) else get_dataset_column_names(dataset)
        if not {*LENGTH_COLUMNS} <= {*columns}:
            return None
        if isinstance(dataset, list):
            dataset = Dataset.from_list(dataset)
        if isinstance(dataset, IterableDataset):
            dataset = dataset.take(STREAMED_ROWS)
        columns = {name: [np.zeros(0, int)] for name in LENGTH_COLUMNS}
        for table in dataset.select_columns(list(LENGTH_COLUMNS)).with_format("arrow").iter(batch_size=10_000):
            for name, arrays in columns.items():
                arrays.append(table[name].to_numpy())
        return cls(**{name: np.concatenate(arrays) for name, arrays in columns.items()})


LENGTH_COLUMNS = tuple(RowLengths.__dataclass_fields__)


@dataclass(frozen=True)
class WeightReport:
    """
    What the weights do to a training set. See [`weigh`]. Prints as a table with rich.

    Args:
        rows (`int`): Rows that were counted.
        partial (`bool`): Whether these are only the first rows.
        loss_weights (`tuple[float, float]`): Weight of a prompt token and of a completion token.
        tokens (`dict[int, int]`): Tokens of each region: 0 prompt, 1 completion, -100 never a target (padding, and the
            first token of every document, which nothing predicts).
        nonzero (`dict[int, int]`): Those of them whose weight is not zero.
        weight (`dict[int, float]`): Sum of their weights.
        data_weights (`tuple[float, float]`): The smallest and the largest weight that the data gives a token by itself.
        gradient_scale (`float`, *optional*): Factor by which the gradient of the completion is scaled against
            conventional tuning. `None` if no completion token has a weight in the data.
        lengths (`tuple[np.ndarray, np.ndarray]`): Number of prompt tokens and of completion tokens of each row or
            document, before truncation and with the rows that were dropped, where that is known.
        truncated (`int`, *optional*): Rows cut to `max_length`. `None` if unknown.
        without_completion (`int`, *optional*): Rows that lost their whole completion in this way. `None` if unknown.
        dropped (`int`, *optional*): Rows dropped because no token of non-zero weight was left. `None` if unknown.
        structure ([`StructureWeights`]): What roles and the chat template's own tokens were given.
        loss_divisor (`str`): What the weighted sum is divided by, the `"count"` or the `"weights"`.
        token_factors (`str`, *optional*): What multiplies the loss of each token in training.
    """

    rows: int
    partial: bool
    loss_weights: tuple[float, float]
    tokens: dict[int, int]
    nonzero: dict[int, int]
    weight: dict[int, float]
    data_weights: tuple[float, float]
    gradient_scale: float | None
    lengths: tuple[np.ndarray, np.ndarray]
    truncated: int | None
    without_completion: int | None
    dropped: int | None
    structure: StructureWeights = field(default_factory=StructureWeights)
    loss_divisor: str = "count"
    token_factors: str | None = None

    @property
    def negligible_regions(self) -> list[str]:
        """Regions with a weight above zero and with tokens, but with hardly any of the weight of all tokens."""
        total = sum(self.weight.values())
        return [
            REGIONS[region]
            for region, loss_weight in enumerate(self.loss_weights)
            if loss_weight > 0 and self.nonzero[region] and self.weight[region] < NEGLIGIBLE_SHARE * total
        ]

    def __rich__(self) -> RenderableType:
        tokens, weight = sum(self.tokens.values()), sum(self.weight.values())
        zero = tokens - sum(self.nonzero.values())
        title = f"What is weighted in {'the first ' if self.partial else ''}{self.rows:,} rows"
        table = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
        for header in ("", "loss weight", "tokens", "share", "share of the weight"):
            table.add_column(header, justify="right" if header else "left")
        for region, name in REGIONS.items():
            loss_weight = f"{self.loss_weights[region]:g}" if region >= 0 else "0"
            count, region_weight = self.tokens[region], self.weight[region]
            table.add_row(name, loss_weight, f"{count:,}", _percent(count, tokens), _percent(region_weight, weight))
        table.add_section()
        table.add_row("all", "", f"{tokens:,}", _percent(tokens, tokens), _percent(weight, weight))
        table.add_row("of zero weight", "", f"{zero:,}", _percent(zero, tokens), _percent(0, weight))

        # ASCII alone: what cannot be encoded in a log file would end the training
        scale = "-" if self.gradient_scale is None else f"x {self.gradient_scale:.3g}"
        facts = Table.grid(padding=(0, 2), pad_edge=True)
        least, most = self.data_weights
        facts.add_row("weights in the data", "none" if least == most == 1 else f"{least:g} to {most:g}")
        for role, weight in self.structure.role_loss_weights.items():
            facts.add_row(f"weight of the role {role}", f"{weight:g}")
        if self.structure.chat_template_loss_weight != 1:
            facts.add_row("weight of what the template writes", f"{self.structure.chat_template_loss_weight:g}")
        if self.structure.completion_turns != "all":
            facts.add_row("turns that are completion", self.structure.completion_turns)
        if self.token_factors is not None:
            facts.add_row("factor of each token in training", self.token_factors)
        facts.add_row("completion tokens to a prompt token", _ratio(self.tokens[1], self.tokens[0]))
        facts.add_row("gradient of the completion against conventional tuning *", scale)
        facts.add_row("rows truncated", _count(self.truncated))
        facts.add_row("rows with no completion left", _count(self.without_completion))
        facts.add_row("rows dropped", _count(self.dropped))
        formula = "completion_loss_weight * completion / all, in tokens of non-zero weight."
        if self.loss_divisor == "weights":
            formula = "share of the weight, because the loss is divided by the sum of the weights."
        note = (
            f"  * {formula}\n"
            "    Adam without clipping undoes this factor. With clipping, fewer steps are\n"
            "    clipped. With SGD, it scales the learning rate.\n"
            "  loss is weighted; prompt_loss and completion_loss compare between runs."
        )
        return Group(table, facts, Text(note, style="dim"))


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _ratio(numerator: int, denominator: int) -> str:
    return f"{numerator / denominator:.3g}" if denominator else "-"


def _count(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"


def weigh(
    rows: Dataset | IterableDataset | list[dict[str, Any]],
    loss_weights: tuple[float, float],
    lengths: RowLengths | None = None,
    dropped: int | None = None,
    partial: bool | None = None,
    structure: StructureWeights | None = None,
    loss_divisor: str = "count",
    token_factors: str | None = None,
) -> WeightReport:
    r"""
    Returns the [`WeightReport`] of a tokenized training set: of its first thousand rows if it is a stream or was not
    prepared by the trainer, else of its first million.

    With \\( N \\) the number of tokens of non-zero weight and \\( N_c \\) the number of completion tokens among them, a
    completion token of weight \\( \lambda_r \\) has the share \\( \lambda_r / N \\) in the loss, and \\( 1 / N_c \\) in
    conventional tuning, which has the weights (0, 1). So the gradient of the completion is scaled by
    \\( \lambda_r N_c / N \\), over the whole data set. Where the loss is divided by the sum of the weights, it is the
    share of the completion in that.

    Args:
        rows (`Dataset`, `IterableDataset` or `list[dict]`):
            The rows that are trained on, with `"input_ids"` and what `DataCollatorForWIT` takes.
        loss_weights (`tuple[float, float]`):
            Weight of a prompt token and of a completion token.
        lengths ([`RowLengths`], *optional*):
            What the rows were before. Read from them if they tell.
        dropped (`int`, *optional*):
            Number of rows that were dropped.
        partial (`bool`, *optional*):
            Whether `rows` are only the first ones. Told by `rows` itself, unless it is a list of some of them.
        structure ([`StructureWeights`], *optional*):
            What roles and the chat template's own tokens were given, to be shown.
        loss_divisor (`str`, *optional*, defaults to `"count"`):
            What the weighted sum is divided by.
        token_factors (`str`, *optional*):
            What multiplies the loss of each token in training, to be shown.

    Raises:
        `ValueError`: a row is not tokenized, is read through a transform, or its masks or weights are wrong.
    """
    if not isinstance(rows, Dataset | IterableDataset | list):
        raise ValueError(f"The rows of a `{type(rows).__name__}` cannot be counted without using them up.")
    if isinstance(rows, Dataset) and rows.format["type"] == "custom":
        raise ValueError("The data set has a transform (`with_transform`), so its rows may differ at every reading.")
    count, tokens, least, most = 0, dict.fromkeys(REGIONS, 0), np.inf, 0.0
    nonzero, data_weight = dict.fromkeys(REGIONS, 0), dict.fromkeys(REGIONS, 0.0)
    prompt_lengths, completion_lengths = [np.zeros(0, int)], [np.zeros(0, int)]
    for batch in _batches(rows):
        count += batch.rows
        for region, region_lengths in ((0, prompt_lengths), (1, completion_lengths)):
            before = np.concatenate([[0], np.cumsum(batch.regions == region)])
            region_lengths.append(before[batch.ends] - before[batch.ends - batch.lengths])
        regions = batch.regions.copy()
        regions[(batch.ends - batch.lengths)[batch.lengths > 0]] = -100  # nothing predicts the first token
        weights = batch.weights[regions >= 0]
        least, most = min(least, weights.min(initial=np.inf)), max(most, weights.max(initial=0))
        for region in REGIONS:
            here = regions == region
            tokens[region] += int(np.count_nonzero(here))
            nonzero[region] += int(np.count_nonzero(batch.weights[here]))
            data_weight[region] += float(batch.weights[here].sum(dtype=np.float64))
    weighted_completion = nonzero[1]
    nonzero = {region: nonzero[region] if region >= 0 and loss_weights[region] else 0 for region in REGIONS}
    weight = {region: loss_weights[region] * data_weight[region] if region >= 0 else 0.0 for region in REGIONS}
    part, total = loss_weights[1] * nonzero[1], float(sum(nonzero.values()))
    if loss_divisor == "weights":
        part, total = weight[1], sum(weight.values())
    if lengths is None:
        lengths = RowLengths.read(rows)
    return WeightReport(
        rows=count,
        partial=isinstance(rows, IterableDataset) or count < len(rows) if partial is None else partial,
        loss_weights=loss_weights,
        tokens=tokens,
        nonzero=nonzero,
        weight=weight,
        data_weights=(least, most),
        gradient_scale=part / total if weighted_completion and total else None,
        lengths=(np.concatenate(prompt_lengths), np.concatenate(completion_lengths))
        if lengths is None
        else (lengths.prompt_length, lengths.completion_length),
        truncated=None if lengths is None else int(np.count_nonzero(lengths.truncated)),
        without_completion=None if lengths is None else int(np.count_nonzero(lengths.completion_lost)),
        dropped=dropped,
        structure=structure or StructureWeights(),
        loss_divisor=loss_divisor,
        token_factors=token_factors,
    )


def print_report(make_report: Callable[[], WeightReport], max_length: int | None, messages_are_new: bool) -> None:
    """
    Prints a report on the main process, with warnings of what is odd in it. Whatever the data is, it raises nothing.

    Args:
        make_report (`Callable`):
            What makes the report.
        max_length (`int`, *optional*):
            Length that rows are cut to.
        messages_are_new (`bool`):
            Whether to say what `SFTTrainer` does with `messages`.
    """
    try:
        report = make_report()
    except Exception as error:
        logger.warning(f"There is no table of what is weighted: {error}")
        return
    if not PartialState().is_main_process:
        return
    console = Console()
    console.print(report)
    if messages_are_new and report.loss_weights != (1, 1):
        console.print("  SFTTrainer trains messages with (1, 1), unless assistant_only_loss is set.\n", style="dim")
    if report.without_completion:
        logger.warning(
            f"Rows with no completion left within `max_length={max_length}`: {report.without_completion:,}. They train "
            "their prompt at most. Raise `max_length`, or remove them."
        )
    for region in report.negligible_regions:
        logger.warning(
            f"The {region} has less than {NEGLIGIBLE_SHARE:.1%} of the weight, so it is hardly trained. Check the "
            f"weights: (prompt, completion) is {report.loss_weights}."
        )


@dataclass
class _Batch:
    """Some rows, flattened: lengths and ends of their documents; region and data weight of their tokens."""

    rows: int
    lengths: np.ndarray
    ends: np.ndarray
    regions: np.ndarray
    weights: np.ndarray


def _batches(rows: Dataset | IterableDataset | list[dict[str, Any]]) -> Iterator[_Batch]:
    """Yields the first rows in batches."""
    columns = set() if isinstance(rows, list) else {*get_dataset_column_names(rows)}
    is_prepared = {"completion_mask", "token_weights"} <= columns and columns.isdisjoint(_COLUMNS_THE_COLLATOR_READS)
    if is_prepared and not isinstance(rows, list):
        # `take` of more rows than there are is an error before datasets 5.2
        count = STREAMED_ROWS if isinstance(rows, IterableDataset) else min(STORED_ROWS, len(rows))
        dataset = rows.take(count)
    else:
        dataset = _read_as_the_collator(itertools.islice(rows, STREAMED_ROWS))
        columns = {*dataset.column_names}
    names = ["completion_mask", "token_weights"] + ["seq_lengths"] * ("seq_lengths" in columns)
    for table in dataset.select_columns(names).with_format("arrow").iter(batch_size=1000):
        arrays = {name: pc.list_flatten(table[name]).to_numpy() for name in names}
        # Of the documents of a packed row, else of rows
        lengths = arrays["seq_lengths"] if "seq_lengths" in arrays else pc.list_value_length(table[names[0]]).to_numpy()
        lengths = lengths.astype(np.int64)
        yield _Batch(len(table), lengths, np.cumsum(lengths), arrays["completion_mask"], arrays["token_weights"])


def _read_as_the_collator(rows: Iterable[dict[str, Any]]) -> Dataset:
    """Returns rows that nobody prepared with the regions and weights that the collator reads from them."""
    read = []
    for row in rows:
        whole = {"completion_mask": token_regions(row), "token_weights": token_weights(row).tolist()}
        read.append(whole | {name: row[name] for name in ("seq_lengths",) if name in row})
    return Dataset.from_list(read)
