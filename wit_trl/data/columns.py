"""What the columns of a data set contradict, and what of them would be ignored."""

from collections.abc import Callable
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset

from ..config import DATASET_COLUMNS, WITSFTConfig
from ..conversation.messages import LOSS_SWITCHES, SHAREGPT_ROLES, UNCLEAR_LOSS_KEYS
from ..conversation.tool_calls import null_arguments
from .prepared_rows import AnyDataset, Row


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
    if not isinstance(dataset, AnyDataset):
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


def warn_of_ignored_columns(columns: set[str], unread: set[str], name: str) -> None:
    """Names columns with weights, and those with which other formats say more, as far as they are not read."""
    known = ("weight", "token_weights")
    if ignored := sorted(name for name in columns if "weight" in name.lower() and name not in known):
        logger.warning(
            f"The {name} dataset has {ignored}, which is ignored. Rename it to `weight`, one number for the row, or to "
            "`token_weights`, one for each token of `input_ids`."
        )
    if ignored := sorted(columns & (LOSS_SWITCHES | UNCLEAR_LOSS_KEYS | {"loss_scale"})):
        logger.warning(
            f"The {name} dataset has {ignored}, by which other libraries weigh rows or tokens, and which is ignored. "
            "Make it `weight`, one number for the row, or in tokenized data `completion_mask` or `token_weights`; or "
            "remove it."
        )
    if ignored := sorted(columns & {"history", "system_prompt", "functions", "documents", *unread}):
        logger.warning(
            f"The {name} dataset has {ignored}, which is ignored. Make turns of it in `messages`, which may stand "
            "beside `system` and `tools`, or remove it."
        )


def warn_of_messages(
    dataset: AnyDataset, example: Row, columns: tuple[str, ...], role_loss_weights: dict[str, float], name: str
) -> None:
    """
    Tells which roles have a weight but no turn, and names a null argument of a call, in the first rows. Of a stream,
    which is not opened once more for it, only the `example`, its first row, is searched, and only for nulls.
    """
    is_stream = isinstance(dataset, IterableDataset)
    if not is_stream and not role_loss_weights and "tool_calls" not in str(dataset.features):
        return
    rows = [example] if is_stream else dataset.select_columns([*columns]).take(min(_FIRST_ROWS, len(dataset)))
    roles = {"system"} if "system" in example else set()
    nulls = []
    for index, row in enumerate(rows):
        for column in columns:
            turns = row[column] if isinstance(row[column], list) else []  # nobody checked them
            roles |= {turn.get("role") or turn.get("from", "") for turn in turns if isinstance(turn, dict)}
            nulls += [(index, column, *null) for null in null_arguments(turns)]
    roles = {SHAREGPT_ROLES.get(role, role) for role in roles if role}
    if not is_stream and (unused := role_loss_weights.keys() - roles - {"tools"}):
        logger.warning(
            f"`role_loss_weights` names {sorted(unused)}, but the first {_FIRST_ROWS:,} rows of the {name} dataset "
            f"have only {sorted(roles)}."
        )
    if nulls:
        index, column, turn, function, argument = nulls[0]
        logger.warning(
            f"Row {index} of the {name} dataset: in turn {turn} of `{column}`, the argument {argument!r} of the call "
            f"of {function!r} is null, as Arrow makes the arguments that only other rows have. Arguments that are null "
            "are left out of all rows. To train on a null, write `arguments` as JSON text."
        )
