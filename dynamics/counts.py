"""Numbers of things: refused by name where they are no whole numbers, before anything is sliced."""

import operator
from typing import Any


def check(least: int | None = 1, /, **counts: Any) -> None:
    """ValueError unless each is a whole number, Python's or numpy's, from ``least`` on; or None.

    A float is refused even where it is whole: 0.3 * n seldom is.
    """
    for name, value in counts.items():
        if value is None:
            continue
        try:
            whole = not isinstance(value, bool) and operator.index(value)
        except TypeError:
            whole = False
        if whole is False:
            raise ValueError(
                f"{name} must be a whole number, got {value!r} ({type(value).__name__}): round it"
            )
        if least is not None and whole < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
