"""What `wit-trl check` does after its flags."""

import dataclasses
import itertools
import json
import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import datasets
import torch
import transformers
from datasets import Dataset, DatasetDict
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoConfig

from ..check.checks import KERNELS, Check, check_kernels, check_trainers, time_heads
from ..check.own_model import check_endpoints, check_loss
from ..loss.functions import uses_one_pass
from ..training.attributes import set_for_now
from .arguments import Arguments
from .check_ranks import check_ranks
from .inspection import header, show
from .loading import TRAIN_SPLIT, errors_of_model, select_splits
from .sft import prepare
from .versions import versions


# Hidden size and vocabulary of a Llama-3.2-1B
_DEFAULT_SIZES = (2048, 128256)
_WORTH = 0.95  # of the time: less is gained by another head than the times vary
_TIMED = {
    "products": "matrix products alone, the limit",
    "one_pass": 'fused_head="one_pass"',
    "trl": 'fused_head="trl"',
}


def head_sizes(arguments: Arguments) -> tuple[int, int]:
    """Returns the hidden size and the vocabulary of the model, or of a Llama-3.2-1B."""
    name = arguments.model.model_name_or_path
    if name is None:
        return _DEFAULT_SIZES
    with errors_of_model(name):
        config = AutoConfig.from_pretrained(
            name,
            revision=arguments.model.model_revision,
            trust_remote_code=arguments.training.trust_remote_code,
        ).get_text_config()
    return config.hidden_size, config.vocab_size


def check_model(arguments: Arguments) -> Iterator[Check]:
    """Shows the first row with its regions, and checks the loss on the user's model, with a micro-batch of rows."""
    args, split = arguments.training, arguments.script.dataset_train_split
    with tempfile.TemporaryDirectory() as folder:
        args.output_dir, args.push_to_hub, args.eval_strategy, args.eval_on_start = folder, False, "no", False
        trainer, dataset = prepare(arguments)
        show(header(arguments), trainer, 1, None, None)
        yield check_loss(trainer)
        rows = Dataset.from_list(
            list(itertools.islice(dataset[split], args.per_device_train_batch_size)), dataset[split].features
        )
        (rows,) = select_splits(DatasetDict({split: rows}), {TRAIN_SPLIT: split}, trainer.processing_class, args)
        yield from check_endpoints(trainer, rows)


def advice(seconds: dict[str, float], device: str, wrong: set[str]) -> str:
    """Returns which head to choose here, from times by the names of kernels and the names of those that are wrong."""
    chosen = "one_pass" if uses_one_pass("auto", torch.device(device)) else "trl"
    right = [name for name in KERNELS if name not in wrong and seconds[name] < math.inf]
    if not right:
        return "No head is right here. Do not train on this device, and report it."
    best = min(right, key=lambda name: seconds[name])
    if best == chosen or (chosen in right and seconds[best] > _WORTH * seconds[chosen]):
        return f'Leave `fused_head="auto"`: it is "{chosen}" here.'
    if chosen not in right:
        return f'Set `fused_head="{best}"`: "auto" is "{chosen}" here, which is wrong or fails.'
    saved = seconds[chosen] - seconds[best]
    return (
        f'Set `fused_head="{best}"`: it takes {saved / seconds[chosen]:.0%} less time than "{chosen}", which "auto" is '
        "here."
    )


def table(found: list[Check], seconds: dict[str, float], sizes: tuple[int, int]) -> Iterator[Table]:
    """Yields the results, and the times of head and loss."""
    checks = Table("", "compared", "difference over norm", "allowed", "", box=SIMPLE_HEAD)
    for result in found:
        if result.skipped is not None:
            checks.add_row("-", Text(result.name), "", "", Text(result.skipped))
            continue
        mark = Text("✓", "green") if result.is_right else Text("✗", "red")
        meaning = "" if result.is_right else result.remedy if result.error is None else result.error
        checks.add_row(mark, Text(result.name), f"{result.figure:.1e}", f"{result.limit:.0e}", Text(meaning))
    yield checks
    times = Table("head and loss, forward and backward", "ms", box=SIMPLE_HEAD)
    times.title = f"hidden size {sizes[0]:,}, vocabulary {sizes[1]:,}"
    for name, value in seconds.items():
        times.add_row(_TIMED[name], f"{1000 * value:.1f}" if value < math.inf else "failed")
    yield times


def _finite(value: float) -> float | None:
    """Returns what JSON has a number for."""
    return value if math.isfinite(value) else None


def check(arguments: Arguments, file: str | None, launch_flags: Sequence[str], environment: Mapping[str, str]) -> bool:
    """
    Prints all results, and writes them to a file if one is named. Returns whether all are right. With flags of the
    launcher, ranks are launched with them in this environment.
    """
    device = arguments.training.device.type
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of TRL's own defaults
    console, found = Console(highlight=False), []
    console.print(versions(), markup=False)
    sources = [check_kernels(device), check_trainers(device)]
    if launch_flags:
        sources.append(check_ranks(device, launch_flags, environment))
    if arguments.model.model_name_or_path is not None:
        sources.append(check_model(arguments))
    sizes = head_sizes(arguments)
    # TF32, which `--tf32 True` turns on, is no error of a kernel
    with console.status("Checks the kernels") as status, set_for_now(torch.backends, fp32_precision="ieee"):
        for result in itertools.chain.from_iterable(sources):
            found.append(result)
            status.update(f"{len(found)} checks done, the last one: {result.name}")
        status.update("Times the head")
        seconds = time_heads(device, *sizes)
    console.print(*table(found, seconds, sizes))
    is_right = all(result.is_right for result in found)
    sentence = advice(seconds, device, {result.kernel for result in found if not result.is_right})
    console.print(sentence, markup=False)
    console.print("All is right." if is_right else "Something is wrong. A bug report needs all that is printed here.")
    if file is not None:
        results = [
            {**dataclasses.asdict(result), "figure": _finite(result.figure), "is_right": result.is_right}
            for result in found
        ]
        times = {name: _finite(value) for name, value in seconds.items()}
        values = {"versions": versions(), "results": results, "seconds": times, "advice": sentence}
        Path(file).write_text(json.dumps(values, indent=1), encoding="utf-8")
    return is_right
