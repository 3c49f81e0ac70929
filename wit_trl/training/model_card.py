"""What the card of a trained model says of the paper and of the weights."""

import textwrap
from pathlib import Path

from .. import __version__
from ..config import WITSFTConfig


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


def complete_card(args: WITSFTConfig) -> None:
    """Adds to TRL's card in `output_dir` what decides about the loss, and the version of this package."""
    path = Path(args.output_dir, "README.md")
    card = path.read_text(encoding="utf-8")
    # TRL names no model that is in a folder
    card = card.replace("is a fine-tuned version of [None](https://huggingface.co/None)", "was fine-tuned")
    card = card.replace("### Framework versions\n\n", f"### Framework versions\n\n- wit_trl: {__version__}\n")
    settings = "\n".join(f"- {name}: {value}" for name, value in args.loss_settings.items())
    path.write_text(f"{card}\n## Settings of the loss\n\n{settings}\n", encoding="utf-8")
