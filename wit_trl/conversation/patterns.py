"""Where patterns match in parts of a text, within a limit of time."""

import time
from collections.abc import Iterator, Sequence

from ..weights import compile_pattern


_SECONDS = 1.0  # for a pattern in a row


def matches(pattern: str, text: str, parts: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """
    Yields the characters that a pattern matches in each part of a text, as if the part stood alone.

    Raises:
        `ValueError`: it takes too long, as patterns do that try the same characters again and again.
    """
    end_of_time = time.monotonic() + _SECONDS
    for start, end in parts:
        try:
            found = compile_pattern(pattern).finditer(
                text[start:end], timeout=max(end_of_time - time.monotonic(), 1e-3)
            )
            yield from ((start + match.start(), start + match.end()) for match in found if match.end() > match.start())
        except TimeoutError as error:
            raise ValueError(
                f"the pattern {pattern!r} of `regex_loss_weights` takes longer than {_SECONDS:g} s. Write it without "
                "nested repetitions, such as `(a+)+`."
            ) from error
