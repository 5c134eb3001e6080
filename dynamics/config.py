"""Configs: frozen nested dataclasses, checked when they are made, fingerprinted when they are used.

A config holds values and nothing else. Every value in it can change the result, so every value is
in the fingerprint; what can't (folders, meshes, cadences of checkpoints) is an argument elsewhere.
"""

import dataclasses
import difflib
import hashlib
import itertools
import json
import math
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar, Union, dataclass_transform

T = TypeVar("T")


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
    ``__post_init__``, which sees values of the declared types (an int given for a float is a
    float by then, so that equal configs have equal fingerprints).
    """
    own = getattr(cls, "__post_init__", None)  # the class's or its parent's
    if "kind" in cls.__annotations__:
        raise TypeError(f"{cls.__name__} may not have a field 'kind': it names the class in JSON")

    def __post_init__(self: Any) -> None:
        hints = typing.get_type_hints(type(self), include_extras=True)
        for field in dataclasses.fields(self):
            name = f"{type(self).__name__}.{field.name}"
            value = _checked(name, getattr(self, field.name), hints[field.name])
            object.__setattr__(self, field.name, value)
        if own is not None:
            own(self)

    cls.__post_init__ = __post_init__  # pyright: ignore[reportAttributeAccessIssue]
    made = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    made.__init__.__no_type_check__ = True  # the checks above are clearer than a type checker's
    return made


def _checked(name: str, value: Any, hint: Any) -> Any:
    """``value`` as the type ``hint`` says, or one ValueError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        value = _checked(name, value, args[0])
        for mark in args[1:]:
            if isinstance(mark, Range) and value is not None and value not in mark:
                raise ValueError(f"{name} must be {mark}, got {value!r}")
        return value
    if origin is Literal:
        if not any(value == arg and type(value) is type(arg) for arg in args):
            near = difflib.get_close_matches(str(value), [str(a) for a in args], 1)
            hint_text = f" (perhaps {near[0]!r})" if near else ""
            raise ValueError(f"{name} must be one of {list(args)}, got {value!r}{hint_text}")
        return value
    if origin in (Union, types.UnionType):
        if int in args and isinstance(value, float) and value.is_integer():
            value = int(value)  # 1.0 and 1 are equal, so they must have one name
        errors: list[ValueError] = []
        for arg in sorted(args, key=lambda arg: arg is not type(value)):
            try:
                return _checked(name, value, arg)
            except ValueError as error:
                errors.append(error)
        bad = [error for error in errors if not isinstance(error, _WrongType)]
        raise bad[0] if bad else _WrongType(name, value, hint)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _WrongType(name, value, hint)
        return tuple(_checked(f"{name}[{i}]", v, args[0]) for i, v in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) <= sys.float_info.max else math.inf
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise _WrongType(name, value, hint)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return value + 0.0 if isinstance(value, float) else value  # -0.0 and 0.0 are one value


class _WrongType(ValueError):
    """A value of no type the field takes, as opposed to a bad value of a right one."""

    def __init__(self, name: str, value: Any, hint: Any):
        members = typing.get_args(hint) if typing.get_origin(hint) is not tuple else ()
        expected = " or ".join(getattr(m, "__name__", str(m)) for m in members or (hint,))
        super().__init__(f"{name} must be {expected}, got {value!r} ({type(value).__name__})")


