"""The names of data: a file that is not there, and a mixture that TRL cannot read, are refused before any is loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any


LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


def kind(path: Path) -> str:
    """Returns the suffix of a file, without that of a compression."""
    return next((suffix for suffix in reversed(path.suffixes) if suffix.lower() not in _COMPRESSIONS), "").lower()


def check_file(path: Path) -> None:
    """Raises `ValueError` if a path is that of a file, but there is none, or none that can be loaded."""
    if path.is_file() and kind(path) not in LOADERS:
        known = f"{', '.join(LOADERS)}, alone or compressed ({', '.join(_COMPRESSIONS)})"
        raise ValueError(f"{path} cannot be loaded. Files of {known} can, and folders of them or of `save_to_disk`.")
    if kind(path) in LOADERS and not path.is_dir() and (not path.is_file() or path.stat().st_size == 0):
        raise ValueError(f"There is no file {path}, or it is empty.")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _names_files(value: Any) -> bool:
    names = value.values() if isinstance(value, dict) else [value]
    return all(_is_text(name) or _is_list(name) for name in names)


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


# What the value of each key of an entry must be
_KEYS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    "path": ("a text", _is_text),
    "name": ("a text", _is_text),
    "data_dir": ("a text", _is_text),
    "data_files": ("a text, a list of texts or a mapping of splits to these", _names_files),
    "split": ("a text", _is_text),
    "columns": ("a list of texts", _is_list),
    "fraction": ("a number above 0", _is_share),
}
_NOT_NULL = ("path", "split")


def check_mixture(entries: Any) -> None:
    """Raises `ValueError` with the first entry that is wrong, and what it must be."""
    if not isinstance(entries, list):
        raise ValueError(
            f"`datasets` is {entries!r}, but must be a list with an entry for each data set, as `- path: data.jsonl`."
        )
    for number, entry in enumerate(entries):
        where = f"Entry {number} of `datasets`"
        if not isinstance(entry, dict) or "path" not in entry:
            raise ValueError(f"{where} is {entry!r}, but must be a mapping with a path, as `- path: data.jsonl`.")
        for key, value in entry.items():
            if key not in _KEYS:
                raise ValueError(f"{where} has the key {key!r}, but may have {', '.join(_KEYS)}. Correct or remove it.")
            kind, is_right = _KEYS[key]
            if not is_right(value) and (value is not None or key in _NOT_NULL):
                raise ValueError(
                    f"{where} has `{key}: {value!r}`, which must be {kind}. Correct it, or remove the key or the entry."
                )
