"""What runs on GPUs: the Triton kernels, TRL's and ours, in Triton's interpreter on a CPU, and compiled for GPUs."""

import inspect
import json
import re
import subprocess
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from wit_trl.loss import rows

from ..forks import run, run_python
from .triton_worker import MODES


def run_interpreted(*arguments):
    """Runs Python in Triton's interpreter."""
    status, output = run(run_python, *arguments)
    assert status == 0, output


def train_twice(folder, kernel, mode):
    """Returns the logs with the kernel for CPUs, and with another."""
    run_interpreted("-m", "tests.loss.triton_worker", folder, kernel, mode)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", ["trl", "rows"])
def test_training_and_evaluation_equal_the_kernel_for_cpus(kernel, mode, tmp_path):
    expected_logs, logs = train_twice(tmp_path, kernel, mode)
    for log, expected in zip(logs, expected_logs, strict=True):
        assert log == pytest.approx(expected, rel=1e-6)
    assert len(logs) == 3  # two steps and the evaluation


def test_head_equals_float64():
    file = Path(__file__).with_name("triton_interpreter.py")
    run_interpreted("-m", "pytest", "-o", "addopts=", "-q", file)


# Instructions for each logit, of both reads of a row: at most so many. The memory of an H100 allows some 40
INSTRUCTIONS = {"both reads": 25, "the second read": 11, "soft cap": 50}
KERNELS = {"both reads": {}, "the second read": {"HAS_SCORES": True}, "soft cap": {"HAS_SOFTCAP": True}}


def instructions_a_logit(sass):
    """Counts the instructions of the loops in machine code: what lies before a jump back."""
    lines = [(int(address, 16), code) for address, code in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass)]
    jumps = [(address, re.search(r"BRA[.\w]*\s+(?:[\w!]+, )*0x([0-9a-f]+)", code)) for address, code in lines]
    loops = [(int(jump[1], 16), address) for address, jump in jumps if jump and int(jump[1], 16) < address]
    bodies = [[code for address, code in lines if start <= address <= end] for start, end in loops]
    of_rows = [body for body in bodies if any("LDG" in code for code in body)]
    return sum(map(len, of_rows)) / (rows._COLUMNS / (32 * rows._NUM_WARPS))


# Each thread of a row loads and stores 16 bytes at a time; registers that do not suffice are spilled to slow memory
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_kernel_compiles_for_gpus_with_wide_loads_and_few_instructions(architecture, dtype, kernel, tmp_path):
    names = ("logits", "target", "weight", "nll", "entropy", "is_top1", "maximum", "normaliser")
    types = [f"*{dtype}", "*i64", "*fp32", "*fp32", "*fp32", "*i1", "*fp32", "*fp32"]
    signature = {f"{name}_ptr": kind for name, kind in zip(names, types, strict=True)}
    signature |= {"row_stride": "i64", "n_columns": "i32"}
    signature |= dict.fromkeys(("logit_scale", "exponent_scale", "softcap"), "fp32")
    constants = {"HAS_SCORES": False, "HAS_GRADIENT": True, "HAS_SOFTCAP": False, **KERNELS[kernel]}
    constants |= {"COLUMNS": rows._COLUMNS, "GROUP": 4 if dtype == "fp32" else 8}
    arguments = inspect.signature(rows._score_rows.fn).parameters
    # As Triton finds it at a launch: rows are padded to a multiple of 16, the vocabulary may be anything
    aligned = [number for number, name in enumerate(arguments) if name in ("logits_ptr", "row_stride")]
    source = ASTSource(
        fn=rows._score_rows,
        signature={name: signature.get(name, "constexpr") for name in arguments},
        constexprs=constants,
        attrs={(number,): [["tt.divisibility", 16]] for number in aligned},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": rows._NUM_WARPS}
    )
    loads, stores = (re.findall(rf"{name}\.global\S*\.v4", compiled.asm["ptx"]) for name in ("ld", "st"))
    assert loads
    assert stores
    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run(
        [tool, "-res-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True
    ).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    assert 16 <= registers <= 64, usage
    assert stack == 0, usage
    # The logits of a model that has diverged are NaN, and so is its loss: others of these return what is a number
    assert not re.findall(r"(?:max|min)\.f32[^\n]*0fC47A0000|(?:max|min)\.f32[^\n]*0f42C80000", compiled.asm["ptx"])
    sass = subprocess.run([tool, "-sass", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    assert 4 < instructions_a_logit(sass) <= INSTRUCTIONS[kernel]


def test_kernels_of_liger_leave_the_loss_alone(tmp_path):
    expected_logs, logs = train_twice(tmp_path, "liger", "padded")
    for log, expected in zip(logs, expected_logs, strict=True):
        assert log == pytest.approx(expected, rel=1e-5)
