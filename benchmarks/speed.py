"""
Time and memory of the LM head with its loss, and of the whole training step, side by side in one run:

    python benchmarks/speed.py [--output runs/speed] [--repeats 5]
    python benchmarks/speed.py --scaling  # of the head, from 1k to 32k tokens
    python benchmarks/gpu.py  # on a GPU, with other cases

Each contender runs in a process of its own, all on the same data. This prints a table of medians, and writes
`speed.json` and `speed.png` (`scaling.json` and `scaling.png`). Memory is the peak resident set minus what is resident
before the call or step. It needs Linux. `liger` and `cce` need `liger-kernel` and `cut-cross-entropy`. For a contender
that cannot run, the reason is printed.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from contenders import SELECTING, loss_function


HIDDEN = 1024
# name: (dtype, vocabulary, share of tokens of weight zero, frozen head, tokens)
HEAD_CASES = {
    "bf16, 128k, half weighted": ("bfloat16", 128256, 0.5, False, 2048),
    "bf16, 128k, all weighted": ("bfloat16", 128256, 0.0, False, 2048),
    "bf16, 128k, half weighted, frozen head": ("bfloat16", 128256, 0.5, True, 2048),
    "fp32, 128k, half weighted": ("float32", 128256, 0.5, False, 2048),
    "bf16, 2k, half weighted": ("bfloat16", 2048, 0.5, False, 2048),
}
SCALING_CASES = {
    f"bf16, 32k, {n >> 10}k tokens": ("bfloat16", 32768, 0.5, False, n) for n in (2**i for i in range(10, 16))
}
HEAD_CONTENDERS = ("products", "wit_trl", "trl", "original", "cce", "liger")
# name: (vocabulary, prompt weight)
STEP_CASES = {
    "step, 128k, λp = 0.3": (128256, 0.3),
    "step, 128k, λp = 0": (128256, 0.0),
    "step, 2k, λp = 0.3": (2048, 0.3),
    "step, 2k, λp = 0": (2048, 0.0),
}
STEP_CONTENDERS = ("wit_trl", "trl", "trl_loss_func", "original", "cce", "liger")


def head_call(contender: str, dtype: str, vocab: int, zero_share: float, frozen: bool, tokens: int):
    """Returns a function that runs head and loss once, forward and backward."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN).to(getattr(torch, dtype)).requires_grad_()
    weight = (torch.randn(vocab, HIDDEN) / HIDDEN**0.5).to(getattr(torch, dtype)).requires_grad_(not frozen)
    targets = torch.randint(vocab, (tokens,))
    token_weights = (torch.arange(tokens) % 2 >= 2 * zero_share).float() * 0.8
    index = token_weights.nonzero().squeeze(1)

    if contender == "products":
        logits = torch.empty(len(index), vocab, dtype=hidden.dtype)

        def products():
            with torch.no_grad():
                kept = hidden[index]
                torch.mm(kept, weight.t(), out=logits)
                torch.mm(logits, weight)
                if not frozen:
                    torch.mm(logits.t(), kept)

        return products

    loss = loss_function(contender)

    def call():
        rows = index if contender in SELECTING else slice(None)
        loss(hidden[rows], weight, targets[rows], token_weights[rows], len(index)).backward()
        hidden.grad = weight.grad = None

    return call


