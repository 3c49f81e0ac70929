"""The rows of a training set as the trainer sees them, in the terminal and as a page for a browser."""

import io
import itertools
from typing import Any

import numpy as np
from rich.console import Console
from rich.style import Style
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ..data.collator import DataCollatorForWIT
from ..data.prepared_rows import SPANS_COLUMN
from ..weights import REGIONS, StructureWeights
from .advice import advise
from .page import page, printable
from .weight_report import WeightReport


# Two shades each, which alternate from token to token
_SHADES = {0: ("#b3cde8", "#d3e3f3"), 1: ("#ffc48a", "#ffddb8")}
_SPECIAL = Style(bold=True, underline=True)
_DOCUMENT_START = "▌"


def _pieces(tokenizer: PreTrainedTokenizerBase, tokens: list[int], groups: list[Any]) -> list[str]:
    """
    Returns the text that each token adds to the text before it. The first entry of its group says whether a document
    starts there. Where several tokens of one group make a character, it comes with the last of them.
    """

    def decode(start: int, end: int) -> str:
        return tokenizer.decode(tokens[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    pieces = []
    # The tokens from `start` to `end` are shown already. They tell whether the next token begins with a space
    start = end = 0
    for position in range(len(tokens)):
        if groups[position][0]:
            start = end
        known, text = decode(start, end), decode(start, position + 1)
        is_cut = text.endswith("\N{REPLACEMENT CHARACTER}")
        if is_cut and groups[position + 1 : position + 2] == [groups[position]]:
            pieces.append("")
            continue
        pieces.append(text[len(known) :])
        start, end = position + 1 if is_cut else end, position + 1  # the rest of a cut character stands for itself
    return pieces


def _span_names(codes: np.ndarray, structure: StructureWeights) -> list[str]:
    """Returns the span and the patterns of each token, each after a space."""
    names = np.full(len(codes), "", object)
    for name, _, in_span in structure.tokens_of_spans(codes):
        names[in_span] += f" {printable(name)}"
    return names.tolist()


def show_row(
    row: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    loss_weights: tuple[float, float],
    structure: StructureWeights,
) -> Text:
    """
    Returns a tokenized row as the trainer weighs it, for the weights of a prompt token and of a completion token.

    Each token has the colour of its region, in two shades that alternate. Region, span and weight are written where
    they change. A token that repeats and is never a target, such as that of an image, is written once, with the number.
    """
    collator = DataCollatorForWIT(0)
    collator.prompt_loss_weight, collator.completion_loss_weight = loss_weights
    batch = collator([row])
    tokens = row["input_ids"]
    starts = {0, *itertools.accumulate(row.get("seq_lengths", []))}
    regions, weights = batch["completion_mask"][0].tolist(), batch["token_weights"][0].tolist()
    # Without what the collator pads
    names = _span_names(np.asarray(row[SPANS_COLUMN]), structure) if SPANS_COLUMN in row else [""] * len(tokens)
    groups = [(i in starts, regions[i], names[i], float(f"{weights[i]:.6g}")) for i in range(len(tokens))]
    special = {*tokenizer.all_special_ids}
    text = Text()
    shade, repeated = 0, 1
    for position, piece in enumerate(_pieces(tokenizer, tokens, groups)):
        is_start, region, name, weight = group = groups[position]
        if is_start:
            text.append("\n" if position else "").append(_DOCUMENT_START, "bold red")
        elif group != groups[position - 1]:
            text.append(f"[{REGIONS[region]}{name} {weight:g}]", "bold")
        follows = groups[position + 1 : position + 2] == [group] and tokens[position + 1] == tokens[position]
        if region == -100 and follows:
            repeated += 1
            continue
        style = _token_style(region, weight, shade)
        text.append(printable(piece), style + _SPECIAL if tokens[position] in special else style)
        if repeated > 1:
            text.append(f" x {repeated:,} ", "bold")
        shade, repeated = 1 - shade if piece else shade, 1
    if row.get("answer_cut"):
        text.append(f"[cut off: {row['completion_cut']} completion tokens]", "bold red")
    return text


def _token_style(region: int, weight: float, shade: int) -> Style:
    return Style(color="black", bgcolor=_SHADES[region][shade]) if weight else Style(color="bright_black")


def show_page(
    console: Console, rows: dict[int, dict], tokenizer: PreTrainedTokenizerBase, report: WeightReport, epochs: float
) -> None:
    """Prints rows by their number, the report of the whole training set, and what is known of such data."""
    legend = Text()
    for region, weight in enumerate(report.loss_weights):
        legend.append(f"[{REGIONS[region]} {weight:g}]", "bold").append("tokens", _token_style(region, weight, 0))
        legend.append(" ")
    legend.append("zero weight", _token_style(0, 0, 0)).append(" ").append("special token", _SPECIAL)
    legend.append(" ").append(_DOCUMENT_START, "bold red").append("first token of a document")
    console.print(legend, soft_wrap=True)
    for number, row in rows.items():
        documents = len(row.get("seq_lengths", [0]))
        heading = f"\nRow {number}: {len(row['input_ids'])} tokens"
        if documents > 1:
            heading += f", {documents} documents"
        if row.get("truncated"):
            cut = row["prompt_length"] + row["completion_length"] - sum(r >= 0 for r in row["completion_mask"])
            heading += f", without {cut} that were cut off, {row['completion_cut']} of the completion"
        console.print(Text(heading, "bold"))
        console.print(show_row(row, tokenizer, report.loss_weights, report.structure), soft_wrap=True)
    console.print()
    console.print(report)
    console.print(Text(f"\n{advise(report, epochs)}"))


def html_page(
    title: str,
    rows: dict[int, dict],
    tokenizer: PreTrainedTokenizerBase,
    report: WeightReport,
    epochs: float,
    image: bytes,
) -> str:
    """Returns HTML: the title, of any number of lines, what `show_page` prints, and the histogram (PNG)."""
    console = Console(file=io.StringIO(), record=True, width=1000)  # the browser wraps
    show_page(console, rows, tokenizer, report, epochs)
    return page("wit-trl inspect", title, console, image, "Lengths of prompts and completions")


def plot_lengths(prompt: np.ndarray, completion: np.ndarray) -> bytes:
    """Returns a histogram of the lengths of prompts and completions, in tokens, as PNG."""
    from matplotlib.figure import Figure  # of the extra `plot`

    figure = Figure(figsize=(7, 3.5))
    axes = figure.subplots()
    # The longest 1% goes into the last bin: a single long row would leave no room for the others
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
