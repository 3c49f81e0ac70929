"""
The LM head and the training step on a GPU: against float64, then time and memory, side by side in one run:

    python benchmarks/gpu.py [--output runs/gpu] [--minutes 10]

Each head runs in a process of its own, this package first. The steps of three trainers alternate in one process, which
holds their models: up to 40 GB. A process that crashes or lacks a package costs the case it was in. `gpu.json` is
written after every case, and a summary is printed at the end. The head needs torch and Triton alone; TRL's head, and
the steps, need the packages of `setup.cfg`; `liger` and `cce` need `liger-kernel` and `cut-cross-entropy`. Ends with
status 1 if the head of this package is wrong.
"""

import argparse
import collections
import functools
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from contenders import SELECTING, loss_function

from wit_trl.check.kernels import HEAD_CASES, LIMITS, head_errors, head_inputs
from wit_trl.check.timing import measured_head
from wit_trl.loss import one_pass


# name: (tokens, hidden size, vocabulary)
CHECKED_SIZES = {"odd sizes": (61, 96, 1501), "Llama-3.2-1B": (60, 2048, 128256)}
# name: (tokens, hidden size, vocabulary, share of tokens of weight zero, frozen head, soft cap)
TIMED_HEADS = {
    "Llama-3.2-1B, half of 8192": (8192, 2048, 128256, 0.5, False, None),
    "Llama-3.2-1B, all of 8192": (8192, 2048, 128256, 0.0, False, None),
    "Llama-3.2-1B, half of 8192, frozen": (8192, 2048, 128256, 0.5, True, None),
    "Llama-3.2-1B, half of 1024": (1024, 2048, 128256, 0.5, False, None),
    "Llama-3.1-8B, half of 8192": (8192, 4096, 128256, 0.5, False, None),
    "Llama-3.1-8B, half of 8192, frozen": (8192, 4096, 128256, 0.5, True, None),
    "Qwen2.5-0.5B, half of 8192": (8192, 896, 151936, 0.5, False, None),
    "Gemma-2-2B, half of 8192": (8192, 2304, 256000, 0.5, False, 30.0),
}
RESULT = "result:"  # before each line of a worker
# What runs, in this order
JOBS = (
    *(("check", "wit_trl"), ("head", "wit_trl"), ("head", "products"), ("check", "trl"), ("head", "trl")),
    *(("step", "trainers"), ("head", "liger"), ("head", "cce"), ("head", "original")),
)


def check(contender: str, device: str) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Yields names of cases, and what returns the errors of a head in each, with what they may be."""
    if contender == "wit_trl":
        kernel = one_pass.weighted_nll
    else:
        from wit_trl.loss.functions import trl_weighted_nll as kernel

    for size_name, sizes in CHECKED_SIZES.items():
        for dtype, limit in LIMITS.items():
            for case in HEAD_CASES:

                def run(case=case, dtype=dtype, limit=limit, sizes=sizes):
                    errors = head_errors(kernel, case, device, dtype, *sizes)
                    return {"errors": errors, "limit": limit, "is_right": all(e <= limit for e in errors.values())}

                yield f"{size_name}, {str(dtype).removeprefix('torch.')}, {case.name}", run


def head(contender: str, device: str, repeats: int) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Yields names of cases, and what measures a forward and backward pass of head and loss in each."""
    for name, (tokens, hidden_size, vocabulary, zero_share, frozen, softcap) in TIMED_HEADS.items():

        def run(sizes=(tokens, hidden_size, vocabulary, zero_share), frozen=frozen, softcap=softcap):
            inputs = head_inputs(device, torch.bfloat16, *sizes)
            loss, count = None, inputs[-1].count_nonzero()
            if contender != "products":
                function = loss_function(contender, device, softcap)

                def loss(*args):
                    return function(*args, count)

            # TRL gives only the weighted tokens to its kernel
            selects = contender in (*SELECTING, "trl")
            return measured_head(loss, inputs, device, repeats, selects, frozen)

        yield name, run


