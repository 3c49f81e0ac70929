"""What the two weights do to a training set: counts, shares and lengths."""

import copy
import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from trl.data_utils import get_dataset_column_names

from .config import WITSFTConfig
from .data_collator import DataCollatorForWIT
from .vision_data_collator import DataCollatorForVisionLanguageWIT


if TYPE_CHECKING:
    from .trainer import WITSFTTrainer

logger = get_logger(__name__)

Rows = tuple[Dataset | IterableDataset, Dataset | IterableDataset]  # before and after truncation, packing and dropping

REGIONS = {0: "prompt", 1: "completion", -100: "never a target"}
# Rows that are counted at most: of a stream, each is prepared for it, and of data with images, each image is processed
# for it; of a `Dataset`, a million take a few seconds
STREAMED_ROWS, IMAGE_ROWS, STORED_ROWS = 1000, 100, 1_000_000


@dataclass(frozen=True)
class Summary:
    """
    What the weights do to a training set. See [`summarize`].

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
        truncated (`int`): Rows cut to `max_length`.
        without_completion (`int`): Rows that lost their whole completion in this way.
        dropped (`int`, *optional*): Rows dropped because no token of non-zero weight was left. `None` for a stream.
    """

    rows: int
    partial: bool
    loss_weights: tuple[float, float]
    tokens: dict[int, int]
    nonzero: dict[int, int]
    weight: dict[int, float]
    data_weights: tuple[float, float]
    gradient_scale: float | None
    truncated: int
    without_completion: int
    dropped: int | None

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
        facts.add_row("completion tokens to a prompt token", _ratio(self.tokens[1], self.tokens[0]))
        facts.add_row("gradient of the completion against conventional tuning *", scale)
        facts.add_row("rows truncated", f"{self.truncated:,}")
        facts.add_row("rows with no completion left", f"{self.without_completion:,}")
        facts.add_row("rows dropped", "unknown" if self.dropped is None else f"{self.dropped:,}")
        note = "  * completion_loss_weight * completion / all, in tokens of non-zero weight"
        return Group(table, facts, Text(note, style="dim"))


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _ratio(numerator: int, denominator: int) -> str:
    return f"{numerator / denominator:.3g}" if denominator else "-"


def summarize(
    whole_rows: Dataset | IterableDataset, prepared: Dataset | IterableDataset, args: WITSFTConfig
) -> Summary:
    r"""
    Returns the [`Summary`] of a training set: of its first 1000 rows if it is a stream, else of its first million.

    With \\( N \\) the number of tokens of non-zero weight and \\( N_c \\) the number of completion tokens among them, a
    completion token of weight \\( \lambda_r \\) has the share \\( \lambda_r / N \\) in the loss, and \\( 1 / N_c \\) in
    conventional tuning, which has the weights (0, 1). So the gradient of the completion is scaled by
    \\( \lambda_r N_c / N \\), over the whole data set.

    Args:
        whole_rows (`Dataset` or `IterableDataset`):
            The rows after tokenization, before truncation, packing and dropping.
        prepared (`Dataset` or `IterableDataset`):
            The rows that are trained on.
        args ([`WITSFTConfig`]):
            The weights, `max_length` and packing.
    """
    loss_weights = (args.prompt_loss_weight, args.completion_loss_weight)
    rows, tokens, least, most = 0, dict.fromkeys(REGIONS, 0), np.inf, 0.0
    nonzero, data_weight = dict.fromkeys(REGIONS, 0), dict.fromkeys(REGIONS, 0.0)
    for batch in _batches(prepared):
        rows += batch.rows
        regions = batch.regions.copy()
        regions[(batch.ends - batch.lengths)[batch.lengths > 0]] = -100  # nothing predicts the first token
        weights = batch.weights[regions >= 0]
        least, most = min(least, weights.min(initial=np.inf)), max(most, weights.max(initial=0))
        for region in REGIONS:
            here = regions == region
            count = int(np.count_nonzero(here))
            tokens[region] += count
            nonzero[region] += int(np.count_nonzero(batch.weights[here]))
            data_weight[region] += float(batch.weights[here].sum(dtype=np.float64))
    weighted_completion = nonzero[1]
    nonzero = {region: nonzero[region] if region >= 0 and loss_weights[region] else 0 for region in REGIONS}
    weight = {region: loss_weights[region] * data_weight[region] if region >= 0 else 0.0 for region in REGIONS}
    total = sum(nonzero.values())
    scale = loss_weights[1] * nonzero[1] / total if weighted_completion and total else None

    truncated = without_completion = 0
    if args.max_length is not None and not (args.packing and args.packing_strategy != "bfd"):
        for batch in _batches(whole_rows):
            first = batch.ends - batch.lengths
            removed = np.maximum(batch.lengths - args.max_length, 0)
            at_end = args.truncation_mode == "keep_end" and not args.packing  # packing always keeps the start
            start, end = (first + removed, batch.ends) if at_end else (first, batch.ends - removed)
            before = np.concatenate([[0], np.cumsum(batch.regions == 1)])
            completion = before[batch.ends] - before[np.minimum(first + 1, batch.ends)]
            left = before[end] - before[np.minimum(start + 1, end)]
            truncated += int(np.count_nonzero(removed))
            without_completion += int(np.count_nonzero((completion > 0) & (left == 0)))
    dropped: int | None = 0
    if not args.packing:
        dropped = len(whole_rows) - len(prepared) if isinstance(whole_rows, Dataset) else None
    partial = isinstance(prepared, IterableDataset) or rows < len(prepared)
    return Summary(
        rows,
        partial,
        loss_weights,
        tokens,
        nonzero,
        weight,
        (least, most),
        scale,
        truncated,
        without_completion,
        dropped,
    )


