"""Words of the command line as values: what a flag takes is what the type of its field says."""

import difflib
import json
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union

from dynamics import config as configs
from runner.errors import Refused

T = TypeVar("T")

ELSEWHERE = {"workers": "sweep", "slurm": "sweep", "topology": "plan"}  # flags of one command

Words = dict[str, list[str]]  # field, as in configs -> the words that follow its flag


def words(argv: Sequence[str]) -> Words:
    """``--a-b 1 2 --c=3`` as {"a_b": ["1", "2"], "c": ["3"]}. Refused: a flag twice, or none."""
    found: Words = {}
    name = None
    for word in argv:
        head, equals, rest = word.partition("=") if word.startswith("--") else ("", "", word)
        if head:
            name = head[2:].replace("-", "_")
            if name in found:
                raise Refused(f"{head} is given twice: once, with every value after it")
            found[name] = []
        elif word[:1] == "-" and not _isnumber(word):
            raise Refused(f"expected --field VALUE ..., got {word!r}: flags have two dashes")
        if head and not equals:
            continue
        if name is None:
            preset = "; one preset can be given" if word.endswith(".py") else ""
            raise Refused(f"expected --field VALUE ..., got {word!r}{preset}")
        found[name].append(rest)
    return found


def _isnumber(word: str) -> bool:
    return isinstance(number(word), int | float)


def flag(name: str) -> str:
    """The flag of a field: ``--a-b``."""
    return "--" + name.replace("_", "-")


def check_known(given: Iterable[str], config: Any, others: Iterable[str]) -> None:
    """Refused: a flag whose first part is no field of the config, and not among the others.

    What lies deeper is the config's to refuse, which says the nearest, too.
    """
    leaves, others = list(configs.flatten(config)), list(others)
    first = {name.split(".")[0] for name in leaves}
    for name in given:
        if name.split(".")[0] in first or name in others:
            continue
        if name in ELSEWHERE:
            raise Refused(f"{flag(name)} is a flag of: python -m experiments {ELSEWHERE[name]} ...")
        near = difflib.get_close_matches(name, [*first, *others, *leaves], 1)
        near = near or [leaf for leaf in leaves if leaf.split(".")[-1] == name.split(".")[-1]]
        perhaps = f"; perhaps {flag(near[0])}" if near else "; --help lists them"
        raise Refused(f"there is no flag {flag(name)}{perhaps}")


def chosen(config: T, given: Words) -> T:
    """The config with the kinds that flags like ``--model convnet`` name, the first of several."""
    todo = {name: text[0] for name, text in given.items() if text}
    while name := next((name for name in configs.choices(config) if name in todo), ""):
        config = configs.override(config, {name: todo.pop(name)})  # which may bring fields of kinds
    return config


def single(config: T, given: Words) -> T:
    """The config of one run. Refused or ValueError: a value that a field does not take."""
    for name, kinds in configs.choices(config).items():
        if name in given and len(given[name]) != 1:
            got = " ".join(given[name]) or "nothing"
            raise Refused(f"{flag(name)} takes one of {', '.join(kinds)}, got {got}")
    config = chosen(config, given)
    hints, values = configs.hints(config), {}
    for name, text in given.items():
        if name in configs.choices(config):
            continue
        if any(leaf.startswith(f"{name}.") for leaf in hints):
            raise Refused(_group(name, hints))
        values[name] = _parsed(name, text, hints.get(name, Any), "; several make a sweep")
    return configs.override(config, values)


def several(config: T, given: Words) -> tuple[T, ...]:
    """The configs of a sweep: every combination of the values that the flags list."""
    hints, axes = configs.hints(chosen(config, given)), {}
    for name, text in given.items():
        hint = hints.get(name, Any)
        axes[name] = [_value(word, hint) for word in text]
        lists = [isinstance(value, tuple) for value in axes[name]]
        if _element(hint) is not None and not all(lists):
            raise Refused(
                f"{flag(name)} is a list, and in a sweep each value is one, as {flag(name)} "
                f"'[{', '.join(text)}]', got {text[lists.index(False)]}"
            )
    return configs.grid(config, axes)


def options(cls: type[T], given: Words) -> T:
    """The dataclass ``cls`` from the flags of its fields, which are taken out of those given."""
    hints = typing.get_type_hints(cls)
    return cls(**{n: _parsed(n, given.pop(n), hints[n], "") for n in hints if n in given})


def _parsed(name: str, text: list[str], hint: Any, otherwise: str) -> Any:
    """The value of a field from all words after its flag."""
    members = _members(hint)
    if type(None) in members and text == ["None"]:
        return None
    if bool in members and len(members) == 1 and not text:
        return True
    for member in members:
        arguments = typing.get_args(member)
        if typing.get_origin(member) is tuple and arguments[-1] is not Ellipsis:
            return _fixed(name, text, arguments)
    if (element := _element(hint)) is not None:
        values = [_value(word, element) for word in text]
        return tuple(v for value in values for v in (value if type(value) is tuple else (value,)))
    word = _one(name, text, otherwise)
    value = Path(word) if Path in members else _value(word, hint)
    if members == [bool] and not isinstance(value, bool):
        raise Refused(f"{flag(name)} must be True or False, got {word!r}")
    return value


def _one(name: str, text: list[str], otherwise: str) -> str:
    if len(text) != 1 or not text[0]:
        preset = any(word.endswith(".py") for word in text)
        hint = "; the preset comes before the flags" if preset else otherwise if text else ""
        got = " ".join(text) or "nothing"
        raise Refused(f"{flag(name)} takes one value{hint}, got {got}")
    return text[0]


def _fixed(name: str, text: list[str], arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    values = tuple(number(word) for word in text)
    if len(values) != len(arguments) or not all(type(v) is int and v > 0 for v in values):
        got = " ".join(text) or "nothing"
        raise Refused(f"{flag(name)} takes {len(arguments)} numbers, at least 1 each, got {got}")
    return values


def _group(name: str, hints: dict[str, Any]) -> str:
    inner = [flag(leaf) for leaf in hints if leaf.startswith(f"{name}.")]
    return f"{flag(name)} is no value but a group: {', '.join(inner)}"


def _members(hint: Any) -> list[Any]:
    """The types that a field takes, without what is noted beside them."""
    if typing.get_origin(hint) is Annotated:
        return _members(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (Union, types.UnionType):
        return [m for member in typing.get_args(hint) for m in _members(member)]
    return [hint]


def _element(hint: Any) -> Any:
    """The type of the values of a list, None for what is no list."""
    for member in _members(hint):
        if typing.get_origin(member) is tuple:
            return typing.get_args(member)[0]
    return None


def _value(word: str, hint: Any) -> Any:
    """What a word means: a text where the field takes one, else a number, a list, a choice."""
    members = _members(hint)
    if word == "None" and (type(None) in members or Any in members):
        return None
    return word if str in members else number(word)


def number(word: str) -> Any:
    """A number, True, False, None or a list as Python's or JSON's; all else as the word."""
    if word in ("None", "True", "False"):
        return {"None": None, "True": True, "False": False}[word]
    for reader in (int, float, json.loads):
        try:
            value = reader(word)
            return tuple(value) if isinstance(value, list) else value
        except ValueError:
            continue
    return word
