"""What the two weights do to a training set: counts, shares and lengths, from its rows."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import pyarrow.compute as pc
from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..data.prepared_rows import LENGTH_COLUMNS, SPANS_COLUMN, STREAMED_ROWS, TOKEN_COLUMNS, RowLengths, read_tokens
from ..weights import REGIONS, StructureWeights
from .page import printable


logger = get_logger(__name__)

Rows: TypeAlias = Dataset | IterableDataset | list[dict[str, Any]]

# Of a prepared `Dataset`, at most this number of rows is counted, which takes a few seconds. Other rows are slower: a
# stream prepares each for it, and rows that nobody prepared are read in Python. Of these, `STREAMED_ROWS` are counted
STORED_ROWS = 1_000_000
# Prepared rows have none of these: their `completion_mask` and `token_weights` hold all of it
_COLUMNS_THE_COLLATOR_READS = {"labels", "assistant_masks", "attention_mask", "weight"}
# What truncation does to rows: the column whose sum it is, and what the table calls it
_CUTS = {
    "truncated": ("truncated", "rows truncated"),
    "completion_cut": ("completion_cut", "completion tokens cut off"),
    "answers_cut": ("answer_cut", "rows whose last answer lost its end"),
    "answers_lost": ("answer_lost", "rows whose last answer is cut off whole"),
    "without_completion": ("completion_lost", "rows with no completion left"),
}
# Below this share of the weight a region is as good as left out
NEGLIGIBLE_SHARE = 0.001


@dataclass(frozen=True)
class WeightReport:
    """What the weights do to a training set, as [`weigh`] counts it. With rich, it prints as a table."""

    rows: int  # that were counted
    partial: bool  # whether these are only the first rows
    loss_weights: tuple[float, float]  # of a prompt token and of a completion token
    # By region: 0 prompt, 1 completion, -100 never a target: padding, and the first token of every document, which
    # nothing predicts
    tokens: dict[int, int]  # number of tokens
    data_nonzero: dict[int, int]  # number of tokens whose data weight is not zero
    data_weight: dict[int, float]  # sum of the data weights
    data_weights: tuple[float, float]  # the smallest and the largest data weight of a token
    # By span and by pattern, where they have weights: the weight, number of targets, and sum of their weights
    spans: dict[str, tuple[float, int, float]]
    # Number of prompt tokens and of completion tokens of each row or document: before truncation and with the dropped
    # rows, where the preparation noted this
    lengths: tuple[np.ndarray, np.ndarray]
    # Numbers of rows, `None` if unknown
    truncated: int | None = None  # cut to `max_length`
    without_completion: int | None = None  # whose whole completion is cut off
    answers_cut: int | None = None  # whose last answer lost its end
    answers_lost: int | None = None  # whose last answer is cut off whole
    completion_cut: int | None = None  # of completion tokens that are cut off, not of rows
    thinking_left_out: int | None = None  # turns whose thinking the chat template does not write
    dropped: int | None = None  # because no token has a weight other than zero
    structure: StructureWeights = field(default_factory=StructureWeights)
    loss_divisor: str = "count"  # what the weighted sum is divided by: the "count" or the "weights"
    token_factors: str | None = None  # what multiplies the loss of each token in training

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
        all_tokens, all_weight = sum(self.tokens.values()), sum(self.weight.values())
        zero = all_tokens - sum(self.nonzero.values())
        title = f"What is weighted in {'the first ' if self.partial else ''}{self.rows:,} rows"
        table = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
        for header in ("", "loss weight", "tokens", "share", "share of the weight"):
            table.add_column(header, justify="right" if header else "left")

        def add_row(name: str | Text, loss_weight: str, tokens: int, weight: float) -> None:
            table.add_row(name, loss_weight, f"{tokens:,}", _percent(tokens, all_tokens), _percent(weight, all_weight))

        for (region, name), loss_weight in zip(REGIONS.items(), (*self.loss_weights, 0), strict=True):
            add_row(name, f"{loss_weight:g}", self.tokens[region], self.weight[region])
        for name, (factor, tokens, weight) in self.spans.items():
            add_row(Text(f"  {printable(name)}"), f"x {factor:g}", tokens, weight)
        table.add_section()
        add_row("all", "", all_tokens, all_weight)
        add_row("of zero weight", "", zero, 0)

        # ASCII alone: what cannot be encoded in a log file would end the training
        facts = Table.grid(padding=(0, 2), pad_edge=True)
        least, most = self.data_weights
        facts.add_row("weights in the data", "none" if least == most == 1 else f"{least:g} to {most:g}")
        for role, weight in self.structure.role_loss_weights.items():
            facts.add_row(Text(f"weight of the role {repr(role)[1:-1]}"), f"{weight:g}")
        if self.structure.chat_template_loss_weight != 1:
            facts.add_row("weight of what the template writes", f"{self.structure.chat_template_loss_weight:g}")
        if self.structure.completion_turns != "all":
            facts.add_row("turns that are completion", self.structure.completion_turns)
        if self.token_factors is not None:
            facts.add_row("factor of each token in training", self.token_factors)
        ratio = f"{self.tokens[1] / self.tokens[0]:.3g}" if self.tokens[0] else "-"
        facts.add_row("completion tokens to a prompt token", ratio)
        scale = "-" if self.gradient_scale is None else f"x {self.gradient_scale:.3g}"
        facts.add_row("gradient of the completion against conventional tuning *", scale)
        if self.structure.span_loss_weights:
            number = "unknown" if self.thinking_left_out is None else f"{self.thinking_left_out:,}"
            facts.add_row("turns whose thinking the template leaves out", number)
        lost = {name: getattr(self, cut) for cut, (_, name) in _CUTS.items()} | {"rows dropped": self.dropped}
        for name, number in lost.items():
            facts.add_row(name, "unknown" if number is None else f"{number:,}")
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


def weigh(
    rows: Rows,
    loss_weights: tuple[float, float],
    lengths: RowLengths | None = None,
    partial: bool | None = None,
    structure: StructureWeights | None = None,
) -> WeightReport:
    """
    Returns the counts of a [`WeightReport`] for tokenized rows: the first million if they were prepared, but the first
    thousand of a stream or of rows that nobody prepared. Unless they are given, `lengths` (before truncation) and
    `partial` (whether `rows` are only the first ones of a set) follow from the rows.

    Raises:
        `ValueError`: a row is not tokenized, is read through a transform, or its masks or weights are wrong.
    """
    if not isinstance(rows, Dataset | IterableDataset | list):
        raise ValueError(f"The rows of a `{type(rows).__name__}` cannot be counted without using them up.")
    if isinstance(rows, Dataset) and rows.format["type"] == "custom":
        raise ValueError("The data set has a transform (`with_transform`), so its rows may differ at every reading.")
    counted = _first_rows(rows)
    # `seq_lengths` are those of the documents of packed rows
    columns = [
        name
        for name in ("completion_mask", "token_weights", SPANS_COLUMN, "seq_lengths")
        if name in counted.column_names
    ]
    structure = structure or StructureWeights()
    of_spans: dict[str, np.ndarray] = {}
    totals = np.zeros((3, len(REGIONS)))  # by region: tokens, tokens whose data weight is not zero, data weights
    least, most = np.inf, 0.0
    document_lengths = [np.zeros((2, 0), int)]  # by region
    for table in counted.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        values = {name: pc.list_flatten(table[name]).to_numpy() for name in columns}
        regions, weights = values["completion_mask"], values["token_weights"]
        sizes = values.get("seq_lengths", pc.list_value_length(table["completion_mask"]).to_numpy())
        document = np.repeat(np.arange(len(sizes)), sizes)  # of each token
        document_lengths.append(
            np.stack([np.bincount(document[regions == region], minlength=len(sizes)) for region in (0, 1)])
        )
        regions = np.where(np.diff(document, prepend=-1) > 0, -100, regions)  # nothing predicts the first token
        of_targets = weights[regions >= 0]
        least, most = min(least, of_targets.min(initial=np.inf)), max(most, of_targets.max(initial=0))
        index = np.where(regions < 0, 2, regions)
        codes = values.get(SPANS_COLUMN, np.zeros(len(regions), int))
        for name, factor, in_span in structure.tokens_of_spans(codes):
            is_target = in_span & (regions >= 0)
            loss = weights[is_target] * np.take(loss_weights, regions[is_target])
            known = of_spans.setdefault(name, np.array([1.0 if factor is None else factor, 0, 0]))
            known[1:] += is_target.sum(), loss.sum()
        totals += [np.bincount(index, values, len(REGIONS)) for values in (None, weights != 0, weights)]
    prompt, completion = np.concatenate(document_lengths, axis=1)
    cuts: dict[str, Any] = {}
    if lengths is None and {*LENGTH_COLUMNS} <= {*counted.column_names}:
        lengths = RowLengths.read(counted)
    if lengths is not None:
        prompt, completion = lengths.prompt_length, lengths.completion_length
        cuts = {name: int(getattr(lengths, column).sum()) for name, (column, _) in _CUTS.items()}
        cuts["thinking_left_out"] = int(lengths.thinking_left_out.sum())
    if partial is None:
        partial = isinstance(rows, IterableDataset) or len(counted) < len(rows)
    return WeightReport(
        rows=len(counted),
        partial=partial,
        loss_weights=loss_weights,
        tokens=dict(zip(REGIONS, totals[0].astype(int).tolist(), strict=True)),
        data_nonzero=dict(zip(REGIONS, totals[1].astype(int).tolist(), strict=True)),
        data_weight=dict(zip(REGIONS, totals[2].tolist(), strict=True)),
        data_weights=(least, most),
        spans={name: (float(known[0]), int(known[1]), float(known[2])) for name, known in of_spans.items()},
        structure=structure,
        lengths=(prompt, completion),
        **cuts,
    )


def _first_rows(rows: Rows) -> Dataset:
    """Returns the rows that are counted, with their regions and data weights. It reads a stream once."""
    if isinstance(rows, Dataset) and _is_prepared(rows.column_names):
        # `take` of more rows than there are is an error before datasets 5.2
        return rows.take(min(STORED_ROWS, len(rows)))
    first = list(itertools.islice(rows, STREAMED_ROWS))
    if first and not _is_prepared(first[0]):  # as the collator reads them
        first = [{**row, **dict(zip(TOKEN_COLUMNS, read_tokens(row), strict=True))} for row in first]
    return Dataset.from_list(first)


def _is_prepared(columns: Iterable[str]) -> bool:
    return {"completion_mask", "token_weights"} <= {*columns} and _COLUMNS_THE_COLLATOR_READS.isdisjoint(columns)


def print_report(make_report: Callable[[], WeightReport], max_length: int | None, messages_are_new: bool) -> None:
    """
    Prints a report on the main process, with warnings of what is odd in it. Whatever the data is, it raises nothing.
    Where `messages_are_new`, it says how `SFTTrainer` trains messages.
    """
    try:
        report = make_report()
    except Exception as error:
        logger.warning(f"There is no table of what is weighted: {printable(str(error))}")
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
    if report.answers_cut and report.tokens[0]:  # in texts, all is completion
        logger.warning(
            f"Rows whose last answer lost its end to `max_length={max_length}`: {report.answers_cut:,}; all of it: "
            f"{report.answers_lost:,}. They do not teach how an answer ends. Raise `max_length`, or remove them."
        )
    for region in report.negligible_regions:
        logger.warning(
            f"The {region} has less than {NEGLIGIBLE_SHARE:.1%} of the weight, so it is hardly trained. Check the "
            f"weights: (prompt, completion) is {report.loss_weights}."
        )