@dataclass
class _Batch:
    """Some rows, flattened: lengths and ends of their documents; region and data weight of their tokens."""

    rows: int
    lengths: np.ndarray
    ends: np.ndarray
    regions: np.ndarray
    weights: np.ndarray


def _batches(dataset: Dataset | IterableDataset) -> Iterator[_Batch]:
    """Yields the first rows in batches."""
    dataset = dataset.take(STREAMED_ROWS if isinstance(dataset, IterableDataset) else STORED_ROWS)
    names = ["completion_mask", "token_weights"]
    names += ["seq_lengths"] * ("seq_lengths" in get_dataset_column_names(dataset))
    for table in dataset.select_columns(names).with_format("arrow").iter(batch_size=1000):
        columns = {name: pc.list_flatten(table[name]).to_numpy() for name in names}
        # Of the documents of a packed row, else of rows
        lengths = (
            columns["seq_lengths"] if "seq_lengths" in columns else pc.list_value_length(table[names[0]]).to_numpy()
        )
        lengths = lengths.astype(np.int64)
        yield _Batch(len(table), lengths, np.cumsum(lengths), columns["completion_mask"], columns["token_weights"])


def lengths_by_region(dataset: Dataset | IterableDataset) -> tuple[np.ndarray, np.ndarray]:
    """Returns the number of prompt tokens and of completion tokens of each document, its first token included."""
    lengths = []
    for batch in _batches(dataset):
        counts = [np.concatenate([[0], np.cumsum(batch.regions == region)]) for region in (0, 1)]
        lengths.append([count[batch.ends] - count[batch.ends - batch.lengths] for count in counts])
    prompt, completion = np.concatenate(lengths, axis=1)
    return prompt, completion


def plot_lengths(prompt: np.ndarray, completion: np.ndarray) -> bytes:
    """Returns a histogram of the lengths of prompts and completions, in tokens, as PNG."""
    from matplotlib.figure import Figure  # of the extra `plot`

    figure = Figure(figsize=(7, 3.5))
    axes = figure.subplots()
    # The longest hundredth goes into the last bin: a single long row would leave no room for the others
    longest = max(np.percentile(lengths, 99) for lengths in (prompt, completion))
    bins = np.linspace(0, max(longest, 1), 51)
    for lengths, name, colour in ((prompt, "prompt", "tab:blue"), (completion, "completion", "tab:orange")):
        label = f"{name} (mean {lengths.mean():.0f}, longest {lengths.max()})"
        axes.hist(np.minimum(lengths, bins[-1]), bins.tolist(), alpha=0.6, color=colour, label=label)
    axes.set(xlabel="tokens, before truncation; the longest 1% in the last bin", ylabel="rows")
    axes.grid(alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, dpi=120, bbox_inches="tight")
    return image.getvalue()


def rows_to_inspect(trainer: "WITSFTTrainer") -> Rows | None:
    """
    Returns the rows of the training set, tokenized, before truncation, packing and dropping, and as they are trained
    on: of data with images, which a batch alone tokenizes, the first 100. `None` if the trainer does not know them,
    because their preparation was skipped or another collator weighs them.
    """
    collator, dataset = trainer.data_collator, trainer.train_dataset
    if isinstance(collator, DataCollatorForWIT) and trainer._whole_train_rows is not None:
        return trainer._whole_train_rows, dataset
    if not isinstance(collator, DataCollatorForVisionLanguageWIT):
        return None
    tokenize = copy.copy(collator)
    tokenize.max_length, tokenize.prompt_loss_weight, tokenize.completion_loss_weight = None, 1.0, 1.0
    whole, prepared = [], []
    for example in itertools.islice(dataset, IMAGE_ROWS):
        batch = tokenize([example])
        length = int(batch["attention_mask"].sum())
        row = {name: batch[name][0, :length].tolist() for name in ("input_ids", "completion_mask", "token_weights")}
        whole.append(row)
        prepared.append({name: values[: collator.max_length] for name, values in row.items()})
    rows = Dataset.from_list(whole), Dataset.from_list(prepared)
    if isinstance(dataset, Dataset) and len(dataset) <= IMAGE_ROWS:
        return rows
    return rows[0].to_iterable_dataset(), rows[1].to_iterable_dataset()


def print_summary(trainer: "WITSFTTrainer") -> None:
    """Prints the summary of the training set, unless the trainer does not know its tokens or their weights."""
    if (rows := rows_to_inspect(trainer)) is None:
        return
    summary = summarize(*rows, trainer.args)
    Console().print(summary)
    if summary.without_completion:
        logger.warning(
            f"Rows with no completion left within `max_length={trainer.args.max_length}`: "
            f"{summary.without_completion:,}. They train their prompt at most. Raise `max_length`, or remove them."
        )
