"""What the card of a trained model says of the paper and of the weights."""

import textwrap
from pathlib import Path
from typing import Any


PAPER = {
    "title": "On the Effect of Instruction Tuning Loss on Generalization",
    "id": "2507.07817",
    "citation": textwrap.dedent("""\
        @article{chatterjee2025effect,
            title   = {{On the Effect of Instruction Tuning Loss on Generalization}},
            author  = {Anwoy Chatterjee and H S V N S Kowndinya Renduchintala and Sumit Bhatia and
                       Tanmoy Chakraborty},
            journal = {Transactions of the Association for Computational Linguistics},
            volume  = 13,
            pages   = {1360--1380},
            year    = 2025
        }"""),
}


def add_weights(folder: str, settings: dict[str, Any]) -> None:
    """Adds the weights, and what else decides about the loss, to the card in a folder."""
    shown = ", ".join(f"{name}: {value}" for name, value in settings.items())
    with Path(folder, "README.md").open("a", encoding="utf-8") as card:
        card.write(f"\n## Weights of the loss\n\n{shown}\n")
