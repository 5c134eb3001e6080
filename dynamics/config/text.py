"""Configs as text and back, and the names of their runs."""

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Union

from dynamics.config.values import WIDE, WrongType, perhaps, plain, shown


def to_dict(config: Any, name: str = "") -> Any:
    """Nested plain values; a dataclass becomes its fields and its class name under ``kind``.

    ValueError: a value that JSON has not, with the name of its entry.
    """
    value, name = plain(config), name or type(config).__name__
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {"kind": type(value).__name__} | {n: to_dict(v, f"{name}.{n}") for n, v in fields}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {str.__str__(key): to_dict(v, f"{name}[{key!r}]") for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_dict(v, f"{name}[{i}]") for i, v in enumerate(value)]
    if value is None or isinstance(value, bool | str) or _storable(value):
        return value
    raise ValueError(
        f"{name} must be a finite number, a text, True, False, None, or a list, a dataclass or a "
        f"dict with text keys of these, got {shown(value)} ({type(value).__name__})"
    )


def _storable(value: Any) -> bool:
    """Whether a number has a text that reads back equal."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and value.bit_length() <= WIDE


def to_json(config: Any) -> str:
    """The canonical text: keys sorted, shortest floats that read back equal. ValueError: not so."""
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
            raise WrongType(name, value, hint)
        return tuple(_from_dict(inner[0], v, f"{name}[{i}]") for i, v in enumerate(value))
    kinds = {c.__name__: c for c in members if hasattr(c, "__dataclass_fields__")}
    if not isinstance(value, dict):
        if kinds and len(kinds) == len(members):
            raise WrongType(name, value, hint)
        return value
    fields = dict(value)
    kind = fields.pop("kind", None)
    if kind not in kinds:
        raise ValueError(f"kind of {name} must be one of {sorted(kinds)}, got {kind!r}")
    cls: Any = kinds[kind]
    hints = typing.get_type_hints(cls, include_extras=True)
    if unknown := sorted(fields.keys() - hints.keys()):
        raise ValueError(f"{kind} has no field {unknown[0]!r}{perhaps(unknown[0], hints)}")
    if missing := sorted(hints.keys() - fields.keys()):
        raise ValueError(f"{kind} needs the field {missing[0]!r}, which is missing")
    return cls(**{n: _from_dict(hints[n], v, f"{kind}.{n}") for n, v in fields.items()})


def fingerprint(config: Any) -> str:
    """64 bits in hexadecimal that name a config: equal configs, equal names, on every machine."""
    return hashlib.blake2b(to_json(config).encode(), digest_size=8).hexdigest()
