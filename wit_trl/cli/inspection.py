"""What `wit-trl inspect` does once it knows its flags: it prepares the data as a training does, and shows it."""

import functools
import io
import itertools
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, LlamaForCausalLM, PreTrainedModel

from ..conversation.chat_template import tokenizer_of
from ..data.vision_collator import DataCollatorForVisionLanguageWIT
from ..embedded import embedded_config, load_stdlib_functions, train_embedded_tokenizer
from ..report.rows import html_page, plot_lengths, show_page
from ..trainer import WITSFTTrainer
from .arguments import Arguments
from .loading import TRAIN_SPLIT, errors_of_data, errors_of_model, load_data, select_splits


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
    splits = {TRAIN_SPLIT: arguments.script.dataset_train_split}
    (train_dataset,) = select_splits(dataset, splits, processing_class, args)
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


def show(header: str, trainer: WITSFTTrainer, count: int, html: str | None, histogram: str | None) -> None:
    """Prints the first rows and the report. Writes the page and the histogram to these files, if they are named."""
    report = trainer.weight_report()
    rows: Iterable = itertools.islice(trainer.train_dataset, count)
    if isinstance(trainer.data_collator, DataCollatorForVisionLanguageWIT):
        rows = trainer.data_collator.tokenize_rows(rows)
    shown = (list(rows), tokenizer_of(trainer.processing_class), report, trainer.args.num_train_epochs)
    if histogram is not None:
        image = plot_lengths(*report.lengths)
        Path(histogram).write_bytes(image)
        if html is not None:  # which has a histogram always
            Path(html).write_text(html_page(header, *shown, image), encoding="utf-8")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what the terminal cannot encode
    print(header)
    if (console := Console()).no_color or console.color_system is None:
        print("[region weight] holds for the tokens that follow it, up to the next one. ▌ begins a document.\n")
    show_page(console, *shown)
    sys.stdout.flush()  # here it is caught if nothing reads it any more
    for file in filter(None, (html, histogram)):
        print(f"Written: {file}", file=sys.stderr)
