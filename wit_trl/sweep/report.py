"""How the results of a sweep are shown: the table, the picture and the page for a browser."""

import io

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..report.page import page, printable
from .arguments import BASELINE, TASK_METRIC, name_of
from .results import SweepResults


def table(results: SweepResults) -> Table:
    """Returns the table of the means of each pair over its seeds, and of the differences from conventional tuning."""
    rows = Table(box=SIMPLE_HEAD, title="Means over the seeds", title_justify="left")
    rows.add_column("metric")
    ratio = "ratio" if all(pair[1] == 1 for pair in results.pairs) else "(λp, λr)"
    for header in (ratio, "trials", "mean", "minus 0's"):
        rows.add_column(header, justify="right")
    for metric in dict.fromkeys([results.metric, TASK_METRIC, *results.kept_metrics, *results.benchmarks]):
        rows.add_section()
        before = results.base_metrics.get(metric)
        rows.add_row(Text(metric), "before", "", "" if before is None else f"{before:z.3f}", "")
        for pair in results.pairs:
            found = results.difference(pair, metric)
            difference = "" if found is None else str(found)
            style = "bold" if pair == results.best.settings.pair else None
            count, mean = str(len(results.of(pair))), f"{results.mean(pair, metric):z.3f}"
            rows.add_row("", name_of(pair), count, mean, difference, style=style)
    return rows


def show(console: Console, results: SweepResults) -> None:
    """Prints the table and the sentences about it."""
    console.print(table(results))
    for sentence in results.sentences():
        console.print(Text(f"\N{BULLET} {sentence}"))
    differences = [results.difference(pair, results.metric) for pair in results.pairs]
    if any(found is not None and found.half_width is not None for found in differences):
        note = "The intervals are of 95%, of rows and runs, and widened for the choice among several."
        console.print(Text(f"\n{note}", "dim"))


def html_page(results: SweepResults, heading: str, image: bytes) -> str:
    """Returns the page: the table, the sentences, the answers of the models, and the picture."""
    console = Console(file=io.StringIO(), record=True, width=1000)  # the browser wraps
    show(console, results)
    first_seed = min(trial.settings.seed for trial in results.done)
    of_seed = [trial for trial in results.done if trial.settings.seed == first_seed]
    written = [("before", results.base_answers), *((name_of(trial.settings.pair), trial.answers) for trial in of_seed)]
    for number, prompt in enumerate(results.prompts):
        console.print(Text(f"\nHeld-out prompt {number + 1}", "bold"))
        console.print(Text(printable(prompt), "dim"))
        for name, answers in written:
            console.print(Text(f"\n{name}: ", "bold").append(printable(answers[number]), "not bold"))
    return page("wit-trl sweep", heading, console, image, "Metrics of all trials by the ratio of the weights")


def plot(results: SweepResults) -> bytes:
    """Returns the picture as PNG, where every dot is a trial."""
    from matplotlib.figure import Figure  # of the extra `plot`

    planes = [("eval_prompt_loss", TASK_METRIC), *((TASK_METRIC, name) for name in results.kept_metrics)]
    rows = 1 + len(planes) // 3
    figure = Figure(figsize=(12.6, 3.5 * rows), layout="constrained")
    of_metric, *of_planes = (figure.add_subplot(rows, 3, position + 1) for position in range(1 + len(planes)))
    for position, pair in enumerate(results.pairs):
        trials = [trial.metrics for trial in results.of(pair)]
        colour, mean = f"C{position}", results.mean(pair, results.metric)
        heights = [trial[results.metric] for trial in trials]
        of_metric.plot([position] * len(trials), heights, "o", color=colour, alpha=0.5)
        found = results.difference(pair, results.metric)
        bar = None if found is None else found.half_width
        of_metric.errorbar(position, mean, bar, fmt="_", color="black", capsize=4, markersize=14)
        for axes, (x, y) in zip(of_planes, planes, strict=True):
            points = [(trial[x], trial[y]) for trial in trials if x in trial]  # without prompts there is no prompt loss
            axes.plot(*np.reshape(points, (-1, 2)).T, "o", color=colour, alpha=0.7, label=name_of(pair))
            axes.set(xlabel=f"{x}, in nats per token", ylabel=y)
    of_metric.set_xticks(range(len(results.pairs)), [name_of(pair) for pair in results.pairs])
    of_metric.set(xlabel="ratio of the weights", ylabel=results.metric)
    of_metric.set_title("bars: 95% of the difference from 0", fontsize="small")
    if results.of(BASELINE):
        of_metric.axhline(results.mean(BASELINE, results.metric), color="grey", linewidth=0.8, linestyle="--")
    for axes, (x, y) in zip(of_planes[1:], planes[1:], strict=True):
        frontier = [
            (results.mean(pair, x), results.mean(pair, y)) for pair in results.pairs if results.is_frontier(pair, y)
        ]
        axes.plot(*np.transpose(sorted(frontier)), color="grey", linewidth=0.8, zorder=0)
        axes.set_title("grey: the frontier", fontsize="small")
    of_planes[0].legend(title="ratio", fontsize="small")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, dpi=110)
    return image.getvalue()
