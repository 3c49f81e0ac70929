"""`wit-trl inspect`: what the weights do to a training set."""

import functools
import importlib.util
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
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    LlamaForCausalLM,
    PreTrainedModel,
)
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

from ..config import WITSFTConfig
from ..conversation.chat_template import tokenizer_of
from ..data.vision_collator import DataCollatorForVisionLanguageWIT
from ..embedded import embedded_config, load_stdlib_functions, train_embedded_tokenizer
from ..report.rows import html_page, plot_lengths, show_page
from ..trainer import WITSFTTrainer
from .arguments import errors_in_one_sentence, parse_flags, split_debug
from .loading import errors_of_model, load_data, select_splits


@dataclass
class InspectionArguments:
    """
    Arguments of `wit-trl inspect` besides those of the training.

    Args:
        rows (`int`, *optional*, defaults to `3`):
            Number of rows to show.
        html (`str`, *optional*):
            File to write the page to, for a browser. A file of this name is overwritten.
        histogram (`str`, *optional*):
            PNG file to write the histogram of prompt and completion lengths to. Defaults to the name of the page with
            the suffix `.png`.
    """

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
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("The histogram needs matplotlib. Install it with `pip install matplotlib`.")
        if self.histogram == self.html:
            raise ValueError(f"--html and --histogram are both {self.html}. Give the page another name, such as .html.")
        for file in filter(None, (self.html, self.histogram)):
            if not Path(file).parent.is_dir():
                raise ValueError(f"Cannot write {file}: there is no folder {Path(file).parent}. Create it first.")


@dataclass
class _DataConfig(WITSFTConfig):
    """The arguments of a training whose model and output do not matter, on a machine that may have no device for it."""

    place_model_on_device = False  # it has no weights
    should_save = False  # creates no `output_dir`

    def __post_init__(self):
        self.use_cpu, self.bf16, self.fp16, self.tf32 = True, False, False, None
        self.deepspeed = self.fsdp = self.fsdp_config = self.parallelism_config = None
        self.eval_strategy, self.eval_on_start, self.load_best_model_at_end = "no", False, False
        self.lr_scheduler_type = "constant"  # others may need an evaluation
        self.report_to, self.push_to_hub = "none", False
        self.max_steps = 1  # which a stream has to have
        super().__post_init__()


def _empty_model(name: str, **kwargs: Any) -> PreTrainedModel:
    """Returns the model without its weights, on which the data does not depend."""
    config = AutoConfig.from_pretrained(name, **kwargs)
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        if architecture is None:  # its code is in the repository of the model
            return AutoModelForCausalLM.from_config(config, **kwargs)
        return architecture(config)


def build_trainer(
    script_args: ScriptArguments, args: WITSFTConfig, model_args: ModelConfig, dataset_args: DatasetMixtureConfig
) -> WITSFTTrainer:
    """Returns the trainer with its prepared training set and a model without weights."""
    name = model_args.model_name_or_path
    if name is None:
        dataset = load_stdlib_functions()
        processing_class = train_embedded_tokenizer(dataset)
        with torch.device("meta"):
            model = LlamaForCausalLM(embedded_config(processing_class))
    else:
        dataset = load_data(script_args, dataset_args)
        kwargs = {"revision": model_args.model_revision, "trust_remote_code": args.trust_remote_code}
        with errors_of_model(name):
            model = _empty_model(name, **kwargs)
            processing_class = AutoProcessor.from_pretrained(name, **kwargs)
    # A chat template that is cloned from a model may add tokens, whose means need weights
    model.resize_token_embeddings = functools.partial(model.resize_token_embeddings, mean_resizing=False)
    split = script_args.dataset_train_split
    train_dataset = select_splits(dataset, [split], processing_class, args)[split]
    return WITSFTTrainer(model=model, args=args, train_dataset=train_dataset, processing_class=processing_class)


def header(
    script_args: ScriptArguments, args: WITSFTConfig, model_args: ModelConfig, dataset_args: DatasetMixtureConfig
) -> str:
    """Returns what is shown: the model, the data set and where its rows are cut."""
    model, data = model_args.model_name_or_path, script_args.dataset_name
    if dataset_args.datasets:
        data = ", ".join(part.path for part in dataset_args.datasets)
    if model is None:
        model = "embedded, a Llama of 2 million parameters"
        data = "embedded, functions of Python's standard library"
    return f"model: {model}\ndata set: {data}, split {script_args.dataset_train_split}\nmax_length: {args.max_length}\n"


def show(inspection: InspectionArguments, header: str, trainer: WITSFTTrainer) -> None:
    """Prints the rows and the report, and writes the files that were asked for."""
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
    for file in filter(None, (inspection.html, inspection.histogram)):
        print(f"Written: {file}", file=sys.stderr)


def main(args: Sequence[str]) -> None:
    """Runs the command. `args` are the arguments after `wit-trl inspect`."""
    args, debug = split_debug(args)
    with errors_in_one_sentence(debug):
        types = (InspectionArguments, ScriptArguments, _DataConfig, ModelConfig, DatasetMixtureConfig)
        # Those of the launcher say nothing about the data
        inspection, *training = parse_flags(types, args, prog="wit-trl inspect").check()
        show(inspection, header(*training), build_trainer(*training))
