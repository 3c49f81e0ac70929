"""Attributes that have another value for a while. Imports nothing, so that the kernels are checked by torch alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def set_for_now(target: Any, **values: Any) -> Iterator[None]:
    """Sets attributes, and sets them back at the end."""
    before = {name: getattr(target, name) for name in values}
    vars(target).update(values)
    try:
        yield
    finally:
        vars(target).update(before)
