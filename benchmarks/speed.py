"""
Time and memory of the LM head with its loss, and of the whole training step, side by side in one run:

    python benchmarks/speed.py [--output runs/speed] [--repeats 5]

Each contender runs in a process of its own, all on the same data. Prints a table of medians, and writes `speed.json`
and `speed.png`. Memory is the peak resident set over what is resident before the first call or step.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import psutil
import torch
import torch.nn.functional as F


HIDDEN = 1024
# name: (dtype, vocabulary, share of tokens of weight zero, frozen head)
HEAD_CASES = {
    "bf16, 128k, half weighted": ("bfloat16", 128256, 0.5, False),
    "bf16, 128k, all weighted": ("bfloat16", 128256, 0.0, False),
    "bf16, 128k, half weighted, frozen head": ("bfloat16", 128256, 0.5, True),
    "fp32, 128k, half weighted": ("float32", 128256, 0.5, False),
    "bf16, 2k, half weighted": ("bfloat16", 2048, 0.5, False),
}
HEAD_CONTENDERS = ("products", "wit_trl", "trl", "original")
# name: (vocabulary, prompt weight)
STEP_CASES = {
    "step, 128k, λp = 0.3": (128256, 0.3),
    "step, 128k, λp = 0": (128256, 0.0),
    "step, 2k, λp = 0.3": (2048, 0.3),
    "step, 2k, λp = 0": (2048, 0.0),
}
STEP_CONTENDERS = ("wit_trl", "trl")
CASES = {**dict.fromkeys(HEAD_CASES, HEAD_CONTENDERS), **dict.fromkeys(STEP_CASES, STEP_CONTENDERS)}


def head_call(contender: str, dtype: str, vocab: int, zero_share: float, frozen: bool):
    """A function that runs head and loss, forward and backward, once on 2048 tokens."""
    torch.manual_seed(0)
    hidden = torch.randn(2048, HIDDEN).to(getattr(torch, dtype)).requires_grad_()
    weight = (torch.randn(vocab, HIDDEN) / HIDDEN**0.5).to(getattr(torch, dtype)).requires_grad_(not frozen)
    targets = torch.randint(vocab, (2048,))
    token_weights = (torch.arange(2048) % 2 >= 2 * zero_share).float() * 0.8
    count = int((token_weights != 0).sum())

    if contender == "products":
        index = token_weights.nonzero().squeeze(1)
        logits = torch.empty(count, vocab, dtype=hidden.dtype)

        def products():
            with torch.no_grad():
                kept = hidden[index]
                torch.mm(kept, weight.t(), out=logits)
                torch.mm(logits, weight)
                if not frozen:
                    torch.mm(logits.t(), kept)

        return products

    if contender == "wit_trl":
        from wit_trl import weighted_linear_cross_entropy

        def loss():
            return weighted_linear_cross_entropy(hidden, weight, targets, token_weights, count).loss

    elif contender == "trl":
        from trl.kernels import ChunkedLogProbFunction

        def loss():
            outputs = ("log_probs", "entropy", "is_top1")
            log_probs = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, outputs)[0]
            return -(log_probs * token_weights).sum() / count

    else:  # the way of the paper's scripts: full float32 logits, and a copy of them for log_softmax

        def loss():
            log_probs = torch.log_softmax(F.linear(hidden, weight).float(), dim=1)
            return -(log_probs.gather(1, targets[:, None]).squeeze(1) * token_weights).sum() / count

    def call():
        loss().backward()
        hidden.grad = weight.grad = None

    return call


def step_seconds(contender: str, vocab: int, prompt_loss_weight: float, steps: int) -> tuple[list[float], int]:
    """The seconds of training steps of an 8-layer Llama on 1024 tokens, and the peak memory they added in KiB."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from wit_trl import WITSFTConfig, WITSFTTrainer

    class Clock(TrainerCallback):
        def __init__(self):
            self.seconds, self.memory = [], []

        def on_step_begin(self, *args, **kwargs):
            self.start = time.perf_counter()
            self.memory.append(resident_memory())

        def on_step_end(self, *args, **kwargs):
            self.seconds.append(time.perf_counter() - self.start)
            self.memory.append(peak_memory())

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)  # no float32 model on the way, whose peak would hide that of the step
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    rows = [
        {"input_ids": torch.randint(1, vocab, (512,)).tolist(), "completion_mask": [0] * 256 + [1] * 256}
        for _ in range(2 * (steps + 1))
    ]
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    kwargs = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": steps + 1,  # the first warms up
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "bf16": False,  # the model is in bfloat16 itself
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if contender == "trl":
        trainer_class, args = SFTTrainer, SFTConfig(completion_only_loss=prompt_loss_weight == 0, **kwargs)
    else:
        trainer_class, args = WITSFTTrainer, WITSFTConfig(prompt_loss_weight=prompt_loss_weight, **kwargs)
    clock = Clock()
    trainer = trainer_class(
        model,
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"),
        callbacks=[clock],
    )
    trainer.train()
    return clock.seconds[1:], clock.memory[-1] - clock.memory[0]


