"""`wit-trl check` with flags of the launcher: ranks against one process."""

import os
import sys
import time

import pytest
from datasets import Dataset, DatasetDict

from wit_trl.check import checks, trainers
from wit_trl.cli import check_ranks, launch

from .. import forks


TWO = ("--accelerate_config", "multi_gpu", "--num_processes", "2")


def pairs():
    rows = [{"prompt": f"Count to {i}. ", "completion": " ".join(map(str, range(i, i + 50)))} for i in range(40)]
    return DatasetDict(train=Dataset.from_list(rows))


def launched(*arguments):
    """Does what the process that `wit-trl check` starts does, with smaller data."""
    trainers.load_stdlib_functions = pairs
    with forks._forking():
        launch.main(arguments, "wit_trl.cli.check_ranks")


def fail(*args, **kwargs):
    if os.environ["RANK"] == "1":
        print("ArithmeticError: a rank has failed", file=sys.stderr, flush=True)  # as Python does, but no fork of it
        raise ArithmeticError("a rank has failed")
    time.sleep(60)  # as a rank does that waits for its peer


def launched_with_failure(*arguments):
    checks.wit_training = fail
    launched(*arguments)


@pytest.fixture
def run(monkeypatch):
    """A function that compares two ranks with one process. The ranks are started by this function."""
    monkeypatch.setattr(trainers, "load_stdlib_functions", pairs)

    def run(function):
        def launch_in_fork(arguments, environment):
            status, output = forks.run(function, *arguments)
            return check_ranks.last_words(output) if status else None

        monkeypatch.setattr(check_ranks, "_launch", launch_in_fork)
        return list(check_ranks.check_ranks("cpu", TWO, {}))

    return run


def test_two_ranks_equal_one_process(run):
    found = run(launched)
    assert [check.name for check in found] == [f"(0.2, 0.8), 2 ranks as one, {x}" for x in ("padded", "packed")]
    assert [check.figure < 1e-5 for check in found] == [True, True], found


def test_a_rank_that_fails_is_told_with_its_last_line(run):
    (check,) = run(launched_with_failure)
    assert not check.is_right
    assert check.error == "ArithmeticError: a rank has failed"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ValueError('no device')", "ValueError: no device"),
        ("raise SystemExit(3)", "The ranks ended with status 3."),
        ("import time; time.sleep(60)", "The ranks did not end within 2 seconds."),
        ("print('at last')", None),
    ],
)
def test_ranks_that_fail_or_hang(code, reason, monkeypatch):
    monkeypatch.setattr(check_ranks, "_LAUNCH", code)
    monkeypatch.setattr(check_ranks, "_SECONDS", 2.0)
    start = time.monotonic()
    assert check_ranks._launch([], os.environ) == reason
    assert time.monotonic() < start + 10


def test_last_words():
    output = "[rank1]: Traceback\n[rank1]: RuntimeError: NCCL: no peer\nW1127 Sending SIGTERM\n"
    assert check_ranks.last_words(output) == "RuntimeError: NCCL: no peer"
    assert check_ranks.last_words("a\nerror: There is no GPU.\n\nb\n") == "error: There is no GPU."
    assert check_ranks.last_words("a\nb\n") == "b"
    assert check_ranks.last_words("") == ""
