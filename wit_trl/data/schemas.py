"""Data sets of other schemas, brought into a format of TRL."""

import copy
import itertools
from typing import Any

from datasets import Dataset, IterableDataset, LargeList, List, Value
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .._upstream import get_dataset_column_names, global_then_local_main_first
from ..config import DATASET_COLUMNS
from ..conversation.chat_template import tokenizer_of
from ..conversation.messages import LOSS_NUMBERS, LOSS_SWITCHES, UNCLEAR_LOSS_KEYS, check_loss_keys
from ..weights import WEIGHT_RANGE, is_weight
from .columns import MESSAGE_COLUMNS
from .prepared_rows import AnyDataset


# The columns by name: those of the question, then that of the answer. Columns between the first and the last may be
# empty or missing
_SCHEMAS = {
    "Alpaca": ("instruction", "input", "output"),
    "Dolly": ("instruction", "context", "response"),
    "WIT": ("prompt", "response"),
}
_EOS_PLACEHOLDER = "###eos_token###"
_LOSS_KEYS = LOSS_NUMBERS | LOSS_SWITCHES | UNCLEAR_LOSS_KEYS
_FIRST_ROWS = 1000  # in which such keys are looked for, where no row has those of all


def to_trl_format(
    dataset: Dataset | IterableDataset,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    conversational: bool | None = None,
    dataset_text_field: str = "text",
) -> Dataset | IterableDataset:
    r"""
    Returns a data set in a format of TRL. A data set that is in one already, which includes ShareGPT
    (`"conversations"`), comes back as it is, but for the keys below. Other columns, such as `"weight"`, stay.

    - Alpaca (`"instruction"`, `"input"`, `"output"`) and Dolly (`"instruction"`, `"context"`, `"response"`) become a
      prompt and a completion: two messages if conversational, else two texts, with an empty line after each part of the
      prompt.
    - The data of the original WIT scripts (`"prompt"`, `"response"`) is rendered already, so it becomes two texts with
      one space between them. Its `###eos_token###` becomes the EOS token.
    - In messages, the keys by which other libraries weigh a turn become its `"weight"`: the numbers `"loss_weight"` and
      `"loss_scale"`; and `"loss"`, `"train"`, `"training"` and `"trainable"`, where true is 1 and false 0. The first
      row of the data set must have the key. Its value there may be null.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Data set to convert.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer or processor of the model.
        conversational (`bool`, *optional*):
            Whether Alpaca and Dolly become messages. Defaults to `True` if the tokenizer or processor has a chat
            template.
        dataset_text_field (`str`, *optional*, defaults to `"text"`):
            Column of plain text data.

    Raises:
        `ValueError`: the columns are those of none of these schemas; a row has no text where it needs one; or a message
        has keys of other libraries that contradict each other, hold another value, or have no one meaning (`"mask"`,
        `"masked"`, `"loss_mask"`, `"train_detail"`, `"training_detail"`).

    Example:
    ```python
    >>> from datasets import Dataset
    >>> from wit_trl import to_trl_format

    >>> dataset = Dataset.from_list([{"instruction": "Add.", "input": "1, 2", "output": "3"}])
    >>> to_trl_format(dataset, tokenizer)[0]
    {'prompt': [{'content': 'Add.\n\n1, 2', 'role': 'user'}], 'completion': [{'content': '3', 'role': 'assistant'}]}
    ```
    """
    columns = set(get_dataset_column_names(dataset))
    similar = [schema for schema in _SCHEMAS.values() if {schema[0], schema[-1]} <= columns]
    # Alpaca has a `text` too, in which the answer cannot be told from the question
    if any({*known} <= columns for known in DATASET_COLUMNS) or (not similar and dataset_text_field in columns):
        of_turns = [name for name in ("prompt", "completion", *MESSAGE_COLUMNS) if name in columns]
        return _with_message_weights(dataset, of_turns)
    # All columns that are part of some schema must be part of this one, or they would be dropped
    parts = columns & {"system", "history"}.union(*_SCHEMAS.values())
    schema = next((schema for schema in similar if parts <= {*schema}), None)
    if schema is None:
        known = [f"{name} ({', '.join(schema)})" for name, schema in _SCHEMAS.items()]
        raise ValueError(
            f"The columns {sorted(columns)} are those of no known schema. Known are {', '.join(known)}, ShareGPT "
            f"(conversations) and TRL's own: prompt and completion, messages, {dataset_text_field}, input_ids. "
            f"{remedy_for(columns)}"
        )
    eos_token = tokenizer_of(processing_class).eos_token or ""
    if conversational is None:
        conversational = processing_class.chat_template is not None

    def convert(example: dict[str, Any], index: int) -> dict[str, Any]:
        texts: list[Any] = [example.get(name) for name in schema]
        for name, text in zip(schema, texts, strict=True):
            if not isinstance(text, str) and (text is not None or name in (schema[0], schema[-1])):
                remedy = "Make it a text, or remove the row."
                if isinstance(text, int | float):  # as in CSV files
                    cast = f"dataset.cast_column({name!r}, datasets.Value('string'))"
                    remedy = f"Make it a text, as `{cast}` does, or put it into quotes in JSON."
                raise ValueError(f"Row {index}: `{name}` must be a text, but is {text!r}. {remedy}")
        *question, completion = texts
        if schema == _SCHEMAS["WIT"]:
            return {  # joined as in the original scripts
                "prompt": question[0].removesuffix(" ").replace(_EOS_PLACEHOLDER, eos_token),
                "completion": f" {completion}".replace(_EOS_PLACEHOLDER, eos_token),
            }
        parts = [part for part in question if part]
        if conversational:
            prompt = [{"role": "user", "content": "\n\n".join(parts)}]
            return {"prompt": prompt, "completion": [{"role": "assistant", "content": completion}]}
        return {"prompt": "".join(f"{part}\n\n" for part in parts), "completion": completion}

    used = [name for name in (*schema, dataset_text_field) if name in columns and name != "prompt"]
    with global_then_local_main_first():
        return dataset.map(convert, with_indices=True, remove_columns=used)