def resident_memory() -> int:
    """Resident set of this process now, in KiB."""
    return psutil.Process().memory_info().rss // 1024


def peak_memory() -> int:
    """Peak resident set of this process so far, in KiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak


def measure(case: str, contender: str, repeats: int) -> dict[str, float]:
    if case in STEP_CASES:
        seconds, memory = step_seconds(contender, *STEP_CASES[case], repeats)
    else:
        call = head_call(contender, *HEAD_CASES[case])
        before = resident_memory()
        call()
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        memory = peak_memory() - before
    return {"seconds": statistics.median(seconds), "MiB": memory / 1024, "all_seconds": seconds}


def plot(results: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    contenders = ["products", "wit_trl", "trl", "original"]
    _, axes = plt.subplots(1, 2, figsize=(11, 0.5 * len(results) + 1.5), sharey=True)
    for axis, unit in zip(axes, ("seconds", "MiB"), strict=True):
        for i, contender in enumerate(contenders):
            rows = [(y + 0.2 * (i - 1.5), r[contender][unit]) for y, r in enumerate(results.values()) if contender in r]
            axis.barh(*zip(*rows, strict=True), height=0.18, label=contender)
        axis.set(xlabel=unit, xscale="log", yticks=range(len(results)), yticklabels=list(results))
        axis.grid(alpha=0.3, axis="x")
    axes[0].invert_yaxis()
    axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    plt.savefig(path, dpi=110, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/speed"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="run the cases whose name holds this")
    parser.add_argument("--worker", nargs=2, metavar=("CASE", "CONTENDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(*args.worker, args.repeats)))
        return

    results = {}
    print(f"{'case':40}{'contender':12}{'seconds':>9}{'MiB':>9}{'time ÷ wit_trl':>16}{'memory ÷ wit_trl':>18}")
    for case, contenders in CASES.items():
        if args.only not in case:
            continue
        results[case] = {}
        for contender in contenders:
            command = [sys.executable, __file__, "--repeats", str(args.repeats), "--worker", case, contender]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[case][contender] = json.loads(output.splitlines()[-1])
        own = results[case]["wit_trl"]
        for contender, result in results[case].items():
            time_ratio, memory_ratio = result["seconds"] / own["seconds"], result["MiB"] / max(own["MiB"], 1)
            print(
                f"{case:40}{contender:12}{result['seconds']:9.3f}{result['MiB']:9.0f}"
                f"{time_ratio:16.2f}{memory_ratio:18.2f}",
                flush=True,
            )
    args.output.mkdir(parents=True, exist_ok=True)
    machine = {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    (args.output / "speed.json").write_text(json.dumps({**machine, "results": results}, indent=1))
    plot(results, args.output / "speed.png")
    print(f"speed.json and speed.png written to {args.output}")


if __name__ == "__main__":
    main()
