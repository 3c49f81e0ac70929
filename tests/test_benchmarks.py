"""The benchmark for GPUs, with tiny cases on a CPU: what it measures, and that no crash or missing package ends it."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import TrainerState

from wit_trl.loss import one_pass


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
MODEL = {"vocab_size": 1000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
MODEL |= {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.delitem(sys.modules, "gpu", raising=False)
    import gpu
    import steps

    monkeypatch.setattr(steps, "TOKENS", 16)
    monkeypatch.setattr(steps, "BLOCKS", 2)
    monkeypatch.setattr(gpu, "CHECKED_SIZES", {"small": (20, 32, 301)})
    monkeypatch.setattr(
        gpu, "TIMED_HEADS", {"a": (64, 32, 1000, 0.5, False, None), "b": (64, 32, 1000, 0.0, True, 30.0)}
    )
    cases = {"step, a, λp = 0": ("llama", MODEL, 0.0, False, 4), "step, b": ("qwen2", MODEL, 0.2, True, 4)}
    monkeypatch.setattr(steps, "CASES", cases)
    return gpu


def work(gpu, capsys, kind, contender):
    """The results of a worker that runs in this process."""
    gpu.work(kind, contender, "cpu", 2, 0, None)
    lines = capsys.readouterr().out.splitlines()
    names, *results = (json.loads(line.removeprefix(gpu.RESULT)) for line in lines if line.startswith(gpu.RESULT))
    results = {result["case"]: result for result in results}
    assert names["cases"] == [*results]
    return results


def test_head_is_measured(gpu, capsys):
    for contender in ("products", "wit_trl", "trl", "original"):
        assert [len(result["all_seconds"]) for result in work(gpu, capsys, "head", contender).values()] == [2, 2]


def test_steps_of_three_trainers_in_turn(gpu, capsys):
    a, b = (result["trainers"] for result in work(gpu, capsys, "step", "trainers").values())
    for of_trainer in (*a.values(), *b.values()):
        assert len(of_trainer["losses"]) == 2 * (1 + 2)  # two blocks with a step, and two to warm up
        assert len(of_trainer["all_seconds"]) == 2
        assert of_trainer["losses"][0] == pytest.approx(of_trainer["losses"][3], rel=0.1)  # the same rows again
        assert of_trainer["losses"][0] > of_trainer["losses"][3]  # of a model that has learned
        assert "error" not in of_trainer
    assert a["trl"]["loss_difference"] < 1e-3
    assert "loss_difference" not in b["trl"]  # of other weights
    assert b["wit_trl, fused_head=trl"]["loss_difference"] < 1e-3
    (line,) = gpu.summary({"step, trainers": {"step, b": {"trainers": b}}})
    assert line.startswith("step, b: wit_trl ")
    assert "; trl " in line
    assert ", losses differ by " in line


def test_a_trainer_that_fails_leaves_the_others(gpu, monkeypatch):
    import steps

    class Trainer:
        def __init__(self, contender, clock):
            self.contender, self.clock = contender, clock
            self.state = TrainerState(log_history=[{"loss": 1.0}] * 3)

        def train(self):
            if self.contender == "trl" and self.clock.seconds:  # in its second block
                raise RuntimeError("illegal memory access")
            self.clock.seconds += [9.0, 9.0, 0.001]
            self.clock.memory += [0.0] * 3

    monkeypatch.setattr(steps, "build", lambda contender, case, device, steps, clock: Trainer(contender, clock))
    first, last = steps.time_trainers("step, b", "cpu", 1)
    assert (first["is_partial"], last["is_partial"]) == (True, False)
    timed, failed = gpu.summary({"step, trainers": {"step, b": last}})
    assert timed.count("1.00 (1.00 to 1.00) ms") == 3
    assert failed == "trl, step, b: did not run: RuntimeError: illegal memory access"


def test_a_head_that_is_wrong_is_told(gpu, capsys, monkeypatch, tmp_path):
    assert all(result["is_right"] for result in work(gpu, capsys, "check", "wit_trl").values())
    score = one_pass.score

    def wrong(logits, *args):
        score(logits, *args)
        logits *= 1.1

    monkeypatch.setattr(one_pass, "score", wrong)
    results = work(gpu, capsys, "check", "wit_trl")
    assert {name for name, result in results.items() if result["is_right"]} == {
        f"small, {dtype}, evaluation" for dtype in ("float32", "float16", "bfloat16")
    }
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--output", str(tmp_path), "--only", "check, wit"])
    monkeypatch.setattr(gpu, "run_job", lambda *args: results.items())
    with pytest.raises(SystemExit, match="wrong on this device"):
        gpu.main()
    assert "wit_trl in float32: 1 of 10 right" in capsys.readouterr().out
    assert json.loads((tmp_path / "gpu.json").read_text())["results"]["check, wit_trl"] == results


def test_a_failure_leaves_what_was_measured_before(gpu, capsys, monkeypatch, tmp_path):
    half = {"trainers": {"wit_trl": {"seconds": 1.0, "quartiles": [1.0, 1.0], "MiB": 0.0, "losses": []}}}
    monkeypatch.setattr(gpu, "run_job", lambda *args: iter([("step, a", half), ("step, a", {"error": "crashed"})]))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--output", str(tmp_path), "--only", "step"])
    gpu.main()
    timed, failed = capsys.readouterr().out.splitlines()[-2:]
    assert timed.startswith("step, a: wit_trl 1000.00 ")
    assert failed == "trainers, step, a: did not run: crashed"


WORKER = """
import json, os, sys, time
first = int(sys.argv[sys.argv.index("--first") + 1])
print("{'loss': 'of a library'}")
print("result:", json.dumps({"cases": ["a", "crashes", "raises", "b", "hangs", "c"]}), flush=True)
for name in ["a", "crashes", "raises", "b", "hangs", "c"][first:]:
    if name == "crashes":
        os.abort()
    if name == "raises":
        raise MemoryError("no memory")
    if name == "hangs":
        time.sleep(60)
    print("result:", json.dumps({"case": name, "seconds": 1.0}), flush=True)
