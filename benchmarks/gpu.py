"""
The LM head and the training step on a GPU: against float64, then time and memory, side by side in one run:

    python benchmarks/gpu.py [--output runs/gpu] [--minutes 10]

Each contender runs in a process of its own, this package first. A process that crashes or lacks a package costs the
case it was in. `gpu.json` is written after every case, and a summary is printed at the end. The head needs torch and
Triton alone; TRL's head, and the steps, need the packages of `setup.cfg`; `liger` and `cce` need `liger-kernel` and
`cut-cross-entropy`. Ends with status 1 if the head of this package is wrong.
"""

import argparse
import collections
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from contenders import SELECTING, loss_function

from wit_trl.check.kernels import HEAD_CASES, LIMITS, head_errors, head_inputs
from wit_trl.check.timing import measured, peak_memory, synchronize
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
LLAMA = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
QWEN = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
# name: (kind of model, its configuration, weight of the prompt, LoRA); the weight of the completion is 1
STEPS = {
    "step, Llama-3.2-1B, λp = 0": ("llama", LLAMA, 0.0, False),
    "step, Llama-3.2-1B, λp = 0.2": ("llama", LLAMA, 0.2, False),
    "step, Llama-3.2-1B, λp = 0.2, LoRA": ("llama", LLAMA, 0.2, True),
    "step, Qwen2.5-0.5B, λp = 0.2": ("qwen2", QWEN, 0.2, False),
}
SEQUENCE, BATCH, WARM_UP = 1024, 4, 3
RESULT = "result:"  # before each line of a worker
# What runs, in this order
JOBS = (
    *(("check", "wit_trl"), ("head", "wit_trl"), ("head", "products"), ("check", "trl"), ("head", "trl")),
    *(("step", "wit_trl"), ("step", "trl"), ("head", "liger"), ("head", "cce"), ("head", "original")),
    ("step", "wit_trl, fused_head=trl"),
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
            hidden, weight, _, targets, token_weights = head_inputs(device, torch.bfloat16, *sizes)
            index = token_weights.nonzero().squeeze(1)
            if contender == "products":
                kept = hidden[index]

                def call():
                    logits = kept @ weight.t()
                    logits @ weight
                    if not frozen:
                        logits.t() @ kept

            else:
                hidden.requires_grad_()
                weight.requires_grad_(not frozen)
                loss = loss_function(contender, device, softcap)
                # TRL gives only the weighted tokens to its kernel
                rows = index if contender in (*SELECTING, "trl") else slice(None)

                def call():
                    loss(hidden[rows], weight, targets[rows], token_weights[rows], len(index)).backward()
                    hidden.grad = weight.grad = None

            return measured(call, device, repeats)

        yield name, run


def step(contender: str, device: str, repeats: int) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Yields names of cases, and what trains in each: on random rows, half of them prompt."""
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from wit_trl import WITSFTConfig, WITSFTTrainer

    class Clock(TrainerCallback):
        def __init__(self):
            self.seconds = []

        def on_step_begin(self, *args, **kwargs):
            synchronize(device)
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            synchronize(device)
            self.seconds.append(time.perf_counter() - self.start)

    for name, (kind, config, prompt_loss_weight, lora) in STEPS.items():

        def run(kind=kind, config=config, prompt_loss_weight=prompt_loss_weight, lora=lora):
            torch.manual_seed(0)
            with torch.device(device):
                model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config), dtype=torch.bfloat16)
            generator = torch.Generator().manual_seed(1)
            rows = [
                {
                    # Of few tokens, so that there is something to learn
                    "input_ids": torch.randint(
                        2, min(model.vocab_size, 1000), (SEQUENCE,), generator=generator
                    ).tolist(),
                    "completion_mask": [0] * (SEQUENCE // 2) + [1] * (SEQUENCE - SEQUENCE // 2),
                }
                for _ in range(BATCH * 8)
            ]
            tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
            kwargs = {
                "output_dir": tempfile.mkdtemp(),
                "max_steps": repeats + WARM_UP,
                "per_device_train_batch_size": BATCH,
                "bf16": False,  # the model is in bfloat16 itself
                "use_cpu": device == "cpu",
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "logging_steps": 1,
            }
            if contender == "trl":
                args, trainer_class = SFTConfig(completion_only_loss=prompt_loss_weight == 0, **kwargs), SFTTrainer
            else:
                fused_head = "one_pass" if contender == "wit_trl" else "trl"
                args = WITSFTConfig(
                    completion_loss_weight=1.0,
                    prompt_loss_weight=prompt_loss_weight,
                    fused_head=fused_head,
                    print_weight_report=False,
                    **kwargs,
                )
                trainer_class = WITSFTTrainer
            clock = Clock()
            trainer = trainer_class(
                model,
                args,
                train_dataset=Dataset.from_list(rows),
                processing_class=PreTrainedTokenizerFast(
                    tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
                ),
                peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
                callbacks=[clock],
            )
            if device != "cpu":
                torch.accelerator.reset_peak_memory_stats()
            trainer.train()
            return {
                "seconds": statistics.median(clock.seconds[WARM_UP:]),
                "MiB": peak_memory(device),
                "all_seconds": clock.seconds,
                "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
            }

        yield name, run


def work(kind: str, contender: str, device: str, repeats: int, first: int, last: int | None) -> None:
    """Runs cases in this process. Prints a line of JSON before the first one, and after each."""
    if kind == "check":
        cases = [*check(contender, device)]
    else:
        cases = [*(head if kind == "head" else step)(contender, device, repeats)]
    print(RESULT, json.dumps({"cases": [name for name, _ in cases]}), flush=True)
    for name, run in cases[first:last]:
        print(RESULT, json.dumps({"case": name, **run()}), flush=True)


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
                    done += 1
                    yield result.pop("case"), result
            status = process.wait()
            timer.cancel()
            stderr.seek(0)
            reason = stderr.read().strip()[-4000:] or f"exit status {status}"
        if time.monotonic() >= deadline:
            yield "time", {"error": "The time was up."}
            return
        if names is None:
            yield "all", {"error": reason}
            return
        if status and done < (before + 1 if last else len(names)):  # else it had finished
            yield names[done], {"error": reason}
            done += 1


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
    for case in (*TIMED_HEADS, *STEPS):
        found: dict[str, dict] = {
            key.split(", ", 1)[1]: r[case] for key, r in results.items() if "seconds" in r.get(case, {})
        }
        own = found.get("wit_trl", {}).get("seconds", float("nan"))
        if "wit_trl" in found and "losses" in found.get("trl", {}) and case.endswith("λp = 0"):
            pairs = zip(found["wit_trl"]["losses"], found["trl"]["losses"], strict=True)
            yield f"{case}: losses of all steps differ from TRL's by at most {max(abs(a - b) for a, b in pairs):.4f}"
        cells = (
            f"{c} {1000 * r['seconds']:.2f} ms ({r['seconds'] / own:.2f}) {r['MiB']:.0f} MiB" for c, r in found.items()
        )
        if found:
            yield f"{case}: {'; '.join(cells)}"
    for key, cases in results.items():
        for case, result in cases.items():
            if "error" in result:
                yield f"{key}, {case}: did not run: {result['error'].splitlines()[-1][:200]}"


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
            results[f"{kind}, {contender}"][case] = result
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
