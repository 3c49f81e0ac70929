"""
Writes two tasks with the functions of Python's standard library, as conversations, and a plain text to keep.

python examples/which_weights/tasks.py data 256 100  # rows to train on and to test with

- `write/`: the function from its signature and documentation. Completions are longer than prompts.
- `document/`: the first line of its documentation from the function. Completions are far shorter than prompts.
- `text.jsonl`: documentation of modules, in none of the two.

Each task has the splits `train` and `test`, of different functions.
"""

import ast
import sys
import sysconfig
from pathlib import Path

from datasets import Dataset, DatasetDict

from wit_trl.embedded import load_stdlib_functions


def conversation(prompt: str, completion: str) -> dict[str, list[dict[str, str]]]:
    """Returns a row: a question and its answer."""
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": completion}],
    }


def write_task(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """Returns a row of the task to write a function."""
    return conversation(row["prompt"].strip(), row["completion"].strip())


def document_task(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """Returns a row of the task to document a function in a line."""
    (function,) = ast.parse(row["completion"]).body
    documentation = ast.get_docstring(function).strip().splitlines()[0]
    del function.body[0]
    function.body = function.body or [ast.Pass()]
    return conversation(f"Document this Python function in one line.\n\n{ast.unparse(function)}", documentation)


def module_documentation(count: int) -> Dataset:
    """Returns the first 600 characters of the documentation of some modules."""
    texts = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        documentation = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if documentation is not None and len(documentation) > 100:
            texts.append(documentation[:600])
    return Dataset.from_dict({"text": texts[:count]})


def write_tasks(folder: Path, train_rows: int, test_rows: int) -> None:
    """Writes both tasks and the text to a folder."""
    functions = load_stdlib_functions()
    for name, make_row in (("write", write_task), ("document", document_task)):
        splits = DatasetDict(
            train=functions["train"].select(range(train_rows)), test=functions["validation"].select(range(test_rows))
        ).map(make_row)
        (folder / name).mkdir(parents=True, exist_ok=True)
        for split, rows in splits.items():
            rows.to_json(folder / name / f"{split}.jsonl")
    module_documentation(test_rows).to_json(folder / "text.jsonl")


if __name__ == "__main__":
    write_tasks(Path(sys.argv[1]), *map(int, sys.argv[2:] or (256, 100)))
