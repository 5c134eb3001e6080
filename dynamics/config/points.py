"""Other configs made of one: fields replaced, grids, and the groups that are one program."""

import dataclasses
import itertools
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from dynamics.config.values import Replica, perhaps

T = TypeVar("T")


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted field name -> value, for every leaf of the config."""
    out: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        out |= flatten(value, name + ".") if dataclasses.is_dataclass(value) else {name: value}
    return out


def hints(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted field name -> the type it is declared with, for every leaf of the config."""
    out: dict[str, Any] = {}
    declared = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        inner = dataclasses.is_dataclass(value)
        out |= hints(value, name + ".") if inner else {name: declared[field.name]}
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
                f"{perhaps(head, names, flatten(config, prefix))}"
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
