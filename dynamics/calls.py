"""Functions that are equal where their parts are: so that compiled programs are found again."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Call:
    """``function(*given, ...)`` with the keywords ``named``; equal to one of equal parts."""

    function: Callable[..., Any]
    given: tuple[Any, ...] = ()
    named: tuple[tuple[str, Any], ...] = ()

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """What the function returns."""
        return self.function(*self.given, *args, **dict(self.named), **keywords)

    @property
    def __name__(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)


def by_value(fn: Any) -> Any:
    """A bound method or ``functools.partial`` as one that is equal to another of equal parts.

    Python's own are equal to themselves alone. All else, and what has no hash, stays as it is.
    """
    if isinstance(fn, functools.partial):
        named = tuple(sorted(fn.keywords.items()))
        found = Call(by_value(fn.func), fn.args, named)
    elif inspect.ismethod(fn):
        found = Call(fn.__func__, (fn.__self__,))
    else:
        return fn
    try:
        hash(found)
    except TypeError:
        return fn
    return found
