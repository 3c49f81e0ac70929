"""
Rows a second of the preparation of a data set, which the constructor of the trainer does, and the peak of the memory of
its process, side by side in one run:

    python benchmarks/preparation.py [--output runs/preparation] [--repeats 3]
    python benchmarks/preparation.py --scale 0.01 --cases text ", 4 turns" --num_proc 1  # a quick look
    python benchmarks/preparation.py --cases messages, --contenders "wit_trl, spans" wit_trl  # what spans cost

Each repeat of a contender runs in a process of its own, with an empty cache, all on the same data. Prints a table of
medians, and writes `preparation.json` and `preparation.md`. On the template that TRL knows, it trains on the
assistant's turns, as wit_trl does; on the other, where it cannot find them, on all tokens. The time per token of a
conversation tells whether it grows with the number of turns.
"""

import argparse
import importlib.metadata
import inspect
import itertools
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from datasets import Dataset, disable_progress_bars, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


CONTENDERS = ("TRL", "wit_trl", "wit_trl, spans")  # of the last one, spans of the turns have weights
TURNS = 24_000  # of the conversations on the unmarked template, however long each is
# name: (type of data set, template, turns of a row, rows, `max_length`)
CASES = {
    "prompt-completion, text": ("text", None, 2, 20_000, 1024),
    "prompt-completion, short texts": ("short text", None, 2, 200_000, 1024),
    "prompt-completion, messages": ("prompt-completion", "smollm2", 2, 10_000, 1024),
    "messages, known template, 6 turns": ("messages", "llama3", 6, 4_000, 1024),
    **{
        f"messages, unmarked template, {turns} turns": ("messages", "smollm2", turns, TURNS // turns, None)
        for turns in (2, 4, 6, 16, 64, 256)
    },
}
END_OF_TURN = {None: "<eos>", "llama3": "<|eot_id|>", "smollm2": "<|im_end|>"}
SPECIAL_TOKENS = ["<pad>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|im_start|>"]
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MODULES = ("argparse", "asyncio", "difflib", "email.message", "inspect", "logging", "os", "statistics", "tarfile")


def read_texts() -> list[str]:
    """Returns the docstrings of the standard library that these modules show, cut to 40 words."""
    texts = []
    for module in map(importlib.import_module, MODULES):
        holders = [module, *(holder for _, holder in inspect.getmembers(module, inspect.isclass))]
        docs = {inspect.getdoc(value) for holder in holders for _, value in inspect.getmembers(holder)} - {None}
        texts += re.findall(r"(?:\S+\s+){39}\S+", "\n\n".join(sorted(docs)))
    return texts


def save_tokenizer(texts: list[str], folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens = [*SPECIAL_TOKENS, *END_OF_TURN.values()]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<|begin_of_text|>"
    ).save_pretrained(folder)


def save_rows(texts: list[str], kind: str, turns: int, rows: int, path: Path) -> None:
    numbered = (f"{number}. {text}" for number, text in enumerate(itertools.cycle(texts)))  # no two are the same

    def make_row():
        contents = list(itertools.islice(numbered, turns))
        if kind == "short text":
            contents = [" ".join(content.split()[:8]) for content in contents]
        if kind in ("text", "short text"):
            return {"prompt": contents[0], "completion": f" {contents[1]}"}
        messages = [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(contents)]
        return {"messages": messages} if kind == "messages" else {"prompt": messages[:1], "completion": messages[1:]}

    Dataset.from_list([make_row() for _ in range(rows)]).to_parquet(path)


def measure(case: str, contender: str, num_proc: int, folder: Path, cache: str) -> dict[str, float]:
    """Returns the seconds of the trainer's constructor, the tokens that it made, and the peak of the memory in MiB."""
    if contender == "TRL":
        from trl import SFTConfig as Config
        from trl import SFTTrainer as Trainer
    else:
        from wit_trl import WITSFTConfig as Config
        from wit_trl import WITSFTTrainer as Trainer
    from trl.chat_template_utils import llama3_chat_template

    disable_progress_bars()
    _, template, _, _, max_length = CASES[case]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        folder,
        eos_token=END_OF_TURN[template],
        chat_template={None: None, "llama3": llama3_chat_template, "smollm2": SMOLLM2}[template],
    )
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, **size)
    options = {
        "output_dir": cache,
        "max_length": max_length,
        "dataset_num_proc": num_proc if num_proc > 1 else None,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    # Imports what the constructor does, without a use of the tokenizer
    tokenized = Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]]})
    Trainer(LlamaForCausalLM(config), Config(**options), train_dataset=tokenized, processing_class=tokenizer)

    if contender == "wit_trl, spans":
        options["span_loss_weights"] = {"thinking": 0.5, "end_of_turn": 2.0}
    args = Config(assistant_only_loss=contender == "TRL" and template == "llama3", **options)
    dataset = load_dataset("parquet", data_files=str(folder / f"{case}.parquet"), split="train", cache_dir=cache)
    model = LlamaForCausalLM(config)
    start = time.perf_counter()
    trainer = Trainer(model, args, train_dataset=dataset, processing_class=tokenizer)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # as Linux counts it, in KiB
    return {"seconds": seconds, "tokens": sum(map(len, trainer.train_dataset["input_ids"])), "MiB": peak}


