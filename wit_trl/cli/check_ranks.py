"""
Two ranks against one process, for `wit-trl check`.

1. `check_ranks` launches processes as `wit-trl sft` does, with the same flags of the launcher.
2. Each of them runs `main`: tiny trainings, of which the first one saves losses and parameters.
3. `check_ranks` trains the same in one process, and compares.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import PartialState

from ..check.checks import TRAINING_LIMIT, Check, compare, wit_training
from ..check.trainers import LAYOUTS, TinyTraining, Trained, differences
from . import end_with_launcher
from .arguments import TRAINING_TYPES, Flags


_SECONDS = 300.0  # after which ranks that do not answer are ended
_LAUNCH = "import sys; from wit_trl.cli import launch; launch.main(sys.argv[1:], 'wit_trl.cli.check_ranks')"
_FILE = "trained.pt"
_BATCH = 2  # rows of a rank in a step
_ROWS = 16  # of the data set, for each rank. Packed, they are enough for all steps
_LAST_WORDS = re.compile(r"(?:\[rank\d+\]: *)?((?:error|[\w.]*(?:Error|Exception)): .*)")


def _launch(arguments: Sequence[str], environment: Mapping[str, str]) -> str | None:
    """Runs the ranks. Returns why they failed, as the last line says it."""
    with tempfile.TemporaryFile("w+") as output:
        command = [sys.executable, "-P", "-c", _LAUNCH, *arguments]
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            status = process.wait(_SECONDS)
        except subprocess.TimeoutExpired:
            return f"The ranks did not end within {_SECONDS:g} seconds."
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the ranks see that their launcher has ended
            process.wait()
        output.seek(0)
        return None if status == 0 else last_words(output.read()) or f"The ranks ended with status {status}."


def last_words(output: str) -> str:
    """Returns the last error of an output, or else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [match[1] for match in map(_LAST_WORDS.match, lines) if match]
    return (errors or lines or [""])[-1]


def check_ranks(device: str, launch_flags: Sequence[str], environment: Mapping[str, str]) -> Iterator[Check]:
    """Compares a training on several ranks with one in this process. `launch_flags` are those of `wit-trl sft`."""
    remedy = (
        "Ranks train otherwise than one process. Train in one process, with more `gradient_accumulation_steps`, and "
        "report it with the file of --accelerate_config."
    )
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--mixed_precision", "no", *launch_flags, "--use_cpu", str(device == "cpu"), "--output_dir", folder]
        if (error := _launch(flags, environment)) is not None:
            yield Check("(0.2, 0.8), ranks as one process", float("inf"), TRAINING_LIMIT, remedy, error)
            return
        results = torch.load(Path(folder, _FILE))
    batch_size, ranks = results.pop("batch_size"), results.pop("ranks")
    train = TinyTraining(device, _ROWS * batch_size // _BATCH)
    for layout, found in results.items():

        def measure(layout=layout, found=found):
            expected = wit_training(train, 0.2, 0.8, per_device_train_batch_size=batch_size, **LAYOUTS[layout])
            return max(differences(Trained(*found), expected).values())

        yield compare(f"(0.2, 0.8), {ranks} ranks as one, {layout}", TRAINING_LIMIT, remedy, measure)


def main(args: Sequence[str] | None = None) -> None:
    """Trains as one of the ranks. `args` are the flags, by default those of the process."""
    end_with_launcher()
    flags = Flags(TRAINING_TYPES, sys.argv[1:] if args is None else args)
    accelerator = None if flags.given["use_cpu"] else torch.accelerator.current_accelerator()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    sharing = 1  # ranks that have the same rows, and parts of their tokens
    for name in ("SP", "CP"):
        sharing *= int(os.environ.get(f"PARALLELISM_CONFIG_{name}_SIZE", "1"))
    layouts = ["padded", *(["packed"] if sharing == 1 else [])]  # packed rows are refused there
    train = TinyTraining("cpu" if accelerator is None else accelerator.type, _ROWS * ranks // sharing)
    trained = {
        layout: wit_training(train, 0.2, 0.8, per_device_train_batch_size=_BATCH, **LAYOUTS[layout])
        for layout in layouts
    }
    state = PartialState()
    if state.is_main_process:
        tensors = {layout: [*results] for layout, results in trained.items()}
        counts = {"batch_size": _BATCH * ranks // sharing, "ranks": ranks}
        torch.save({**tensors, **counts}, Path(flags.given["output_dir"], _FILE))
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main()
