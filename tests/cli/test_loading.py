"""Data by the names of files and folders: the one that is named, in one sentence if it cannot be read."""

import gzip
import json
import re

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from trl import DatasetMixtureConfig, ScriptArguments

from wit_trl.cli.loading import errors_of_data, load_data


RIGHT, WRONG = [{"prompt": "a", "completion": "right"}] * 2, [{"prompt": "a", "completion": "wrong"}]


def write(path, rows, opened=open):
    path.parent.mkdir(exist_ok=True)
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Files and folders whose names are patterns that fit the names beside them too."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tmp_path /= "data"
    tmp_path.mkdir()
    monkeypatch.chdir(tmp_path)
    for right, wrong in (("rows[12]", "rows1"), ("star*", "star1"), ("which?", "which1")):
        write(tmp_path / f"{right}.jsonl", RIGHT)
        write(tmp_path / f"{wrong}.jsonl", WRONG)
    write(tmp_path / "dir [v1]" / "train.jsonl", RIGHT)
    write(tmp_path / "dir [v1]" / "test.jsonl", RIGHT)
    write(tmp_path / "dir v" / "train.jsonl", WRONG)
    return tmp_path


NAMES = ["rows[12].jsonl", "star*.jsonl", "which?.jsonl", "dir [v1]/train.jsonl", "dir [v1]"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_name_of_a_file_or_folder_is_no_pattern(name, streaming):
    loaded = load_data(ScriptArguments(name, dataset_streaming=streaming), DatasetMixtureConfig())
    assert isinstance(loaded["train"], IterableDataset) == streaming
    assert list(loaded["train"]) == RIGHT
    assert list(loaded) == (["train", "test"] if name == "dir [v1]" else ["train"])


def test_rows_are_held_out_of_one_data_set_as_of_a_mixture():
    loaded = load_data(ScriptArguments("rows[12].jsonl"), DatasetMixtureConfig(test_split_size=0.5))
    assert {split: list(rows) for split, rows in loaded.items()} == {"train": RIGHT[:1], "test": RIGHT[:1]}


@pytest.mark.parametrize(
    "part",
    [
        *({"path": name} for name in NAMES),
        {"path": "json", "data_files": "rows[12].jsonl"},
        {"path": "json", "data_files": {"train": ["rows[12].jsonl"]}},
        {"path": "dir [v1]", "data_files": "train.jsonl"},
        {"path": "../data", "data_dir": "dir [v1]"},
        {"path": "rows[12].jsonl", "fraction": 0.5},
    ],
    ids=str,
)
def test_part_of_a_mixture_is_what_its_name_says(part):
    loaded = load_data(ScriptArguments(), DatasetMixtureConfig([part], test_split_size=0.5))
    assert [row for split in ("train", "test") for row in loaded[split]] == RIGHT


def test_pattern_that_names_no_file_stays_a_pattern(folder):
    mixture = DatasetMixtureConfig([{"path": "json", "data_files": "rows*.jsonl"}])
    assert len(load_data(ScriptArguments(), mixture)["train"]) == len(RIGHT) + len(WRONG)


@pytest.mark.parametrize("mixture", [False, True])
@pytest.mark.parametrize("name", ["organisation/missing", "missing", "./missing", "/missing"])
def test_data_set_that_is_nowhere_is_told_with_what_to_check(name, mixture):
    parts = [{"path": name}] if mixture else []
    message = (
        rf"^A data set is neither here nor, as far as can be told, on the Hub: .*{name}.*\. Check its name and the co"
    )
    with pytest.raises(ValueError, match=message):
        load_data(ScriptArguments(name), DatasetMixtureConfig(parts))


@pytest.mark.parametrize("mixture", [False, True])
@pytest.mark.parametrize("name", ["rows.JSONL", "rows.jsonl.gz", "saved", "splits"])
def test_other_forms_of_a_data_set(name, mixture, folder):
    write(folder / "rows.JSONL", RIGHT)
    write(folder / "rows.jsonl.gz", RIGHT, gzip.open)
    Dataset.from_list(RIGHT).save_to_disk("saved")
    DatasetDict(train=Dataset.from_list(RIGHT), test=Dataset.from_list(WRONG)).save_to_disk("splits")
    Dataset.from_list(WRONG).to_parquet("splits/train/cache-1.arrow")  # what `map` leaves there
    parts = [{"path": name}] if mixture else []
    loaded = load_data(ScriptArguments(name), DatasetMixtureConfig(parts))
    assert list(loaded["train"]) == RIGHT
    assert name != "splits" or mixture or list(loaded["test"]) == WRONG


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", b"prompt\tcompletion\n", "a.tsv cannot be loaded. Files of .jsonl, .json, .csv, .parquet"),
        ("a.jsonl", '{"a": "b"}\n'.encode("utf-16"), "a.jsonl, line 1: this is not UTF-8. Save the file as UTF-8."),
        ("a.jsonl", b'{"a": "b"}\n{"a": "caf\xe9"}\n', "a.jsonl, line 2: this is not UTF-8. Save the file as UTF-8."),
        ("a.csv", b"a,b\nc,d\ncaf\xe9,x\n", "a.csv, line 3: this is not UTF-8. Save the file as UTF-8."),
        ("a.txt", b"a\ncaf\xe9\n", "a.txt, line 2: this is not UTF-8. Save the file as UTF-8."),
        ("a.jsonl", b'{"a": 1}\n{"a" 2}\n', "a.jsonl, line 2: this is not JSON (Expecting ':' delimiter, column 6)."),
        ("a.json", b'[{"a": 1},\n{"a": 2}\n{"a": 3}]', "a.json, line 3: this is not JSON (Expecting ',' delimiter"),
        ("a.jsonl", b'{"a": 1}\n{"a": 2,\n{"a": 3}\n', "a.jsonl, line 2: this is not JSON ("),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n{"a" 2}\n', mtime=0), "a.jsonl.gz, line 2: this is not JSON ("),
        ("a.jsonl", b"", "There is no file a.jsonl, or it is empty."),
        (
            "a.csv",
            b"a,b\nc,d\ne,f,g\n",
            "a.csv cannot be read: Error tokenizing data. C error: Expected 2 fields in lin",
        ),
        ("a.csv", b'a,b\nc,"d\n', "a.csv cannot be read: Error tokenizing data. C error: EOF inside string"),
        ("a.parquet", b"no parquet file", "a.parquet cannot be read: Parquet magic bytes not found in footer."),
        ("a.arrow", b"no arrow file at all", "a.arrow cannot be read: "),
        ("a.jsonl.gz", b"not compressed", "a.jsonl.gz cannot be read: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n', mtime=0)[:-9], "a.jsonl.gz cannot be read: Compressed file ended"),
        ("a.csv.xz", b"\xfd7zXZ\0 broken", "a.csv.xz cannot be read: "),
    ],
)
@pytest.mark.parametrize("form", ["name", "stream", "mixture"])
def test_broken_file_is_named_with_the_line(form, name, content, message, folder):
    (folder / name).write_bytes(content)
    script = ScriptArguments(name, dataset_streaming=form == "stream")
    mixture = DatasetMixtureConfig([{"path": name}] if form == "mixture" else [])
    # Some faults show when the rows are read, in the constructor of the trainer
    with pytest.raises(ValueError, match=re.escape(message)), errors_of_data(script, mixture):
        list(load_data(script, mixture)["train"])


