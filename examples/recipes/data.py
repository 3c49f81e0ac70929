"""
Writes two of the data sets of the paper to runs/data, as messages; the third, yahma/alpaca-cleaned, is taken as it is.
Needs the Hub, and was not run with it.

    python examples/recipes/data.py
"""

from pathlib import Path

from datasets import Dataset, load_dataset


def tulu(rows: Dataset, count: int = 150_000) -> Dataset:
    """Returns a random part of Tülu-v2. Which one the paper took, it does not say."""
    return rows.shuffle(seed=23).select(range(min(count, len(rows)))).select_columns("messages")


def lima(rows: Dataset) -> Dataset:
    """Returns LIMA, whose rows are texts of user and assistant by turns."""

    def convert(row):
        roles = ("user", "assistant")
        return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(row["conversations"])]}

    return rows.map(convert, remove_columns=rows.column_names)


if __name__ == "__main__":
    folder = Path("runs/data")
    folder.mkdir(parents=True, exist_ok=True)
    tulu(load_dataset("allenai/tulu-v2-sft-mixture", split="train")).to_json(folder / "tulu.jsonl")
    lima(load_dataset("GAIR/lima", split="train")).to_json(folder / "lima.jsonl")
