import ast
import sysconfig
import textwrap
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, DatasetDict


# Not part of the library proper: third-party code, tests and applications
_SKIPPED = {"dist-packages", "ensurepip", "idlelib", "lib2to3", "site-packages", "test", "tests", "turtledemo"}


def load_stdlib_functions(max_characters: int = 400, validation_share: float = 0.1) -> DatasetDict:
    """
    Returns the functions of the running interpreter's standard library as a prompt-completion data set, with the splits
    `"train"` and `"validation"`: real text that needs no download.

    The `"prompt"` asks for a function by signature and documentation, the `"completion"` is its source. Every function
    and method with a docstring counts once. Rows and splits depend on the Python version alone.

    Args:
        max_characters (`int`, *optional*, defaults to `400`):
            Longest source to keep, in characters.
        validation_share (`float`, *optional*, defaults to `0.1`):
            Share of the rows in the validation split.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    pairs: dict[str, str] = {}  # by source: a function that two modules share counts once
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED.isdisjoint(path.relative_to(root).parts):
            for prompt, completion in _pairs(path.read_text(encoding="utf-8", errors="replace"), max_characters):
                pairs.setdefault(completion, prompt)
    dataset = Dataset.from_dict({"prompt": list(pairs.values()), "completion": list(pairs)})
    splits = dataset.train_test_split(test_size=validation_share, seed=0)
    return DatasetDict(train=splits["train"], validation=splits["test"])


def _pairs(module: str, max_characters: int) -> Iterator[tuple[str, str]]:
    lines = module.split("\n")  # `splitlines` would also split at form feeds, which `lineno` does not count
    for node in _statements(_parse(module)):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node, clean=False):  # few are parsed once more
            source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])) + "\n"
            for function in _parse(source).body if len(source) <= max_characters else ():
                if isinstance(function, ast.FunctionDef) and (documentation := ast.get_docstring(function)):
                    signature = f"{function.name}({ast.unparse(function.args)})"
                    yield f"Write the Python function {signature}.\n\n{documentation}\n", source


def _statements(module: ast.Module) -> Iterator[ast.AST]:
    """As `ast.walk`, but without the many nodes of expressions, which hold no function."""
    todo: deque[ast.AST] = deque([module])
    while todo:
        node = todo.popleft()
        todo.extend(child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr))
        yield node


def _parse(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except SyntaxError:  # templates, deliberately broken files, functions with strings that leave the indentation
        return ast.Module(body=[], type_ignores=[])
