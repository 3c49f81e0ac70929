"""The rows of a training set as the trainer sees them, in the terminal and as a page for a browser."""

import io
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
from rich.console import Console
from rich.style import Style
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ..data.collator import DataCollatorForWIT
from ..weights import REGIONS
from .advice import advise
from .page import page, printable
from .weight_report import WeightReport


# Two shades each, which alternate from token to token
_SHADES = {0: ("#b3cde8", "#d3e3f3"), 1: ("#ffc48a", "#ffddb8")}
_DOCUMENT_START = "▌"


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


def show_row(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, loss_weights: tuple[float, float]) -> Text:
    """
    Returns a tokenized row as the trainer weighs it: each token in the colour of its region, in two shades that
    alternate, with its region and weight written where they change. Of a token that is repeated and never a target, as
    those that stand for an image, the number is written.

    Args:
        row (`dict`):
            Row as `DataCollatorForWIT` takes it.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer that made it.
        loss_weights (`tuple[float, float]`):
            Weight of a prompt token and of a completion token.
    """
    prompt_loss_weight, completion_loss_weight = loss_weights
    batch = DataCollatorForWIT(0, prompt_loss_weight=prompt_loss_weight, completion_loss_weight=completion_loss_weight)(
        [row]
    )
    tokens = row["input_ids"]
    # Without what the collator pads
    weights = [float(f"{weight:.6g}") for weight in batch["token_weights"][0, : len(tokens)].tolist()]
    regions = batch["completion_mask"][0, : len(tokens)].tolist()
    lengths = row.get("seq_lengths", [len(tokens)])
    starts = {end - length for end, length in zip(itertools.accumulate(lengths), lengths, strict=True)}
    special = set(tokenizer.all_special_ids)

    groups = [
        (position in starts, region, weight)
        for position, (region, weight) in enumerate(zip(regions, weights, strict=True))
    ]
    text = Text()
    shade, repeated = 0, 1
    for position, piece in enumerate(_pieces(tokenizer, tokens, groups)):
        is_start, region, weight = group = groups[position]
        if is_start:
            text.append("\n" * (position > 0)).append(_DOCUMENT_START, "bold red")
        elif group != groups[position - 1]:
            text.append(f"[{REGIONS[region]} {weight:g}]", "bold")
        style = _token_style(region, weight, shade)
        follows = groups[position + 1 : position + 2] == [group] and tokens[position + 1] == tokens[position]
        if region == -100 and follows:
            repeated += 1
            continue
        text.append(
            printable(piece), style + Style(bold=True, underline=True) if tokens[position] in special else style
        )
        if repeated > 1:
            text.append(f" x {repeated:,} ", "bold")
        shade, repeated = 1 - shade if piece else shade, 1
    return text


def _token_style(region: int, weight: float, shade: int) -> Style:
    return Style(color="black", bgcolor=_SHADES[region][shade]) if weight else Style(color="bright_black")


def show_page(
    console: Console,
    rows: Iterable[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    report: WeightReport,
    epochs: float,
) -> None:
    """
    Prints rows, the report of the whole training set, and what is known of such data.

    Args:
        console ([`~rich.console.Console`]):
            Where to.
        rows (`Iterable[dict]`):
            The rows to show, as `DataCollatorForWIT` takes them.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer that made them.
        report ([`WeightReport`]):
            Report of the training set.
        epochs (`float`):
            How often the training sees it.
    """
    legend = Text()
    for region, weight in enumerate(report.loss_weights):
        legend.append(f"[{REGIONS[region]} {weight:g}]", "bold").append("tokens", _token_style(region, weight, 0))
        legend.append(" ")
    legend.append("zero weight", _token_style(0, 0, 0)).append(" ").append(
        "special token", Style(bold=True, underline=True)
    )
    legend.append(" ").append(_DOCUMENT_START, "bold red").append("first token of a document")
    console.print(legend, soft_wrap=True)
    for number, row in enumerate(rows):
        documents = len(row.get("seq_lengths", [0]))
        heading = f"\nRow {number}: {len(row['input_ids'])} tokens" + f", {documents} documents" * (documents > 1)
        console.print(Text(heading, "bold"))
        console.print(show_row(row, tokenizer, report.loss_weights), soft_wrap=True)
    console.print()
    console.print(report)
    console.print(Text(f"\n{advise(report, epochs)}"))


def html_page(
    title: str,
    rows: Iterable[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    report: WeightReport,
    epochs: float,
    histogram: bytes,
) -> str:
    """Returns the page of `show_page`, under a title of any number of lines, and the histogram (PNG) as HTML."""
    console = Console(file=io.StringIO(), record=True, width=1000)  # the browser wraps
    show_page(console, rows, tokenizer, report, epochs)
    return page("wit-trl inspect", title, console, histogram, "Lengths of prompts and completions")


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
