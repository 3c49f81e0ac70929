"""`wit-trl inspect`: what the weights do to a training set."""

import functools
import io
import itertools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, LlamaForCausalLM, PreTrainedModel

from ..config import WITSFTConfig
from ..conversation.chat_template import tokenizer_of
from ..data.vision_collator import DataCollatorForVisionLanguageWIT
from ..embedded import embedded_config, load_stdlib_functions, train_embedded_tokenizer
from ..report.rows import html_page, plot_lengths, show_page
from ..trainer import WITSFTTrainer
from .arguments import TRAINING_TYPES, Arguments, Flags, check_packages, errors_in_one_sentence, split_debug
from .loading import errors_of_data, errors_of_model, load_data, select_splits


@dataclass
class InspectionArguments:
    """Arguments of `wit-trl inspect` besides those of the training."""

    rows: int = field(default=3, metadata={"help": "Number of rows to show."})
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


def _empty_model(name: str, **kwargs: Any) -> PreTrainedModel:
    """Returns the model without its weights. The data does not depend on them."""
    config = AutoConfig.from_pretrained(name, **kwargs)
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        if architecture is None:  # its code is not in transformers, but in the model's repository
            return AutoModelForCausalLM.from_config(config, **kwargs)
        return architecture(config)


def build_trainer(arguments: Arguments) -> WITSFTTrainer:
    """Returns the trainer with its prepared training set and a model without weights."""
    name, args = arguments.model.model_name_or_path, arguments.training
    if name is None:
        dataset = load_stdlib_functions()
        processing_class = train_embedded_tokenizer(dataset)
        with torch.device("meta"):
            model = LlamaForCausalLM(embedded_config(processing_class))
    else:
        dataset = load_data(arguments.script, arguments.dataset)
        kwargs = {"revision": arguments.model.model_revision, "trust_remote_code": args.trust_remote_code}
        with errors_of_model(name):
            model = _empty_model(name, **kwargs)
            processing_class = AutoProcessor.from_pretrained(name, **kwargs)
    # A chat template that is cloned from a model may add tokens. Their embeddings are the mean of weights, if any
    model.resize_token_embeddings = functools.partial(model.resize_token_embeddings, mean_resizing=False)
    split = arguments.script.dataset_train_split
    train_dataset = select_splits(dataset, [split], processing_class, args)[split]
    with errors_of_data(arguments.script, arguments.dataset):
        return WITSFTTrainer(model=model, args=args, train_dataset=train_dataset, processing_class=processing_class)


def header(arguments: Arguments) -> str:
    """Returns what the page opens with: the model, the data set and the length at which rows are cut."""
    model, data = arguments.model.model_name_or_path, arguments.script.dataset_name
    if arguments.dataset.datasets:
        data = ", ".join(part.path for part in arguments.dataset.datasets)
    if model is None:
        model = "embedded, a Llama of 2 million parameters"
        data = "embedded, functions of Python's standard library"
    split, max_length = arguments.script.dataset_train_split, arguments.training.max_length
    return f"model: {model}\ndata set: {data}, split {split}\nmax_length: {max_length}\n"


def show(inspection: InspectionArguments, header: str, trainer: WITSFTTrainer) -> None:
    """Prints the rows and the report. Writes the page and the histogram, if they were asked for."""
    report = trainer.weight_report()
    rows: Iterable = itertools.islice(trainer.train_dataset, inspection.rows)
    if isinstance(trainer.data_collator, DataCollatorForVisionLanguageWIT):
        rows = trainer.data_collator.tokenize_rows(rows)
    tokenizer = tokenizer_of(trainer.processing_class)
    shown = (list(rows), tokenizer, report, trainer.args.num_train_epochs)
    if inspection.histogram is not None:
        histogram = plot_lengths(*report.lengths)
        Path(inspection.histogram).write_bytes(histogram)
    if inspection.html is not None:
        Path(inspection.html).write_text(html_page(header, *shown, histogram), encoding="utf-8")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what the terminal cannot encode
    print(header)
    show_page(Console(), *shown)
    sys.stdout.flush()  # here it is caught if nothing reads it any more
    for file in filter(None, (inspection.html, inspection.histogram)):
        print(f"Written: {file}", file=sys.stderr)


def main(args: Sequence[str]) -> None:
    """Runs the command. `args` are the arguments after `wit-trl inspect`."""
    args, debug = split_debug(args)
    with errors_in_one_sentence(debug):
        # The flags of the launcher are ignored: they say nothing about the data
        flags = Flags((InspectionArguments, *TRAINING_TYPES), args, prog="wit-trl inspect")
        inspection, arguments = flags.make(InspectionArguments), flags.check(_DataConfig)
        show(inspection, header(arguments), build_trainer(arguments))
