"""What is said of which data, and that docs/choosing-weights.md says the same."""

from pathlib import Path

import pytest

from wit_trl.report import advice
from wit_trl.report.weight_report import weigh

from .test_weight_report import with_weights


PAGE = Path(__file__).parents[2] / "docs" / "choosing-weights.md"


def rows_of(prompt, completion, count=2):
    """Rows with this many prompt and completion tokens, after a first one that nothing predicts."""
    return with_weights(*[[0] * (prompt + 1) + [1] * completion] * count)


@pytest.mark.parametrize(
    ("prompt", "completion", "epochs", "expected"),
    [
        (0, 5, 3, advice.NO_PROMPT),
        (5, 1, 3, advice.REPEATED),
        (5, 1, 1, advice.REPEATED),
        (5, 5, 1, advice.BETWEEN),
        (2, 6, 1, advice.BETWEEN),
        (2, 7, 3, advice.LONG_COMPLETIONS),
    ],
)
def test_row_of_the_table_that_data_falls_in(prompt, completion, epochs, expected):
    said = advice.advise(weigh(rows_of(prompt, completion), (0.2, 0.8)), epochs)
    assert expected[1] in said
    assert "This is a judgement" in said


def test_many_rows_that_are_seen_once(monkeypatch):
    monkeypatch.setattr(advice, "FEW_ROWS", 1)
    report = weigh(rows_of(5, 1), (0.2, 0.8))
    assert advice.SEEN_ONCE[1] in advice.advise(report, 1)
    assert advice.REPEATED[1] in advice.advise(report, 2)


def test_first_rows_of_a_stream_are_not_few():
    stream = rows_of(5, 1).to_iterable_dataset()
    assert advice.SEEN_ONCE[1] in advice.advise(weigh(stream, (0.2, 0.8)), 1)


def test_page_has_the_same_table():
    page = PAGE.read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("|")]
    for data, judgement in advice.DECISIONS:
        assert f"| {data} | {judgement} |" in rows