def run_worker(*args: str) -> dict[str, float]:
    process = subprocess.run([sys.executable, __file__, "--worker", *args], capture_output=True, text=True)
    if process.returncode:
        sys.exit(f"{args} did not run:\n{process.stderr}")
    return json.loads(process.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/preparation"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="+", default=[""], help="run the cases whose name holds one of these")
    parser.add_argument("--contenders", nargs=2, choices=CONTENDERS, default=CONTENDERS[:2])
    parser.add_argument("--num_proc", nargs="+", type=int, default=[1, 2], help="processes that prepare")
    parser.add_argument("--scale", type=float, default=1, help="multiplies the number of rows")
    parser.add_argument("--worker", nargs=4, metavar=("CASE", "CONTENDER", "NUM_PROC", "DATA"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    disable_progress_bars()
    if args.worker:
        case, contender, num_proc, data = args.worker
        with tempfile.TemporaryDirectory() as cache:
            print(json.dumps(measure(case, contender, int(num_proc), Path(data), cache)))
        return

    results, lines = [], []

    def add_line(*cells: object) -> None:
        lines.append(f"| {' | '.join(map(str, cells))} |")
        print(lines[-1], flush=True)

    units = [f"{contender} {unit}" for unit in ("rows/s", "µs/token", "MiB") for contender in args.contenders]
    add_line("case", "processes", "rows", *units, f"time of {' ÷ '.join(args.contenders)}")
    add_line("---", *["---:"] * (3 + len(units)))
    with tempfile.TemporaryDirectory() as data:
        texts = read_texts()
        save_tokenizer(texts, Path(data))
        for case, (kind, _, turns, rows, _) in CASES.items():
            if not any(part in case for part in args.cases):
                continue
            rows = max(2, round(rows * args.scale))
            save_rows(texts, kind, turns, rows, Path(data, f"{case}.parquet"))
            for num_proc in args.num_proc:
                runs = {contender: [] for contender in args.contenders}
                for _ in range(args.repeats):
                    for contender in args.contenders:
                        runs[contender].append(run_worker(case, contender, str(num_proc), data))
                medians = [
                    statistics.median(run["seconds"] for run in runs[contender]) for contender in args.contenders
                ]
                speeds = [f"{rows / seconds:.1f}" for seconds in medians]
                tokens = [runs[contender][0]["tokens"] for contender in args.contenders]
                costs = [f"{1e6 * s / n:.2f}" for s, n in zip(medians, tokens, strict=True)]
                peaks = [
                    round(statistics.median(run["MiB"] for run in runs[contender])) for contender in args.contenders
                ]
                add_line(case, num_proc, rows, *speeds, *costs, *peaks, f"{medians[0] / medians[1]:.2f}")
                results.append({"case": case, "num_proc": num_proc, "rows": rows, "runs": runs})
    args.output.mkdir(parents=True, exist_ok=True)
    packages = ("wit_trl", "trl", "transformers", "datasets", "tokenizers", "torch")
    versions = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}
    machine = {"machine": platform.machine(), "cpus": os.cpu_count(), "versions": versions}
    (args.output / "preparation.json").write_text(json.dumps({**machine, "results": results}, indent=1))
    (args.output / "preparation.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"preparation.json and preparation.md written to {args.output}")


if __name__ == "__main__":
    main()
