"""What the command line and the example script share: their arguments, their data and the embedded default."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetsError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast, ProcessorMixin
from trl import DatasetMixtureConfig, ScriptArguments, TrlParser, get_dataset
from yaml import YAMLError

from .config import WITSFTConfig
from .schemas import to_trl_format


# What the embedded default sets differently from TRL. Any of it can be changed on the command line.
EMBEDDED_DEFAULTS = {
    "output_dir": "runs/sft_wit",
    "dataset_test_split": "validation",
    "max_length": 256,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 32,
    "num_train_epochs": 1,
    "logging_steps": 10,
    "eval_strategy": "steps",
    "eval_steps": 91,
    "eval_on_start": True,
    "save_strategy": "no",
    "report_to": "none",
    "bf16": False,
    "gradient_checkpointing": False,
}


@contextmanager
def errors_in_one_sentence() -> Iterator[None]:
    """Ends the process with one sentence for what a user can get wrong, which the main process alone prints."""
    try:
        yield
    except DatasetsError as error:
        message = f"error: {error}: {error.__cause__}" if error.__cause__ else f"error: {error}"
    except (ImportError, OSError, ValueError, YAMLError) as error:
        message = f"error: {error}"
    else:
        return
    sys.exit(message if os.environ.get("RANK", "0") == "0" else 1)


def parse_arguments(
    dataclass_types: Iterable[type], args: list[str] | None = None, prog: str | None = None
) -> tuple[Any, ...]:
    """
    Returns an instance of each dataclass from the command line and `--config`: any of the caller's, then
    [`~trl.ScriptArguments`], [`WITSFTConfig`], [`~trl.ModelConfig`] and [`~trl.DatasetMixtureConfig`]. Without model
    and data, they have the `EMBEDDED_DEFAULTS`. Wrong arguments end the process with one sentence.

    Args:
        dataclass_types (`Iterable[type]`):
            The dataclasses.
        args (`list[str]`, *optional*):
            The arguments, by default those of the process.
        prog (`str`, *optional*):
            What `--help` calls the program, by default the file that was started.
    """
    parser = TrlParser(dataclass_types, prog=prog)
    with errors_in_one_sentence():
        arguments = *_, script_args, _, model_args, dataset_args = parser.parse_args_and_config(args)
    has_data = bool(script_args.dataset_name or dataset_args.datasets)
    if has_data != (model_args.model_name_or_path is not None):
        sys.exit("error: Pass both --model_name_or_path and --dataset_name, or neither for the embedded default.")
    if has_data:
        return arguments
    parser.set_defaults_with_config(**EMBEDDED_DEFAULTS)
    return parser.parse_args_and_config(args)


def load_data(script_args: ScriptArguments, dataset_args: DatasetMixtureConfig) -> DatasetDict | IterableDatasetDict:
    """Returns the splits of a data set from the Hub, a local folder or a local file, or of a mixture."""
    if dataset_args.datasets:
        return get_dataset(dataset_args)
    path = Path(script_args.dataset_name)
    loaders = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
    if path.suffix in loaders and (not path.is_file() or path.stat().st_size == 0):
        raise ValueError(f"There is no file {path}, or it is empty.")
    if path.is_file():
        loader = loaders.get(path.suffix, path.suffix[1:])
        return load_dataset(loader, data_files=str(path), streaming=script_args.dataset_streaming)
    return load_dataset(
        script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming
    )


def select_splits(
    dataset: DatasetDict | IterableDatasetDict,
    splits: Iterable[str],
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    args: WITSFTConfig,
) -> dict[str, Dataset | IterableDataset]:
    """Returns these splits in a format of TRL. Raises `ValueError` if the data set does not have one of them."""
    selected = {}
    for split in splits:
        if split not in dataset:
            raise ValueError(
                f"The data set has no split {split!r}, only {list(dataset)}. Choose with --dataset_train_split and "
                "--dataset_test_split, or turn evaluation off with --eval_strategy no."
            )
        conversational = True if args.chat_template_path else None
        selected[split] = to_trl_format(dataset[split], processing_class, conversational, args.dataset_text_field)
    return selected


def train_embedded_tokenizer(dataset: DatasetDict) -> PreTrainedTokenizerFast:
    """Returns a small tokenizer trained on the prompts and completions of the train split."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        (row["prompt"] + row["completion"] for row in dataset["train"]),
        trainers.BpeTrainer(vocab_size=2048, special_tokens=["<pad>", "<eos>"]),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def embedded_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Returns the configuration of a Llama of 2 million parameters with this vocabulary."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
