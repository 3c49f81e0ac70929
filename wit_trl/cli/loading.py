"""Data and models by name: loads the data in a format of TRL, and says what to check if a model is not found."""

import glob
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import numpy as np
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from datasets.data_files import DataFilesDict, get_data_patterns, sanitize_patterns
from datasets.exceptions import DatasetsError
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import DatasetMixtureConfig, ScriptArguments, get_dataset
from trl.scripts.utils import DatasetConfig

from ..config import WITSFTConfig
from ..data.schemas import to_trl_format
from .arguments import is_refusal
from .names import LOADERS, check_file, kind


TRAIN_SPLIT, TEST_SPLIT = "--dataset_train_split", "--dataset_test_split"
_NEXT_VALUE = re.compile(r"\s*(\S)")


@contextmanager
def errors_of_model(name: str) -> Iterator[None]:
    """Raises `ValueError` with what to check if something of a model is loaded within, and there is no such model."""
    if Path(name, "adapter_config.json").is_file() and not Path(name, "config.json").is_file():
        raise ValueError(
            f"{name} holds an adapter without its model. Merge both with PEFT's `merge_and_unload`, save the result, "
            "and pass that as --model_name_or_path."
        )
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


@contextmanager
def errors_of_data(script_args: ScriptArguments, dataset_args: DatasetMixtureConfig) -> Iterator[None]:
    """Raises `ValueError` if data is read within, and cannot be read: with a local file, and the line of a text."""
    try:
        yield
    except (DatasetsError, EOFError, OSError, ValueError, lzma.LZMAError, zlib.error) as error:
        if not is_refusal(error):
            name = script_args.dataset_name
            for data in dataset_args.datasets or ([DatasetConfig(name)] if name else []):
                for file in _files(_as_named(data)):
                    _read_file(file)
        if isinstance(error, OSError | ValueError):
            raise
        raise ValueError(f"{error}: {error.__cause__}" if error.__cause__ else str(error)) from error


@contextmanager
def _errors_of_hub() -> Iterator[None]:
    """Raises `ValueError` with what to check if a data set is neither here nor on the Hub."""
    try:
        yield
    except (ConnectionError, FileNotFoundError) as error:
        raise ValueError(
            f"A data set is neither here nor, as far as can be told, on the Hub: {str(error).rstrip('.')}. Check its "
            "name and the connection; a private or gated one needs `hf auth login`."
        ) from error


def load_data(script_args: ScriptArguments, dataset_args: DatasetMixtureConfig) -> DatasetDict | IterableDatasetDict:
    """
    Returns the splits of a data set from the Hub, a local folder or a local file, or of a mixture. Raises `ValueError`
    if a file is missing, of another kind, or broken.
    """
    with errors_of_data(script_args, dataset_args), _errors_of_hub():
        parts, streaming = dataset_args.datasets, dataset_args.streaming
        if not parts:
            split, streaming = script_args.dataset_train_split, script_args.dataset_streaming
            parts = [DatasetConfig(script_args.dataset_name, script_args.dataset_config, split=split)]
            if dataset_args.test_split_size is None:
                data = _as_named(parts[0])
                return load_dataset(data.path, data.name, data_files=data.data_files, streaming=streaming)
        named = replace(dataset_args, datasets=[_as_named(part) for part in parts], streaming=streaming)
        # TRL splits a mixture with numpy's global generator. Its state must be the same in each process
        state = np.random.get_state()
        np.random.seed(0)
        try:
            return get_dataset(named)
        finally:
            np.random.set_state(state)


