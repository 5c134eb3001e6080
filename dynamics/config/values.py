"""What a config may hold: types, ranges and choices, checked when it is made."""

import dataclasses
import difflib
import functools
import math
import numbers
import reprlib
import types
import typing
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar, Union, dataclass_transform

T = TypeVar("T")

WIDE = 63  # bits of an int: what int64 holds beside the sign
SHORT = reprlib.Repr()  # of values in errors
SHORT.maxstring = SHORT.maxother = 60


@dataclasses.dataclass(frozen=True)
class Range:
    """The closed interval a number must lie in; ``above`` and ``below`` exclude their end."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, value: float | int) -> bool:
        return self.low <= value <= self.high and self.above < value < self.below

    def __str__(self) -> str:
        limits = {">": self.above, ">=": self.low, "<": self.below, "<=": self.high}
        told = {sign: limit for sign, limit in limits.items() if math.isfinite(limit)}
        return " and ".join(
            f"{sign} {int(limit) if float(limit).is_integer() else limit}"
            for sign, limit in told.items()
        )


class Replica:
    """Marks a number that may differ between the replicas of one compiled program."""


Positive = Annotated[float, Range(above=0.0)]
NonNegative = Annotated[float, Range(low=0.0)]
Fraction = Annotated[float, Range(low=0.0, high=1.0)]
Count = Annotated[int, Range(low=1.0)]
Seed = Annotated[int, Range(low=0.0, high=2.0**31 - 1)]


@dataclass_transform(frozen_default=True, kw_only_default=True)
def frozen(cls: type[T]) -> type[T]:
    """A frozen keyword-only dataclass whose values are checked when it is made.

    Types, ``Literal`` choices and ``Range``s are checked first, then the class's own
    ``__post_init__``, which sees values of the declared types: an int given for a float is a float
    by then, and numpy's numbers are Python's, so that equal configs have equal fingerprints.
    TypeError: a field the class does not have, with the nearest that it has.
    """
    own = getattr(cls, "__post_init__", None)  # the class's or its parent's
    if "kind" in cls.__annotations__:
        raise TypeError(f"{cls.__name__} may not have a field 'kind': it names the class in JSON")

    def __post_init__(self: Any) -> None:
        hints = typing.get_type_hints(type(self), include_extras=True)
        for field in dataclasses.fields(self):
            name = f"{type(self).__name__}.{field.name}"
            value = checked(name, getattr(self, field.name), hints[field.name])
            object.__setattr__(self, field.name, value)
        if own is not None:
            own(self)

    cls.__post_init__ = __post_init__  # pyright: ignore[reportAttributeAccessIssue]
    made = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    made.__init__ = _naming_the_nearest(made.__init__)
    made.__init__.__no_type_check__ = True  # the checks above are clearer than a type checker's
    return made


def _naming_the_nearest(init: Any) -> Any:
    """A dataclass's ``__init__`` that says for an unknown field which one may have been meant."""

    @functools.wraps(init)
    def __init__(self: Any, *positional: Any, **values: Any) -> None:
        names = [field.name for field in dataclasses.fields(self)]
        if unknown := [name for name in values if name not in names]:
            raise TypeError(
                f"{type(self).__name__} has no field {unknown[0]!r}{perhaps(unknown[0], names)}"
            )
        init(self, *positional, **values)

    return __init__


def checked(name: str, value: Any, hint: Any) -> Any:
    """``value`` as the type ``hint`` says, or one ValueError."""
    origin, args, value = typing.get_origin(hint), typing.get_args(hint), plain(value)
    if origin is Annotated:
        value = checked(name, value, args[0])
        for mark in args[1:]:
            if isinstance(mark, Range) and value is not None and value not in mark:
                raise ValueError(f"{name} must be {mark}, got {shown(value)}")
        return value
    if origin is Literal:
        if not any(type(value) is type(arg) and value == arg for arg in args):
            near = difflib.get_close_matches(shown(value).strip("'"), [str(a) for a in args], 1)
            hint_text = f" (perhaps {near[0]!r})" if near else ""
            raise ValueError(f"{name} must be one of {list(args)}, got {shown(value)}{hint_text}")
        return value
    if origin in (Union, types.UnionType):
        if int in args and isinstance(value, float) and value.is_integer():
            value = int(value)  # 1.0 and 1 are equal, so they must have one name
        errors: list[ValueError] = []
        for arg in sorted(args, key=lambda arg: arg is not type(value)):
            try:
                return checked(name, value, arg)
            except ValueError as error:
                errors.append(error)
        bad = [error for error in errors if not isinstance(error, WrongType)]
        raise bad[0] if bad else WrongType(name, value, hint)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise WrongType(name, value, hint)
        return tuple(checked(f"{name}[{i}]", v, args[0]) for i, v in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = _as_float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise WrongType(name, value, hint)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    if isinstance(value, int) and value.bit_length() > WIDE:
        raise ValueError(f"{name} must be an int of at most {WIDE} bits, got {shown(value)}")
    return value + 0.0 if isinstance(value, float) else value  # -0.0 and 0.0 are one value


def plain(value: Any) -> Any:
    """A number, a truth value or a text of whatever type as Python's own; all else as it is."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # numpy's, or an array of no axes
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return _as_float(value)
    return str.__str__(value) if isinstance(value, str) else value


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def shown(value: Any) -> str:
    """The value for one line of an error: its repr, without line breaks, cut where it is long."""
    try:
        return " ".join(SHORT.repr(value).split())
    except ValueError:
        return "a number of thousands of digits"  # of which Python makes no text


class WrongType(ValueError):
    """A value of no type the field takes, as opposed to a bad value of a right one."""

    def __init__(self, name: str, value: Any, hint: Any):
        members = typing.get_args(hint) if typing.get_origin(hint) is not tuple else ()
        expected = " or ".join(map(_called, members or (hint,)))
        got = f"{shown(value)} ({type(value).__name__})"
        kinds = [_called(m).lower() for m in members if dataclasses.is_dataclass(m)]
        if isinstance(value, str) and (near := difflib.get_close_matches(value, kinds, 1)):
            got += f"; perhaps {near[0]!r}"
        super().__init__(f"{name} must be {expected}, got {got}")


def _called(hint: Any) -> str:
    """What a type is called in an error."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return f"a tuple of {' or '.join(map(_called, typing.get_args(args[0]) or args[:1]))}"
    if origin is Annotated:
        return _called(args[0])
    if origin is Literal:
        return f"one of {list(args)}"
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))


def perhaps(name: str, names: Iterable[str], below: Iterable[str] = ()) -> str:
    """``; perhaps`` the nearest name, or a dotted one ``below`` that ends in it; else all names."""
    near = difflib.get_close_matches(name, list(names), 1)
    near = near or [dotted for dotted in below if dotted.endswith(f".{name}")]
    if near:
        return f"; perhaps {near[0]!r}"
    return f"; it has {', '.join(sorted(names)) or 'no fields'}"
