"""`wit-trl --version`: the versions that a bug report needs."""

import importlib.metadata
import platform

import torch

from .. import __version__


_PACKAGES = ("trl", "transformers", "datasets", "accelerate")
_EXTRAS = ("peft", "bitsandbytes", "deepspeed", "matplotlib", "optuna")


def versions() -> str:
    """Returns the versions of this package, of its dependencies and of the machine, one on a line."""
    if torch.cuda.is_available():
        device = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    elif torch.accelerator.is_available():
        device = f"{torch.accelerator.device_count()} x {torch.accelerator.current_accelerator()}"
    else:
        device = f"CPU, {torch.get_num_threads()} threads"
    facts = {"wit_trl": __version__, "python": platform.python_version(), "platform": platform.platform()}
    facts |= {"torch": torch.__version__, "cuda": torch.version.cuda or "not in this build of torch", "device": device}
    for package in _PACKAGES + _EXTRAS:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    return "".join(f"{name}: {fact}\n" for name, fact in facts.items())
