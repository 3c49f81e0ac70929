"""Data sets of other schemas, brought into a format of TRL."""

from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .._upstream import get_dataset_column_names, global_then_local_main_first
from ..config import DATASET_COLUMNS
from ..conversation.chat_template import tokenizer_of


# The columns by name: those of the question, then that of the answer. Columns between the first and the last may be
# empty or missing
_SCHEMAS = {
    "Alpaca": ("instruction", "input", "output"),
    "Dolly": ("instruction", "context", "response"),
    "WIT": ("prompt", "response"),
}
_EOS_PLACEHOLDER = "###eos_token###"


def to_trl_format(
    dataset: Dataset | IterableDataset,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    conversational: bool | None = None,
    dataset_text_field: str = "text",
) -> Dataset | IterableDataset:
    r"""
    Returns a data set in a format of TRL. A data set that is in one already, which includes ShareGPT
    (`"conversations"`), comes back as it is. Other columns, such as `"weight"`, stay.

    - Alpaca (`"instruction"`, `"input"`, `"output"`) and Dolly (`"instruction"`, `"context"`, `"response"`) become a
      prompt and a completion: two messages if conversational, else two texts, with an empty line after each part of the
      prompt.
    - The data of the original WIT scripts (`"prompt"`, `"response"`) is rendered already, so it becomes two texts with
      one space between them. Its `###eos_token###` becomes the EOS token.

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
        `ValueError`: the columns are those of none of these schemas, or a row has no text where it needs one.

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
        return dataset
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
