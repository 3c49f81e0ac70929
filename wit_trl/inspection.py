"""What the two weights do to a data set: counts, shares and the rows as the trainer sees them."""

import base64
import io
import itertools
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase
from trl.data_utils import get_dataset_column_names

from .config import WITSFTConfig
from .data_collator import DataCollatorForWIT


if TYPE_CHECKING:
    from .trainer import WITSFTTrainer

logger = get_logger(__name__)

# Rows that are counted at most: of a stream, each is prepared for it; of a `Dataset`, a million take a few seconds
STREAMED_ROWS, STORED_ROWS = 1000, 1_000_000

_REGIONS = {0: "prompt", 1: "completion", -100: "never a target"}
# Two shades each, which alternate from token to token
_SHADES = {0: ("#b3cde8", "#d3e3f3"), 1: ("#ffc48a", "#ffddb8")}
_DOCUMENT_START = "▌"
_HTML = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>wit-trl inspect</title>
<style>
{stylesheet}
body {{ color: {foreground}; background: {background}; margin: 2em; }}
pre {{ font: 14px/1.6 "DejaVu Sans Mono", Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }}
img {{ max-width: 100%; }}
</style>
</head>
<body>
<pre>{code}</pre>
<img alt="Lengths of prompts and completions" src="data:image/png;base64,HISTOGRAM">
</body>
</html>
"""


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
        for region, name in _REGIONS.items():
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
    rows, tokens, least, most = 0, dict.fromkeys(_REGIONS, 0), np.inf, 0.0
    nonzero, data_weight = dict.fromkeys(_REGIONS, 0), dict.fromkeys(_REGIONS, 0.0)
    for batch in _batches(prepared):
        rows += batch.rows
        least, most = min(least, batch.weights.min(initial=np.inf)), max(most, batch.weights.max(initial=0))
        regions = batch.regions.copy()
        regions[(batch.ends - batch.lengths)[batch.lengths > 0]] = -100  # nothing predicts the first token
        for region in _REGIONS:
            here = regions == region
            count = int(np.count_nonzero(here))
            tokens[region] += count
            nonzero[region] += int(np.count_nonzero(batch.weights[here]))
            data_weight[region] += float(batch.weights[here].sum(dtype=np.float64))
    weighted_completion = nonzero[1]
    nonzero = {region: nonzero[region] if region >= 0 and loss_weights[region] else 0 for region in _REGIONS}
    weight = {region: loss_weights[region] * data_weight[region] if region >= 0 else 0.0 for region in _REGIONS}
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


def _printable(text: str) -> str:
    """Returns `text` with line breaks and tabs marked, and all else that a terminal would act on escaped."""

    def show(character: str) -> str:
        if character in "\n\t":
            return {"\n": "↵\n", "\t": "⇥\t"}[character]
        # But for the joiners of emoji and of Persian and Indic words
        acts = unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp") and character not in "\u200c\u200d"
        return character.encode("unicode_escape").decode() if acts else character

    return "".join(map(show, text))


def _pieces(tokenizer: PreTrainedTokenizerBase, tokens: list[int], groups: list[Any]) -> list[str]:
    """
    Returns the text that each token adds to the text before it. A character of several tokens comes with the last of
    them, as long as they are of one group. A group is a tuple, whose first entry is whether a document starts there.
    """

    def decode(start: int, end: int) -> str:
        return tokenizer.decode(tokens[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    pieces = []
    # Decoded from `start`, the tokens before `end` are known text; they tell whether the next begins with a space
    start = end = 0
    for position in range(len(tokens)):
        if groups[position][0]:
            start = end
        known, text = decode(start, end), decode(start, position + 1)
        last_of_group = position + 1 == len(tokens) or groups[position + 1] != groups[position]
        if text.endswith("\N{REPLACEMENT CHARACTER}") and not last_of_group:
            pieces.append("")
            continue
        pieces.append(text[len(known) :])
        start, end = end, position + 1
        if text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character cut in two: the rest stands for itself
            start = end
    return pieces


def show_row(trainer: "WITSFTTrainer", row: dict[str, Any]) -> Text:
    """
    Returns a row of the training set as the trainer collates it: each token in the colour of its region, in two shades
    that alternate, with its region and weight written where they change.
    """
    batch = trainer.data_collator([row])
    tokens = row["input_ids"]
    # Without what the collator pads
    weights = [round(weight, 6) for weight in batch["token_weights"][0, : len(tokens)].tolist()]
    regions = batch["completion_mask"][0, : len(tokens)].tolist()
    lengths = row.get("seq_lengths", [len(tokens)])
    starts = {end - length for end, length in zip(itertools.accumulate(lengths), lengths, strict=True)}
    special = set(trainer._tokenizer.all_special_ids)

    groups = [
        (position in starts, region, weight)
        for position, (region, weight) in enumerate(zip(regions, weights, strict=True))
    ]
    text = Text()
    shade = 0
    for position, piece in enumerate(_pieces(trainer._tokenizer, tokens, groups)):
        is_start, region, weight = group = groups[position]
        if is_start:
            text.append("\n" * (position > 0)).append(_DOCUMENT_START, "bold red")
        elif group != groups[position - 1]:
            text.append(f"[{_REGIONS[region]} {weight:g}]", "bold")
        style = _token_style(region, weight, shade)
        text.append(
            _printable(piece), style + Style(bold=True, underline=True) if tokens[position] in special else style
        )
        shade = 1 - shade if piece else shade
    return text


def _token_style(region: int, weight: float, shade: int) -> Style:
    return Style(color="black", bgcolor=_SHADES[region][shade]) if weight else Style(color="bright_black")


def show_page(console: Console, trainer: "WITSFTTrainer", rows: int) -> None:
    """Prints the first rows of the training set and its summary."""
    args = trainer.args
    legend = Text()
    for region, weight in ((0, args.prompt_loss_weight), (1, args.completion_loss_weight)):
        legend.append(f"[{_REGIONS[region]} {weight:g}]", "bold").append("tokens", _token_style(region, weight, 0))
        legend.append(" ")
    legend.append("zero weight", _token_style(0, 0, 0)).append(" ").append(
        "special token", Style(bold=True, underline=True)
    )
    legend.append(" ").append(_DOCUMENT_START, "bold red").append("first token of a document")
    console.print(legend, soft_wrap=True)
    for number, row in enumerate(itertools.islice(trainer.train_dataset, rows)):
        documents = len(row.get("seq_lengths", [0]))
        title = f"\nRow {number}: {len(row['input_ids'])} tokens" + f", {documents} documents" * (documents > 1)
        console.print(Text(title, "bold"))
        console.print(show_row(trainer, row), soft_wrap=True)
    console.print()
    console.print(summarize(trainer._whole_train_rows, trainer.train_dataset, args))


def html_page(trainer: "WITSFTTrainer", rows: int, histogram: bytes) -> str:
    """Returns the page of `show_page` and the histogram (PNG) as HTML."""
    console = Console(file=io.StringIO(), record=True, width=100)
    show_page(console, trainer, rows)
    return console.export_html(code_format=_HTML.replace("HISTOGRAM", base64.b64encode(histogram).decode()))


def print_summary(trainer: "WITSFTTrainer") -> None:
    """Prints the summary of the training set, unless its preparation was skipped or another collator weighs it."""
    dataset = trainer.train_dataset
    if trainer._whole_train_rows is not None and isinstance(trainer.data_collator, DataCollatorForWIT):
        summary = summarize(trainer._whole_train_rows, dataset, trainer.args)
        Console().print(summary)
        if summary.without_completion:
            logger.warning(
                f"Rows with no completion left within `max_length={trainer.args.max_length}`: "
                f"{summary.without_completion:,}. They train their prompt at most. Raise `max_length`, or remove them."
            )
