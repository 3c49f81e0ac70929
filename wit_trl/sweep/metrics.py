"""The names of the metrics of a trial, and the losses of its rows."""

import re
from pathlib import Path

import pyarrow.parquet as pq


TASK_METRIC, RETENTION_METRIC = "eval_completion_loss", "eval_retention_loss"


def loss_metric(name: str, region: str = "completion") -> str:
    """Returns the name of the loss of a region on an evaluation set. The set of the task itself has an empty name."""
    return f"eval_{name}_{region}_loss" if name else f"eval_{region}_loss"


def rows_file(name: str) -> str:
    """Returns the name of the file with the losses of an evaluation set by row, or with those of `"retention"`."""
    return f"{name}_rows.parquet" if name else "rows.parquet"


def read_rows(folder: Path, metric: str) -> tuple | None:
    """Returns the summed loss and the number of tokens of each row, or `None` for a metric that is no mean of rows."""
    if metric == RETENTION_METRIC:
        name, region = "retention", "completion"
    elif loss := re.fullmatch(r"eval_(?:(\w+)_)?(prompt|completion)_loss", metric):
        name, region = loss[1] or "", loss[2]
    else:
        return None
    rows = pq.read_table(folder / rows_file(name), columns=[f"{region}_nll", f"{region}_tokens"])
    totals, tokens = (column.to_numpy() for column in rows.columns)
    return totals[tokens > 0], tokens[tokens > 0]
