"""What the columns of a data set contradict, and what of them would be ignored."""

from collections.abc import Callable
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset

from ..config import DATASET_COLUMNS, WITSFTConfig
from ..conversation.messages import SHAREGPT_ROLES
from ..conversation.tool_calls import null_arguments


logger = get_logger(__name__)

MESSAGE_COLUMNS = ("messages", "conversations")  # of which each row holds a whole conversation
_FIRST_ROWS = 1000  # in which roles and nulls are looked for


def check_train_dataset(dataset: Any, formatting_func: Callable | None, args: WITSFTConfig) -> set[str]:
    """
    Returns the columns of a training set.

    Raises:
        `ValueError`: it is empty; TRL would ignore the `formatting_func`; or `assistant_only_loss=True` contradicts the
        weights of `messages`.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        return set()  # TRL refuses it
    columns = set(dataset.column_names) if isinstance(dataset, Dataset) else set(next(iter(dataset), ()))
    if not columns or (isinstance(dataset, Dataset) and len(dataset) == 0):
        raise ValueError("`train_dataset` is empty. Check the file, the split and any filter it comes from.")
    untokenized = columns & {name for names in DATASET_COLUMNS[1:] for name in names}
    if formatting_func and untokenized:
        raise ValueError(
            f"`formatting_func` makes plain text, but TRL reads the columns {sorted(untokenized)} instead "
            "of it. Drop `formatting_func` (the chat template does its work), or rename these columns to train on the "
            "text, in which every token is completion."
        )
    if args.assistant_only_loss and args.prompt_loss_weight != 0 and not columns.isdisjoint(MESSAGE_COLUMNS):
        raise ValueError(
            f"`assistant_only_loss=True` contradicts `prompt_loss_weight={args.prompt_loss_weight}`. Set "
            "`prompt_loss_weight=0` to train on the assistant's turns only, or leave `assistant_only_loss` unset to "
            "use the weights."
        )
    return columns


def warn_of_unused_roles(
    dataset: Dataset | IterableDataset, columns: tuple[str, ...], role_loss_weights: dict[str, float], name: str
) -> None:
    """Tells which roles have a weight, but no turn in the first rows."""
    if not role_loss_weights or isinstance(dataset, IterableDataset):
        return
    roles = {"tools", "system"} if "system" in dataset.column_names else {"tools"}
    for row in dataset.select_columns([*columns]).take(min(_FIRST_ROWS, len(dataset))):
        turns = [turn for column in columns if isinstance(row[column], list) for turn in row[column]]
        found = {turn.get("role") or turn.get("from", "") for turn in turns if isinstance(turn, dict)}
        roles |= {SHAREGPT_ROLES.get(role, role) for role in found}
    if unused := role_loss_weights.keys() - roles:
        logger.warning(
            f"`role_loss_weights` names {sorted(unused)}, but the first {_FIRST_ROWS:,} rows of the {name} dataset "
            f"have only {sorted(filter(None, roles - {'tools'}))}."
        )


def warn_of_ignored_columns(columns: set[str], unread: set[str], name: str) -> None:
    """Names columns with weights, and those with which other formats say more, as far as they are not read."""
    known = ("weight", "token_weights")
    if ignored := sorted(name for name in columns if "weight" in name.lower() and name not in known):
        logger.warning(
            f"The {name} dataset has {ignored}, which is ignored. Rename it to `weight`, one number for the row, or to "
            "`token_weights`, one for each token of `input_ids`."
        )
    if ignored := sorted(columns & {"history", *unread}):
        logger.warning(
            f"The {name} dataset has {ignored}, which is ignored. Make turns of it in `messages`, which may stand "
            "beside `system` and `tools`, or remove it."
        )


def warn_of_nulls(dataset: Dataset | IterableDataset, columns: tuple[str, ...], name: str) -> None:
    """Names a null argument. Arrow gives every call the arguments of all. They are left out, whoever wrote them."""
    if isinstance(dataset, IterableDataset) or not columns or "tool_calls" not in str(dataset.features):
        return
    rows = dataset.select_columns([*columns]).take(min(_FIRST_ROWS, len(dataset)))
    found = (
        (index, column, *null)
        for index, row in enumerate(rows)
        for column in columns
        for null in null_arguments(row[column] or [])
    )
    for index, column, turn, function, argument in found:
        logger.warning(
            f"Row {index} of the {name} dataset: in turn {turn} of `{column}`, the argument `{argument}` of the call "
            f"of `{function}` is null, as Arrow makes the arguments that only other rows have. Arguments that are null "
            "are left out of all rows. To train on a null, write `arguments` as JSON text."
        )
        return
