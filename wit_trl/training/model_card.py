"""What the card of a trained model says of the paper and of the weights."""

import textwrap
from pathlib import Path

from ..config import LOSS_SETTINGS, WITSFTConfig


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


def add_weights(args: WITSFTConfig) -> None:
    """Adds the weights of prompt and completion to the card in `output_dir`, and what else of the loss was set."""
    defaults = {name: args.__dataclass_fields__[name].default for name in LOSS_SETTINGS[2:]}
    names = [*LOSS_SETTINGS[:2], *(name for name, default in defaults.items() if getattr(args, name) != default)]
    shown = ", ".join(f"{name}: {getattr(args, name)}" for name in names)
    with Path(args.output_dir, "README.md").open("a", encoding="utf-8") as card:
        card.write(f"\n## Weights of the loss\n\n{shown}\n")
