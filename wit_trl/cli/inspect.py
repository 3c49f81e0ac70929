"""`wit-trl inspect`: what the weights do to a training set."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..config import WITSFTConfig
from .arguments import TRAINING_TYPES, Flags, check_packages, errors_in_one_sentence, split_debug


@dataclass
class InspectionArguments:
    """Arguments of `wit-trl inspect` besides those of the training."""

    rows: int = field(default=3, metadata={"help": "Number of rows to show."})
    only: str | None = field(
        default=None,
        metadata={
            "help": "`changed`: show rows in which the data or a setting gives tokens another weight or region than "
            "plain training does, λ apart. The first 1,000 rows (100 with images) are searched.",
            "choices": ["changed"],
        },
    )
    html: str | None = field(default=None, metadata={"help": "File to write the page to, for a browser."})
    histogram: str | None = field(
        default=None,
        metadata={"help": "PNG file for the histogram of lengths. Defaults to that of --html with the suffix .png."},
    )

    def __post_init__(self):
        if self.rows < 0:
            raise ValueError(f"--rows is {self.rows}, but it must not be negative.")
        if self.html is not None and self.histogram is None:
            self.histogram = str(Path(self.html).with_suffix(".png"))
        if self.histogram is None:
            return
        check_packages("The histogram", "matplotlib")
        if self.histogram == self.html:
            raise ValueError(f"--html and --histogram are both {self.html}. Give the page another name, such as .html.")
        for file in filter(None, (self.html, self.histogram)):
            if not Path(file).parent.is_dir():
                raise ValueError(f"Cannot write {file}: there is no folder {Path(file).parent}. Create it first.")


@dataclass
class _DataConfig(WITSFTConfig):
    """The arguments of a training whose model and output do not matter. The machine may have no device for it."""

    place_model_on_device = False  # the model has no weights
    should_save = False  # creates no `output_dir`

    def __post_init__(self):
        self.use_cpu, self.bf16, self.fp16, self.tf32 = True, False, False, None
        self.deepspeed = self.fsdp = self.fsdp_config = self.parallelism_config = None
        self.eval_strategy, self.eval_on_start, self.load_best_model_at_end = "no", False, False
        self.lr_scheduler_type = "constant"  # other schedules may need an evaluation
        self.report_to, self.push_to_hub = "none", False
        self.max_steps = 1  # a stream needs a number of steps
        super().__post_init__()


def main(args: Sequence[str]) -> None:
    """Runs the command. `args` are the arguments after `wit-trl inspect`."""
    args, debug = split_debug(args)
    with errors_in_one_sentence(debug):
        # The flags of the launcher are ignored: they say nothing about the data
        flags = Flags((InspectionArguments, *TRAINING_TYPES), args, prog="wit-trl inspect")
        flags.check_files()
        inspection, arguments = flags.make(InspectionArguments), flags.check(_DataConfig)
        # Imports the trainer, for which `-h` does not wait
        from .inspection import build_trainer, changed_rows, header, show

        trainer, dataset = build_trainer(arguments)
        changed = None if inspection.only is None else changed_rows(trainer, dataset)
        show(header(arguments), trainer, inspection.rows, inspection.html, inspection.histogram, changed)
