"""Tasks that are equal where what they are made of is equal."""

from typing import Any

from dynamics.calls import by_value
from dynamics.types import Task


def of_methods(parts: Any) -> Task:
    """The Task of an object's methods ``init``, ``loss``, ``evaluate``, and of what else it has of
    a Task's fields: equal to, and hashed as, the Task of an equal object.

    For a frozen dataclass whose fields have hashes (numbers, tuples, flax modules, functions, other
    Tasks). Of an object without a hash (a module with an array in a field) the Task is equal to
    itself alone, and so is ``Task(parts.init, ...)``: bound methods of equal objects are unequal.
    """
    names = [name for name in Task._fields if hasattr(parts, name)]
    return Task(**{name: by_value(getattr(parts, name)) for name in names})