def _with_message_weights(dataset: AnyDataset, columns: list[str]) -> AnyDataset:
    """Returns messages with a `weight` in the place of the keys of other libraries, if the first row has one."""
    has_transform = isinstance(dataset, Dataset) and dataset.format["type"] == "custom"  # which may make other rows
    if has_transform or not columns:
        return dataset
    # In Arrow, a message has the keys of all messages, but not where they are of several types
    count = _FIRST_ROWS if "Json(" in str(dataset.features) else 1
    rows = [*itertools.islice(dataset.select_columns(columns).with_format(None), count)]
    columns = [name for name in columns if any(_LOSS_KEYS & turn.keys() for row in rows for turn in _turns(row[name]))]
    if not columns:
        return dataset

    def convert(example: dict[str, Any], index: int) -> dict[str, Any]:
        converted = {}
        for column in columns:
            turns = enumerate(_turns(example[column]))
            weighed = [_weighed(message, f"Row {index}: turn {turn} of `{column}`") for turn, message in turns]
            converted[column] = weighed or example[column]
        return converted

    features = copy.copy(dataset.features)
    for column in columns if features else ():
        kind = features[column]
        if isinstance(kind, List | LargeList) and isinstance(kind.feature, dict):
            kept = {key: value for key, value in kind.feature.items() if key not in _LOSS_KEYS}
            features[column] = type(kind)({**kept, "weight": Value("float64")})
    with global_then_local_main_first():
        return dataset.with_format(None).map(convert, with_indices=True, features=features)


def _turns(messages: Any) -> list[dict[str, Any]]:
    """Returns the messages of a column, or nothing if it holds something else."""
    is_messages = isinstance(messages, list) and all(isinstance(message, dict) for message in messages)
    return messages if is_messages else []


def _weighed(message: dict[str, Any], name: str) -> dict[str, Any]:
    """Returns a message with a `weight` in the place of the keys of other libraries."""
    check_loss_keys(message, name)
    weights = {}
    for key, value in message.items():
        if value is None or key not in _LOSS_KEYS:
            continue
        said = f"{name} has the `{key}` {value!r}, but"
        if key in LOSS_SWITCHES and value not in (0, 1):
            raise ValueError(f"{said} it must be true or false. Write the `weight` of the turn in its place.")
        if key in LOSS_NUMBERS and not (type(value) in (int, float) and is_weight(value)):
            raise ValueError(f"{said} {WEIGHT_RANGE}")
        weights[key] = float(value)
    own = message.get("weight")
    if len({*weights.values()}) > 1 or (weights and own is not None):
        given = weights if own is None else {**weights, "weight": own}
        raise ValueError(f"{name} has {given}. Leave one of them, best the `weight`.")
    kept = {key: value for key, value in message.items() if key not in _LOSS_KEYS}
    return {**kept, "weight": next(iter(weights.values()))} if weights else kept


def remedy_for(columns: set[str]) -> str:
    """Returns what to do with a data set of these columns, which are those of no schema."""
    if {"chosen", "rejected"} <= columns:
        name = "completion" if "prompt" in columns else "messages"
        return (
            "These columns are preference data, for TRL's `DPOTrainer`. To train on the chosen answers alone, rename "
            f"`chosen` to `{name}` and remove `rejected`."
        )
    renamed = "the columns"
    if {"question", "answer"} <= columns:
        renamed = "`question` to `prompt` and `answer` to `completion`"
    return f"Rename {renamed}, and remove those that are of none or of another schema."
