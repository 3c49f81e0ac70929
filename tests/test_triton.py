"""What runs on GPUs, TRL's Triton kernel on the labelled rows alone, in Triton's interpreter on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .triton_worker import MODES


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    process = subprocess.run(
        [sys.executable, "-m", "tests.triton_worker", str(tmp_path_factory.mktemp("triton"))],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=290,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.parametrize("mode", MODES)
def test_training_and_evaluation_equal_the_kernel_for_cpus(mode, results):
    for log, expected in zip(results["triton"][mode], results["one_pass"][mode], strict=True):
        assert log == pytest.approx(expected, rel=1e-6)
    assert len(results["triton"][mode]) == 3  # two steps and the evaluation


def test_kernels_of_liger_leave_the_loss_alone(results):
    for log, expected in zip(results["liger"], results["without_liger"], strict=True):
        assert log == pytest.approx(expected, rel=1e-5)
