"""What `wit-trl inspect` does once it knows its flags: it prepares the data as a training does, and shows it."""

import copy
import functools
import io
import itertools
import logging
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, IterableDataset
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, LlamaForCausalLM, PreTrainedModel

from ..config import STRUCTURE_SETTINGS, WITSFTConfig
from ..conversation.chat_template import tokenizer_of
from ..data.columns import MESSAGE_COLUMNS
from ..data.preparation import DataPreparation
from ..data.prepared_rows import AnyDataset, Row, read_tokens
from ..data.training_rows import prepare_rows
from ..data.vision_collator import DataCollatorForVisionLanguageWIT
from ..embedded import embedded_config, load_stdlib_functions, train_embedded_tokenizer
from ..report.rows import html_page, plot_lengths, show_page
from ..trainer import IMAGE_ROWS, WITSFTTrainer
from .arguments import Arguments
from .loading import TRAIN_SPLIT, errors_of_data, errors_of_model, load_data, select_splits


_SEARCHED_ROWS = 1000


def _empty_model(name: str, **kwargs: Any) -> PreTrainedModel:
    """Returns the model without its weights. The data does not depend on them."""
    config = AutoConfig.from_pretrained(name, **kwargs)
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        if architecture is None:  # its code is not in transformers, but in the model's repository
            return AutoModelForCausalLM.from_config(config, **kwargs)
        return architecture(config)


def build_trainer(arguments: Arguments) -> tuple[WITSFTTrainer, AnyDataset]:
    """Returns the trainer with its prepared training set and a model without weights, and that set as it was before."""
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
        trainer = WITSFTTrainer(model=model, args=args, train_dataset=train_dataset, processing_class=processing_class)
    return trainer, train_dataset


def changed_rows(trainer: WITSFTTrainer, dataset: AnyDataset) -> tuple[dict[int, Row], int]:
    """
    Returns which of the first rows of a data set are changed, by their number and as they are trained on before any
    packing, and how many were searched. A row is changed if a target has a data weight other than 1, or another region
    than where all answers are completion.
    """
    is_image = isinstance(trainer.data_collator, DataCollatorForVisionLanguageWIT)
    stream = dataset.to_iterable_dataset() if isinstance(dataset, Dataset) else dataset
    stream = stream.with_format(None).take(IMAGE_ROWS if is_image else _SEARCHED_ROWS)
    defaults = {name: WITSFTConfig.__dataclass_fields__[name].default for name in STRUCTURE_SETTINGS}
    rows = _prepared(trainer, stream, {})
    plain_rows = _prepared(trainer, stream.map(_as_plain), defaults)
    changed, number = {}, -1
    for number, row in enumerate(rows):
        try:
            _, plain, _ = read_tokens(next(plain_rows))
        except ValueError as error:
            raise ValueError(
                "--only changed compares rows with plain training, in which all answers are completion, but for that "
                f"they cannot be prepared. Leave the flag out. {error}"
            ) from error
        _, regions, weights = read_tokens(row)
        is_changed = (regions != plain) | (weights != 1) & (regions != -100)
        if is_changed[1:].any():  # nothing predicts the first token
            changed[number] = row
    return changed, number + 1


def _prepared(trainer: WITSFTTrainer, stream: IterableDataset, settings: dict[str, Any]) -> Iterator[Row]:
    """Yields all rows of a stream as a training with other settings of the structure prepares them."""
    collator = trainer.data_collator
    if isinstance(collator, DataCollatorForVisionLanguageWIT):
        collator = copy.copy(collator)
        collator.__dict__.update(settings)
        return iter(collator.tokenize_rows(stream))
    args = copy.copy(trainer.args)
    vars(args).update(settings, shuffle_dataset=False)
    templates = trainer.chat_template, trainer._assistant_only_loss
    preparation = DataPreparation(args, trainer.processing_class, "train", False, None, *templates)
    logging.disable()  # the trainer has said it
    try:
        return iter(prepare_rows(stream, preparation, is_train=False).dataset)
    finally:
        logging.disable(logging.NOTSET)


def _as_plain(row: Row) -> Row:
    """Returns a row in which no answer is left out of the completion."""
    plain: Row = {"completion_turns": None}
    for column in (*MESSAGE_COLUMNS, "completion"):
        if isinstance(row.get(column), list):
            plain[column] = [{**turn, "completion": None} for turn in row[column]]
    return plain


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


def show(
    header: str,
    trainer: WITSFTTrainer,
    count: int,
    html: str | None,
    histogram: str | None,
    changed: tuple[dict[int, Row], int] | None = None,
) -> None:
    """
    Prints the first rows, of those that are changed if they are given, and the report. Writes the page and the
    histogram to these files, if they are named.
    """
    report = trainer.weight_report()
    if changed is None:
        rows: Iterable = itertools.islice(trainer.train_dataset, count)
        if isinstance(trainer.data_collator, DataCollatorForVisionLanguageWIT):
            rows = trainer.data_collator.tokenize_rows(rows)
        numbered = dict(enumerate(rows))
    else:
        found, searched = changed
        header += f"changed rows: {len(found):,} of the {searched:,} searched\n"
        numbered = dict(itertools.islice(found.items(), count))
    shown = (numbered, tokenizer_of(trainer.processing_class), report, trainer.args.num_train_epochs)
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
