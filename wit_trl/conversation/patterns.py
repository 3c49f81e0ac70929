"""Where patterns match in parts of a text, within a limit of time."""

import time
from collections.abc import Iterator, Sequence

from ..weights import compile_pattern


_SECONDS = 1.0  # for a pattern in a row


def matches(pattern: str, text: str, parts: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """
    Yields the number of a part of the text and the characters that a pattern matches in it, as if it stood alone.

    Raises:
        `ValueError`: it takes too long, as patterns do that try the same characters again and again.
    """
    end_of_time = time.monotonic() + _SECONDS
    for number, (start, end) in enumerate(parts):
        try:
            found = compile_pattern(pattern).finditer(
                text[start:end], timeout=max(end_of_time - time.monotonic(), 1e-3)
            )
            yield from ((number, start + each.start(), start + each.end()) for each in found if each[0])
        except TimeoutError as error:
            raise ValueError(
                f"the pattern {pattern!r} of `regex_loss_weights` takes longer than {_SECONDS:g} s. Write it without "
                "nested repetitions, such as `(a+)+`."
            ) from error