@pytest.mark.parametrize(
    "part", [{"path": "parts"}, {"path": "parts [v1]"}, {"path": "KIND", "data_files": "parts/*/*"}], ids=str
)
@pytest.mark.parametrize(
    ("name", "good", "broken", "message"),
    [
        ("json", b'{"a": 1}\n', b'{"a" 2}\n', ", line 1: this is not JSON"),
        ("csv", b"a,b\n1,2\n", b"a,b\n1,2,3\n4,5,6,7\n", " cannot be read: Error tokenizing data."),
    ],
)
def test_broken_file_of_a_folder_is_named(part, name, good, broken, message, folder):
    place = folder / part["path"].replace("KIND", "parts") / "train"
    place.mkdir(parents=True)
    (place / f"a.{name}").write_bytes(good)
    (place / f"b.{name}").write_bytes(broken)
    mixture = DatasetMixtureConfig([part | {"path": part["path"].replace("KIND", name)}])
    with pytest.raises(ValueError, match=re.escape(f"{place / 'b'}.{name}{message}")):
        load_data(ScriptArguments(), mixture)


@pytest.mark.parametrize("content", [b'\xef\xbb\xbf{"a": 1}\n{"a": 2}', b'{\n "a": 1\n}\n{\n "a": 2\n}\n'])
def test_error_of_another_kind_stays_as_it_is_where_the_file_is_json(content, folder):
    (folder / "a.jsonl").write_bytes(content)
    with (
        pytest.raises(ValueError, match=r"^another$"),
        errors_of_data(ScriptArguments("a.jsonl"), DatasetMixtureConfig()),
    ):
        raise ValueError("another")


def test_error_of_another_kind_stays_as_it_is(folder):
    with pytest.raises(UnicodeDecodeError), errors_of_data(ScriptArguments("rows1.jsonl"), DatasetMixtureConfig()):
        b"\xff".decode()
