import ast

import pytest

from wit_trl.embedded import load_stdlib_functions


pytestmark = pytest.mark.xdist_group("embedded")


@pytest.fixture(scope="module")
def dataset():
    return load_stdlib_functions()


def test_is_large_enough_and_split(dataset):
    train, validation = dataset["train"], dataset["validation"]
    assert len(train) >= 1500
    assert len(validation) >= 150
    assert not set(train["completion"]) & set(validation["completion"])


def test_prompt_asks_for_the_function_that_is_the_completion(dataset):
    for row in dataset["validation"]:
        (function,) = ast.parse(row["completion"]).body
        signature = f"{function.name}({ast.unparse(function.args)})"
        assert row["prompt"] == f"Write the Python function {signature}.\n\n{ast.get_docstring(function)}\n"


def test_is_deterministic(dataset):
    again = load_stdlib_functions()
    assert again["train"][:] == dataset["train"][:]
    assert again["validation"][:] == dataset["validation"][:]