def _as_named(data: DatasetConfig) -> DatasetConfig:
    """Returns a data set whose local files and folders are those of its names, which `datasets` takes for patterns."""
    path = Path(data.path)
    check_file(path)
    if path.is_file():
        return replace(data, path=LOADERS[kind(path)], data_files=glob.escape(str(path.absolute())))
    files: Any = {}
    for state in sorted(path.glob("*/state.json" if (path / "dataset_dict.json").is_file() else "state.json")):
        split = "train" if state.parent == path else state.parent.name
        names = [file["filename"] for file in json.loads(state.read_text())["_data_files"]]
        files[split] = [glob.escape(str(state.with_name(name).absolute())) for name in names]
    if files:  # written by `save_to_disk`
        return replace(data, path="arrow", data_files=files)
    if path.is_dir() and data.data_files is None:
        folder = str(path.absolute() / (data.data_dir or ""))
        if (escaped := glob.escape(folder)) == folder:
            return data
        patterns = get_data_patterns(escaped)
        files = {split: [f"{escaped}/{pattern}" for pattern in patterns[split]] for split in patterns}
        return replace(data, data_dir=None, data_files=files)
    if path.is_dir() or data.path in LOADERS.values():
        return replace(data, data_files=_literal(path if path.is_dir() else Path(), data.data_files))
    return data


def _literal(folder: Path, files: Any) -> Any:
    """Returns the names of files, as `datasets` takes them, such that each existing one means itself."""
    if isinstance(files, dict):
        return {split: _literal(folder, names) for split, names in files.items()}
    if isinstance(files, list):
        return [_literal(folder, name) for name in files]
    return glob.escape(str(Path(folder, files).absolute())) if files and Path(folder, files).exists() else files


def _files(data: DatasetConfig) -> Iterator[Path]:
    """Yields the local files of a data set that `_as_named` returned."""
    is_folder = Path(data.path).is_dir()
    if is_folder or data.path in LOADERS.values():
        folder = str(Path(data.path if is_folder else ".").absolute())
        patterns = sanitize_patterns(data.data_files) if data.data_files else get_data_patterns(folder)
        for files in DataFilesDict.from_patterns(patterns, folder).values():
            yield from filter(Path.is_file, map(Path, files))


def _read_file(path: Path) -> None:
    """Raises `ValueError` with the name of a file that cannot be read."""
    loader = LOADERS.get(kind(path))
    if loader is None:
        return
    content, cause = b"", None
    try:
        if loader in ("json", "csv", "text"):
            with fsspec.open(str(path), compression="infer") as file:
                content = file.read()
        files = glob.escape(str(path.absolute()))
        for _ in load_dataset(loader, data_files=files, split="train", streaming=True).with_format("arrow").iter(1000):
            pass
    except Exception as error:  # the libraries of each format have their own
        cause = error
    _check_text(path, content, loader == "json")
    if cause is not None:
        raise ValueError(f"{path} cannot be read: {cause}") from cause


def _check_text(path: Path, content: bytes, is_json: bool) -> None:
    """Raises `ValueError` with the first line of a file that is not UTF-8, or not JSON where it should be."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: this is not UTF-8. Save the file as UTF-8.") from error
    position = 0
    while is_json and (value := _NEXT_VALUE.match(text, position)):
        try:
            _, position = json.JSONDecoder().raw_decode(text, start := value.start(1))
        except json.JSONDecodeError as error:
            # A list may have many lines. Else each line is a value, and the decoder may have gone on to the next one
            at = error.pos if text[start] == "[" else start
            line, column = text.count("\n", 0, at) + 1, error.pos - text.rfind("\n", 0, at)
            raise ValueError(f"{path}, line {line}: this is not JSON ({error.msg}, column {column}).") from error


def select_splits(
    dataset: DatasetDict | IterableDatasetDict,
    splits: dict[str, str],
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    args: WITSFTConfig,
) -> list[Dataset | IterableDataset]:
    """Returns the splits, each by its flag, in a format of TRL. Raises `ValueError` if the data set lacks one."""
    selected = []
    for flag, split in splits.items():
        if split not in dataset:
            remedy = f"Choose another one with {flag}"
            if flag == TEST_SPLIT:
                remedy += ", hold rows out with --test_split_size 0.1, or turn evaluation off with --eval_strategy no, "
                remedy += "which a sweep cannot"
            raise ValueError(f"The data set has no split {split!r}, only {list(dataset)}. {remedy}.")
        conversational = True if args.chat_template_path else None
        selected.append(to_trl_format(dataset[split], processing_class, conversational, args.dataset_text_field))
    return selected
