"""What `wit-trl check` does after its flags."""

import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import torch
import transformers
from rich.console import Console
from transformers import AutoConfig

from ..check.checks import KERNELS, Check, check_kernels, check_loss, check_trainers, time_heads
from ..loss.functions import uses_one_pass
from .arguments import Arguments
from .inspection import header, show
from .loading import errors_of_model
from .sft import prepare
from .versions import versions


# Hidden size and vocabulary of a Llama-3.2-1B
_DEFAULT_SIZES = (2048, 128256)


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


def check_model(arguments: Arguments, console: Console) -> Iterator[Check]:
    """Shows the first row with its regions, and checks the loss on the user's model."""
    with tempfile.TemporaryDirectory() as folder:
        arguments.training.output_dir = folder
        arguments.training.eval_strategy, arguments.training.eval_on_start = "no", False
        trainer, _ = prepare(arguments)
        show(header(arguments), trainer, 1, None, None)
        yield check_loss(trainer)


def advice(seconds: dict[str, float], device: str, wrong: set[str]) -> str:
    """Returns which head to choose here, from times by the names of kernels and the names of those that are wrong."""
    chosen = "one_pass" if uses_one_pass("auto", torch.device(device)) else "trl"
    right = [name for name in KERNELS if name not in wrong]
    if not right:
        return "No head is right here. Do not train on this device, and report it."
    best = min(right, key=lambda name: seconds[name])
    if best == chosen:
        return f'Leave `fused_head="auto"`: it is "{chosen}" here.'
    if chosen in wrong:
        return f'Set `fused_head="{best}"`: "auto" is "{chosen}" here, which is wrong.'
    saved = seconds[chosen] - seconds[best]
    return (
        f'Set `fused_head="{best}"`: it takes {saved / seconds[chosen]:.0%} less time than "{chosen}", which "auto" is '
        "here."
    )


def check(arguments: Arguments, file: str | None) -> bool:
    """Prints all results as they come, and writes them to a file. Returns whether all are right."""
    device = arguments.training.device.type
    console, found = Console(highlight=False), []
    console.print(versions(), markup=False)
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    sources = [check_kernels(device), check_trainers(device)]
    if arguments.model.model_name_or_path is not None:
        sources.append(check_model(arguments, console))
    for source in sources:
        for result in source:
            found.append(result)
            mark = "[green]✓[/green]" if result.is_right else "[red]✗[/red]"
            console.print(f"{mark} {result.name}: {result.figure:.1e} off, {result.limit:.0e} allowed")
            if not result.is_right:
                console.print(f"  {result.remedy}" + (f" ({result.error})" if result.error else ""), markup=False)
    hidden_size, vocabulary = head_sizes(arguments)
    seconds = time_heads(device, hidden_size, vocabulary)
    console.print(f"\nHead and loss, hidden size {hidden_size}, vocabulary {vocabulary}, forward and backward:")
    for name, value in seconds.items():
        console.print(f"  {name}: {1000 * value:.1f} ms")
    wrong = {
        name for name in KERNELS for result in found if result.name.startswith(f"head {name},") and not result.is_right
    }
    sentence = advice(seconds, device, wrong)
    console.print(sentence, markup=False)
    is_right = all(result.is_right for result in found)
    console.print("All is right." if is_right else "Something is wrong. A bug report needs all that is printed here.")
    if file is not None:
        results = [{**dataclasses.asdict(result), "is_right": result.is_right} for result in found]
        values = {"versions": versions(), "results": results, "seconds": seconds, "advice": sentence}
        Path(file).write_text(json.dumps(values, indent=1), encoding="utf-8")
    return is_right