def step_seconds(contender: str, vocab: int, prompt_loss_weight: float, steps: int) -> tuple[list[float], int]:
    """Returns the seconds of training steps of an 8-layer Llama on 1024 tokens, and the peak memory of one in KiB."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from wit_trl import WITSFTConfig, WITSFTTrainer

    class Clock(TrainerCallback):
        def __init__(self):
            self.seconds, self.memory = [], []

        def on_step_begin(self, *args, **kwargs):
            self.before = reset_peak_memory()
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            self.seconds.append(time.perf_counter() - self.start)
            self.memory.append(peak_memory() - self.before)

    class LossOfHiddenStates(SFTTrainer):
        """Computes the loss of the tokens that have a label with `loss_function`."""

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            hidden = model.model(inputs["input_ids"], attention_mask=inputs["attention_mask"])[0][:, :-1]
            labels = inputs["labels"][:, 1:]
            hidden, labels = hidden[labels != -100], labels[labels != -100]
            weights = torch.full(labels.shape, 0.8)
            return loss_function(contender)(hidden, model.lm_head.weight, labels, weights, num_items_in_batch)

    def plain_loss(outputs, labels, num_items_in_batch):
        logits = outputs.logits[:, :-1].float().transpose(1, 2)
        return F.cross_entropy(logits, labels[:, 1:], reduction="sum") / num_items_in_batch

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
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
    args = {
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
    clock = Clock()
    kwargs = {
        "train_dataset": Dataset.from_list(rows),
        "processing_class": PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"),
        "callbacks": [clock],
    }
    if contender == "wit_trl":
        trainer = WITSFTTrainer(model, WITSFTConfig(prompt_loss_weight=prompt_loss_weight, **args), **kwargs)
    else:
        config = SFTConfig(completion_only_loss=prompt_loss_weight == 0, **args)
        if contender == "trl":
            trainer = SFTTrainer(model, config, **kwargs)
        elif contender == "trl_loss_func":
            trainer = SFTTrainer(model, config, compute_loss_func=plain_loss, **kwargs)
        else:
            trainer = LossOfHiddenStates(model, config, **kwargs)
    trainer.train()
    return clock.seconds[1:], max(clock.memory[1:])


def status(name: str) -> int:
    """Returns the memory of this process in KiB: `VmRSS` is resident now, `VmHWM` is the peak since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def reset_peak_memory() -> int:
    """Resets the peak of `peak_memory`, and returns what is resident now in KiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak_memory() -> int:
    return status("VmHWM")


def measure(case: str, contender: str, repeats: int) -> dict[str, float]:
    """Returns the median seconds and the memory of a contender in one case."""
    if case in STEP_CASES:
        seconds, memory = step_seconds(contender, *STEP_CASES[case], repeats)
    else:
        call = head_call(contender, *{**HEAD_CASES, **SCALING_CASES}[case])
        before = reset_peak_memory()
        call()  # the first call is the one that allocates
        memory = peak_memory() - before
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "MiB": memory / 1024, "all_seconds": seconds}


def plot(results: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    contenders = [c for c in dict.fromkeys(HEAD_CONTENDERS + STEP_CONTENDERS) if any(c in r for r in results.values())]
    _, axes = plt.subplots(1, 2, figsize=(11, 0.6 * len(results) + 1.5), sharey=True)
    height = 0.9 / len(contenders)
    for axis, unit in zip(axes, ("seconds", "MiB"), strict=True):
        for i, contender in enumerate(contenders):
            rows = [
                (y + height * i - 0.4, r[contender][unit]) for y, r in enumerate(results.values()) if contender in r
            ]
            axis.barh(*zip(*rows, strict=True), height=height, label=contender)
        axis.set(xlabel=unit, xscale="log", yticks=range(len(results)), yticklabels=list(results))
        axis.grid(alpha=0.3, axis="x")
    axes[0].invert_yaxis()
    axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    plt.savefig(path, dpi=110, bbox_inches="tight")


def plot_scaling(results: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    _, axes = plt.subplots(1, 2, figsize=(11, 4))
    for axis, unit in zip(axes, ("seconds", "MiB"), strict=True):
        for contender in HEAD_CONTENDERS:
            rows = [(SCALING_CASES[c][-1], r[contender][unit]) for c, r in results.items() if contender in r]
            if rows:  # it ran
                axis.plot(*zip(*rows, strict=True), marker="o", label=contender)
        axis.set(xlabel="tokens", ylabel=unit, xscale="log", yscale="log")
        axis.set_xticks([int(case[-1]) for case in SCALING_CASES.values()], [f"{2**i}k" for i in range(6)])
        axis.grid(alpha=0.3)
    axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    plt.savefig(path, dpi=110, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/speed"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="run the cases whose name holds this")
    parser.add_argument("--scaling", action="store_true", help="run the head with more and more tokens")
    parser.add_argument("--worker", nargs=2, metavar=("CASE", "CONTENDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(*args.worker, args.repeats)))
        return

    results = {}
    print(f"{'case':40}{'contender':14}{'seconds':>9}{'MiB':>9}{'time ÷ wit_trl':>16}{'memory ÷ wit_trl':>18}")
    for case in SCALING_CASES if args.scaling else [*HEAD_CASES, *STEP_CASES]:
        if args.only not in case:
            continue
        results[case] = {}
        for contender in STEP_CONTENDERS if case in STEP_CASES else HEAD_CONTENDERS:
            command = [sys.executable, __file__, "--repeats", str(args.repeats), "--worker", case, contender]
            process = subprocess.run(command, capture_output=True, text=True)
            if process.returncode:
                reason = process.stderr.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
                print(f"{case:40}{contender:14}did not run: {reason[0][:80]}", flush=True)
            else:
                results[case][contender] = json.loads(process.stdout.splitlines()[-1])
        own = results[case]["wit_trl"]
        for contender, result in results[case].items():
            time_ratio, memory_ratio = result["seconds"] / own["seconds"], result["MiB"] / max(own["MiB"], 1)
            print(
                f"{case:40}{contender:14}{result['seconds']:9.3f}{result['MiB']:9.0f}"
                f"{time_ratio:16.2f}{memory_ratio:18.2f}",
                flush=True,
            )
    args.output.mkdir(parents=True, exist_ok=True)
    machine = {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    name, draw = ("scaling", plot_scaling) if args.scaling else ("speed", plot)
    (args.output / f"{name}.json").write_text(json.dumps({**machine, "results": results}, indent=1))
    draw(results, args.output / f"{name}.png")
    print(f"{name}.json and {name}.png written to {args.output}")


if __name__ == "__main__":
    main()
