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

from ..data.prepared_rows import LENGTH_COLUMNS, STREAMED_ROWS, RowLengths
from ..weights import REGIONS, StructureWeights, token_regions, token_weights


logger = get_logger(__name__)

# Rows of a prepared `Dataset` that are counted at most, which takes a few seconds. Of others, `STREAMED_ROWS` are
# counted: each row of a stream is prepared for it, and each row that nobody prepared is read in Python
STORED_ROWS = 1_000_000
# Next to `completion_mask` and `token_weights`, which hold all of it once rows are prepared
_COLUMNS_THE_COLLATOR_READS = {"labels", "assistant_masks", "attention_mask", "weight"}
# Below this share of the weight a region is as good as left out
NEGLIGIBLE_SHARE = 0.001


@dataclass(frozen=True)
class WeightReport:
    """
    What the weights do to a training set. [`weigh`] makes it. Prints as a table with rich.

    Args:
        rows (`int`): Number of rows that were counted.
        partial (`bool`): Whether these are only the first rows.
        loss_weights (`tuple[float, float]`): Weight of a prompt token and of a completion token.
        tokens (`dict[int, int]`): Number of tokens of each region: 0 prompt, 1 completion, -100 never a target
            (padding, and the first token of every document, which nothing predicts).
        data_nonzero (`dict[int, int]`): Number of those whose data weight is not zero.
        data_weight (`dict[int, float]`): Sum of their data weights.
        data_weights (`tuple[float, float]`): The smallest and the largest data weight of a token.
        lengths (`tuple[np.ndarray, np.ndarray]`): Number of prompt tokens and of completion tokens of each row or
            document. Where the preparation noted it, that is before truncation and with the rows that were dropped.
        truncated (`int`, *optional*): Number of rows that are cut to `max_length`. `None` if unknown.
        without_completion (`int`, *optional*): Number of rows that lose their whole completion so. `None` if unknown.
        dropped (`int`, *optional*): Number of rows without a token of non-zero weight, which were dropped. `None` if
            unknown.
        structure ([`StructureWeights`]): Weights of roles and of the chat template's own tokens.
        loss_divisor (`str`): What the weighted sum is divided by, the `"count"` or the `"weights"`.
        token_factors (`str`, *optional*): What multiplies the loss of each token in training.
    """

    rows: int
    partial: bool
    loss_weights: tuple[float, float]
    tokens: dict[int, int]
    data_nonzero: dict[int, int]
    data_weight: dict[int, float]
    data_weights: tuple[float, float]
    lengths: tuple[np.ndarray, np.ndarray]
    truncated: int | None
    without_completion: int | None
    dropped: int | None = None
    structure: StructureWeights = field(default_factory=StructureWeights)
    loss_divisor: str = "count"
    token_factors: str | None = None

    @property
    def nonzero(self) -> dict[int, int]:
        """Number of tokens of each region whose weight is not zero."""
        return {-100: 0} | {r: self.data_nonzero[r] if w else 0 for r, w in enumerate(self.loss_weights)}

    @property
    def weight(self) -> dict[int, float]:
        """Sum of the weights of the tokens of each region."""
        return {-100: 0.0} | {r: w * self.data_weight[r] for r, w in enumerate(self.loss_weights)}

    @property
    def gradient_scale(self) -> float | None:
        r"""
        Factor by which the gradient of the completion is scaled against conventional tuning, over the whole data set.
        `None` if no completion token has a data weight.

        With \\( N \\) the number of tokens of non-zero weight and \\( N_c \\) the number of completion tokens among
        them, a completion token of weight \\( \lambda_r \\) has the share \\( \lambda_r / N \\) in the loss. In
        conventional tuning, which has the weights (0, 1), it has \\( 1 / N_c \\). So the factor is \\( \lambda_r N_c /
        N \\). Where the loss is divided by the sum of the weights, it is the completion's share of that.
        """
        part, total = self.loss_weights[1] * self.nonzero[1], float(sum(self.nonzero.values()))
        if self.loss_divisor == "weights":
            part, total = self.weight[1], sum(self.weight.values())
        return part / total if self.data_nonzero[1] and total else None

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
    partial: bool | None = None,
) -> WeightReport:
    """
    Returns the counts of a [`WeightReport`]: of the first thousand rows of a stream or of rows that the trainer did not
    prepare, else of the first million.

    Args:
        rows (`Dataset`, `IterableDataset` or `list[dict]`):
            The rows that are trained on, with `"input_ids"` and what `DataCollatorForWIT` takes.
        loss_weights (`tuple[float, float]`):
            Weight of a prompt token and of a completion token.
        lengths ([`RowLengths`], *optional*):
            What the rows were before. By default the rows tell, if they were prepared.
        partial (`bool`, *optional*):
            Whether `rows` are only the first ones. By default `rows` tell.

    Raises:
        `ValueError`: a row is not tokenized, is read through a transform, or its masks or weights are wrong.
    """
    if not isinstance(rows, Dataset | IterableDataset | list):
        raise ValueError(f"The rows of a `{type(rows).__name__}` cannot be counted without using them up.")
    if isinstance(rows, Dataset) and rows.format["type"] == "custom":
        raise ValueError("The data set has a transform (`with_transform`), so its rows may differ at every reading.")
    tokens, nonzero, data_weight = dict.fromkeys(REGIONS, 0), dict.fromkeys(REGIONS, 0), dict.fromkeys(REGIONS, 0.0)
    least, most = np.inf, 0.0
    by_region: tuple[list, list] = ([], [])
    noted: list[RowLengths] = []
    count = 0
    for batch in _batches(rows):
        count += batch.rows
        starts = batch.ends - batch.lengths
        for region, region_lengths in enumerate(by_region):
            before = np.concatenate([[0], np.cumsum(batch.regions == region)])
            region_lengths.append(before[batch.ends] - before[starts])
        regions = batch.regions.copy()
        regions[starts[batch.lengths > 0]] = -100  # nothing predicts the first token
        weights = batch.weights[regions >= 0]
        least, most = min(least, weights.min(initial=np.inf)), max(most, weights.max(initial=0))
        for region in REGIONS:
            here = batch.weights[regions == region]
            tokens[region] += len(here)
            nonzero[region] += int(np.count_nonzero(here))
            data_weight[region] += float(here.sum(dtype=np.float64))
        if batch.noted is not None:
            noted.append(batch.noted)
    if lengths is None and noted:
        lengths = RowLengths(*(np.concatenate([getattr(part, name) for part in noted]) for name in LENGTH_COLUMNS))
    if lengths is None:
        prompt, completion = (np.concatenate(parts or [np.zeros(0, int)]) for parts in by_region)
    else:
        prompt, completion = lengths.prompt_length, lengths.completion_length
    return WeightReport(
        rows=count,
        partial=isinstance(rows, IterableDataset) or count < len(rows) if partial is None else partial,
        loss_weights=loss_weights,
        tokens=tokens,
        data_nonzero=nonzero,
        data_weight=data_weight,
        data_weights=(least, most),
        lengths=(prompt, completion),
        truncated=None if lengths is None else int(np.count_nonzero(lengths.truncated)),
        without_completion=None if lengths is None else int(np.count_nonzero(lengths.completion_lost)),
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
    noted: RowLengths | None


def _batches(rows: Dataset | IterableDataset | list[dict[str, Any]]) -> Iterator[_Batch]:
    """Yields the first rows in batches. It reads a stream once."""
    if isinstance(rows, Dataset) and _is_prepared(rows.column_names):
        # `take` of more rows than there are is an error before datasets 5.2
        dataset = rows.take(min(STORED_ROWS, len(rows)))
    else:
        first = list(itertools.islice(rows, STREAMED_ROWS))
        if not first or not _is_prepared(first[0]):
            first = [_read_as_the_collator(row) for row in first]
        dataset = Dataset.from_list(first)
    names = ["completion_mask", "token_weights"]
    optional = [name for name in ("seq_lengths", *LENGTH_COLUMNS) if name in dataset.column_names]
    has_lengths = {*LENGTH_COLUMNS} <= {*optional}
    for table in dataset.select_columns(names + optional).with_format("arrow").iter(batch_size=1000):
        regions, weights = (pc.list_flatten(table[name]).to_numpy() for name in names)
        # Of the documents of a packed row, else of rows
        if "seq_lengths" in optional:
            lengths = pc.list_flatten(table["seq_lengths"]).to_numpy()
        else:
            lengths = pc.list_value_length(table["completion_mask"]).to_numpy()
        lengths = lengths.astype(np.int64)
        noted = RowLengths(*(table[name].to_numpy() for name in LENGTH_COLUMNS)) if has_lengths else None
        yield _Batch(len(table), lengths, np.cumsum(lengths), regions, weights, noted)


def _is_prepared(columns: Iterable[str]) -> bool:
    return {"completion_mask", "token_weights"} <= {*columns} and _COLUMNS_THE_COLLATOR_READS.isdisjoint(columns)


def _read_as_the_collator(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the regions and data weights that the collator reads from a row that nobody prepared."""
    read = {"completion_mask": token_regions(row), "token_weights": token_weights(row).tolist()}
    return read | {name: row[name] for name in ("seq_lengths",) if name in row}
