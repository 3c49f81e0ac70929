"""Data and models by name: loads the data in a format of TRL, and says what to check if a model is not found."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import DatasetMixtureConfig, ScriptArguments, get_dataset

from ..config import WITSFTConfig
from ..data.schemas import to_trl_format


@contextmanager
def errors_of_model(name: str) -> Iterator[None]:
    """Raises `ValueError` with what to check if something of a model is loaded within, and there is no such model."""
    try:
        yield
    except OSError as error:
        if Path(name).exists():  # a file in it is missing, and the error says which
            raise
        cause = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"There is no folder {name}, and the Hub gives no model of this name: {cause}. Check --model_name_or_path "
            "and the connection; a private or gated model needs `hf auth login`."
        ) from error


def load_data(script_args: ScriptArguments, dataset_args: DatasetMixtureConfig) -> DatasetDict | IterableDatasetDict:
    """Returns the splits of a data set from the Hub, a local folder or a local file, or of a mixture."""
    if dataset_args.datasets:
        # TRL splits a mixture with numpy's global generator. Its state must be the same in each process
        state = np.random.get_state()
        np.random.seed(0)
        try:
            return get_dataset(dataset_args)
        finally:
            np.random.set_state(state)
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
    """Returns these splits in a format of TRL. Raises `ValueError` if the data set lacks one of them."""
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