"""
DIES_AT_ITS_END = """
import json, os, sys
first, last = (int(sys.argv[sys.argv.index(name) + 1]) for name in ("--first", "--last"))
print("result:", json.dumps({"cases": ["a", "b"]}), flush=True)
for name in ["a", "b"][first:last]:
    print("result:", json.dumps({"case": name, "seconds": 1.0}), flush=True)
os.abort()
"""


def test_a_process_that_dies_at_its_end_costs_nothing(gpu, monkeypatch, tmp_path):
    (tmp_path / "worker.py").write_text(DIES_AT_ITS_END)
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "worker.py"))
    results = dict(gpu.run_job([], "contender", "step", time.monotonic() + 60))
    assert results == {"a": {"seconds": 1.0}, "b": {"seconds": 1.0}}


def test_nan_is_not_right(gpu):
    results = {"case, float32, plain": {"errors": {"loss": 1e-7, "nll": float("nan")}, "is_right": False}}
    assert [*gpu.summary({"check, wit_trl": results})] == ["wit_trl in float32: 0 of 1 right, nan off, 2e-05 allowed"]


def test_a_process_that_dies_costs_one_case_and_one_that_hangs_ends_in_time(gpu, monkeypatch, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "worker.py"))
    start = time.monotonic()
    results = dict(gpu.run_job([], "contender", "head", start + 5))
    assert time.monotonic() < start + 30
    assert results["a"] == results["b"] == {"seconds": 1.0}
    assert results["crashes"] == {"error": "exit status -6"}
    assert results["raises"]["error"].endswith("MemoryError: no memory")
    assert results["time"] == {"error": "The time was up."}
    assert "c" not in results


ENDS_EARLY = """
import json
print("result:", json.dumps({"cases": ["a", "b"]}), flush=True)
"""


def test_a_process_that_ends_early_without_an_error_is_told(gpu, monkeypatch, tmp_path):
    (tmp_path / "worker.py").write_text(ENDS_EARLY)
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "worker.py"))
    for kind in ("head", "step"):
        results = [*gpu.run_job([], "contender", kind, time.monotonic() + 30)]
        assert results == [("a", {"error": "exit status 0"}), ("b", {"error": "exit status 0"})]


def test_a_contender_that_is_not_installed_is_tried_once(gpu, monkeypatch, tmp_path):
    (tmp_path / "worker.py").write_text("import no_such_package")
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "worker.py"))
    ((name, result),) = gpu.run_job([], "contender", "head", time.monotonic() + 60)
    assert name == "all"
    assert "No module named 'no_such_package'" in result["error"]


BLOCKED = """
import sys
sys.modules |= dict.fromkeys(
    ["accelerate", "datasets", "dill", "liger_kernel", "multiprocess", "peft", "transformers", "trl"]
)
sys.path.insert(0, sys.argv[1])
import gpu
gpu.CHECKED_SIZES = {"small": (20, 32, 301)}
gpu.TIMED_HEADS = {"a": (64, 32, 1000, 0.5, False, None)}
for kind in ("check", "head"):
    gpu.work(kind, "wit_trl", "cpu", 1, 0, None)
"""


def test_the_head_of_this_package_needs_torch_alone():
    process = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(BENCHMARKS)], capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count('"is_right": true') == 30
    assert process.stdout.count('"seconds"') == 1