def to_dict(config: Any) -> Any:
    """Nested plain values; a dataclass becomes its fields and its class name under ``kind``."""
    if dataclasses.is_dataclass(config):
        fields = {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {"kind": type(config).__name__} | fields
    if isinstance(config, tuple):
        return [to_dict(value) for value in config]
    return config


def to_json(config: Any) -> str:
    """The canonical text: keys sorted, shortest floats that read back equal."""
    return json.dumps(to_dict(config), sort_keys=True, indent=1, allow_nan=False)


def from_json(cls: Any, text: str) -> Any:
    """The config that ``to_json`` wrote; ValueError for anything else."""
    return _from_dict(cls, json.loads(text), getattr(cls, "__name__", str(cls)))


def _from_dict(hint: Any, value: Any, name: str) -> Any:
    """Dicts to the config class their ``kind`` names, lists to tuples."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is Annotated:
        return _from_dict(args[0], value, name)
    members = args if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    if isinstance(value, list):
        inner = [typing.get_args(m)[0] for m in members if typing.get_origin(m) is tuple]
        if not inner:
            raise _WrongType(name, value, hint)
        return tuple(_from_dict(inner[0], v, f"{name}[{i}]") for i, v in enumerate(value))
    kinds = {c.__name__: c for c in members if hasattr(c, "__dataclass_fields__")}
    if not isinstance(value, dict):
        if kinds and len(kinds) == len(members):
            raise _WrongType(name, value, hint)
        return value
    fields = dict(value)
    kind = fields.pop("kind", None)
    if kind not in kinds:
        raise ValueError(f"kind of {name} must be one of {sorted(kinds)}, got {kind!r}")
    cls: Any = kinds[kind]
    hints = typing.get_type_hints(cls, include_extras=True)
    if unknown := sorted(fields.keys() - hints.keys()):
        raise ValueError(f"{kind} has no field {unknown[0]!r}{_perhaps(unknown[0], hints)}")
    if missing := sorted(hints.keys() - fields.keys()):
        raise ValueError(f"{kind} needs the field {missing[0]!r}, which is missing")
    return cls(**{n: _from_dict(hints[n], v, f"{kind}.{n}") for n, v in fields.items()})


def fingerprint(config: Any) -> str:
    """64 bits in hexadecimal that name a config: equal configs, equal names, on every machine."""
    return hashlib.blake2b(to_json(config).encode(), digest_size=8).hexdigest()


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted field name -> value, for every leaf of the config."""
    out: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        out |= flatten(value, name + ".") if dataclasses.is_dataclass(value) else {name: value}
    return out


def override(config: T, values: Mapping[str, Any]) -> T:
    """The config with dotted fields replaced, checked again; ValueError names an unknown field.

    Where a field takes one of several classes, the name of one stands for it with its defaults:
    ``{"model": "convnet"}``.
    """
    return _replace(config, dict(values), "")


def _replace(config: Any, values: Mapping[str, Any], prefix: str) -> Any:
    """All at once, so that fields that must fit together may change together."""
    names = {field.name for field in dataclasses.fields(config)}
    changed: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        head, dot, rest = name.partition(".")
        if head not in names:
            raise ValueError(
                f"{type(config).__name__} has no field {head!r} (in {prefix + name!r})"
                f"{_perhaps(head, names)}"
            )
        if dot:
            nested.setdefault(head, {})[rest] = value
            continue
        kinds = choices(config).get(head, {}) if isinstance(value, str) else {}
        changed[head] = kinds[value.lower()]() if kinds and value.lower() in kinds else value
    for head, inner in nested.items():
        part = changed.get(head, getattr(config, head))
        if not dataclasses.is_dataclass(part):
            raise ValueError(
                f"{prefix}{head} has no fields, got {prefix + head}.{next(iter(inner))}"
            )
        changed[head] = _replace(part, inner, f"{prefix}{head}.")
    return dataclasses.replace(config, **changed)


def choices(config: Any, prefix: str = "") -> dict[str, dict[str, type]]:
    """Dotted name of each field that takes one of several classes -> the classes by name."""
    hints = typing.get_type_hints(type(config))
    found: dict[str, dict[str, type]] = {}
    for field in dataclasses.fields(config):
        classes: list[Any] = list(typing.get_args(hints[field.name]))
        classes = [c for c in classes if dataclasses.is_dataclass(c)]
        if len(classes) > 1:
            found[prefix + field.name] = {c.__name__.lower(): c for c in classes}
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= choices(value, f"{prefix}{field.name}.")
    return found


def _perhaps(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), 1)
    if near:
        return f"; perhaps {near[0]!r}"
    return f"; it has {', '.join(sorted(names)) or 'no fields'}"


def grid(config: T, values: Mapping[str, Iterable[Any]]) -> tuple[T, ...]:
    """The config at every point of a product of dotted fields, the last one varying fastest."""
    axes = [[(name, v) for v in choices] for name, choices in values.items()]
    if empty := [name for name, axis in zip(values, axes, strict=True) if not axis]:
        raise ValueError(f"grid: {empty[0]!r} has no values")
    points = tuple(override(config, dict(point)) for point in itertools.product(*axes))
    return tuple(dict.fromkeys(points))


def replica_fields(config: Any, prefix: str = "") -> tuple[str, ...]:
    """The dotted names of the fields marked ``Replica``."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    names: list[str] = []
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            names += replica_fields(value, name + ".")
        elif Replica in getattr(hints[field.name], "__metadata__", ()):
            names.append(name)
    return tuple(names)


def group(configs: Iterable[T]) -> list[tuple[T, ...]]:
    """Configs that differ only in ``Replica`` fields, together: each group is one program."""
    groups: dict[Any, list[T]] = {}
    for config in configs:
        values, shared = flatten(config), set(replica_fields(config))
        rest = tuple((n, v) for n, v in values.items() if n not in shared)
        kinds = _kinds(config)
        groups.setdefault((kinds, rest), []).append(config)
    return [tuple(members) for members in groups.values()]


def _kinds(config: Any) -> tuple[Any, ...]:
    if not dataclasses.is_dataclass(config):
        return ()
    values = (getattr(config, f.name) for f in dataclasses.fields(config))
    return (type(config).__name__, *(_kinds(v) for v in values))