def step(device: str, repeats: int) -> Iterator[tuple[str, Callable[[], Iterable[dict]]]]:
    """Yields names of cases, and what trains in each. It returns results that grow."""
    import steps  # which needs the packages of `setup.cfg`

    for name in steps.CASES:
        yield name, functools.partial(steps.time_trainers, name, device, max(1, repeats // 2))


def work(kind: str, contender: str, device: str, repeats: int, first: int, last: int | None) -> None:
    """Runs cases in this process. Prints a line of JSON before the first one, and for each result."""
    if kind == "step":
        cases = [*step(device, repeats)]
    else:
        cases = [*(check(contender, device) if kind == "check" else head(contender, device, repeats))]
    print(RESULT, json.dumps({"cases": [name for name, _ in cases]}), flush=True)
    for name, run in cases[first:last]:
        for result in run() if kind == "step" else [run()]:
            print(RESULT, json.dumps({"case": name, **result}), flush=True)


def run_job(arguments: list[str], contender: str, kind: str, deadline: float) -> Iterator[tuple[str, dict]]:
    """Yields the names of cases with their results, as they come from processes, or with the reason of a failure."""
    names: list[str] | None = None
    done = 0
    while names is None or done < len(names):
        # A step in a process of its own, so that none holds what another measures
        last = ["--last", str(done + 1)] if kind == "step" else []
        before = done
        command = [sys.executable, __file__, *arguments, "--worker", kind, contender, "--first", str(done), *last]
        with tempfile.TemporaryFile("w+") as stderr:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
            timer = threading.Timer(max(0.0, deadline - time.monotonic()), process.kill)
            timer.daemon = True
            timer.start()
            for line in process.stdout:
                if not line.startswith(RESULT):
                    continue  # what a library prints
                result = json.loads(line.removeprefix(RESULT))
                if "cases" in result:
                    names = result["cases"]
                else:
                    done += not result.pop("is_partial", False)
                    yield result.pop("case"), result
            status = process.wait()
            timer.cancel()
            stderr.seek(0)
            reason = (status and stderr.read().strip()[-4000:]) or f"exit status {status}"
        if time.monotonic() >= deadline:
            yield "time", {"error": "The time was up."}
            return
        if names is None:
            yield "all", {"error": reason}
            return
        if done < (before + 1 if last else len(names)):  # else it had finished, whatever ended it then
            yield names[done], {"error": reason}
            done += 1


def _line(contender: str, result: dict, own: float) -> str:
    """Returns time and memory of a contender, and its time over that of this package."""
    low, median, high = (1000 * x for x in (result["quartiles"][0], result["seconds"], result["quartiles"][1]))
    line = (
        f"{contender} {median:.2f} ({low:.2f} to {high:.2f}) ms, {result['seconds'] / own:.2f}, {result['MiB']:.0f} MiB"
    )
    if "loss_difference" in result:
        line += f", losses differ by {result['loss_difference']:.1e}"
    return line


def summary(results: dict[str, dict[str, dict]]) -> Iterator[str]:
    """Yields a line for each contender's check, for each timed case, and for what did not run."""
    for contender in ("wit_trl", "trl"):
        checks = results.get(f"check, {contender}", {})
        for dtype, limit in LIMITS.items():
            name = str(dtype).removeprefix("torch.")
            of_dtype = [result for case, result in checks.items() if f", {name}," in case]
            errors = [error for result in of_dtype for error in result.get("errors", {}).values()]
            if of_dtype:
                right = sum(result.get("is_right", False) for result in of_dtype)
                most = max(errors, key=lambda error: (error != error, error), default=float("nan"))  # NaN is the most
                yield f"{contender} in {name}: {right} of {len(of_dtype)} right, {most:.1e} off, {limit:.0e} allowed"
    failed = []
    by_case: dict[str, dict[str, dict]] = collections.defaultdict(dict)
    for key, cases in results.items():
        for case, result in cases.items():
            for contender, part in [(key.split(", ", 1)[1], result), *result.get("trainers", {}).items()]:
                if "seconds" in part:
                    by_case[case][contender] = part
                if "error" in part:
                    failed.append(f"{contender}, {case}: did not run: {part['error'].splitlines()[-1][:200]}")
    for case, found in by_case.items():
        own = found.get("wit_trl", {}).get("seconds", float("nan"))
        yield f"{case}: {'; '.join(_line(contender, result, own) for contender, result in found.items())}"
    yield from failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, xpu or cpu")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--minutes", type=float, default=10.0, help="after which all that runs is ended")
    parser.add_argument("--only", default="", help="of check, head, step with a contender: what holds this")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--worker", nargs=2, metavar=("KIND", "CONTENDER"), help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--last", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(*args.worker, args.device, args.repeats, args.first, args.last)
        return
    deadline = time.monotonic() + 60 * args.minutes
    name = torch.get_device_module(args.device).get_device_name() if args.device != "cpu" else platform.machine()
    print(f"{name}, torch {torch.__version__}", flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, dict]] = collections.defaultdict(dict)
    arguments = ["--device", args.device, "--repeats", str(args.repeats)]
    for kind, contender in (job for job in JOBS if args.only in ", ".join(job)):
        for case, result in run_job(arguments, contender, kind, deadline):
            of_job = results[f"{kind}, {contender}"]
            of_job[case] = of_job.get(case, {}) | result  # a failure leaves what was measured before
            found = {"device": name, "torch": torch.__version__, "results": results}
            (args.output / "gpu.json").write_text(json.dumps(found, indent=1))
        print(f"{kind}, {contender}: {len(results[f'{kind}, {contender}'])} cases", flush=True)
    print(*summary(results), sep="\n")
    checks = results.get("check, wit_trl", {}).values()
    if any(not result.get("is_right", True) for result in checks):
        sys.exit("The head is wrong on this device.")
    if any("error" in result for result in checks):
        sys.exit("The head was not checked whole.")


if __name__ == "__main__":
    main()
