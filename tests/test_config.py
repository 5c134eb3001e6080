"""Configs: what they accept, what they refuse, and what names them."""

import dataclasses
import enum
import inspect
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies

from dynamics.config import (
    Count,
    Fraction,
    NonNegative,
    Positive,
    Range,
    Replica,
    Seed,
    fingerprint,
    flatten,
    from_json,
    frozen,
    grid,
    group,
    override,
    replica_fields,
    to_dict,
    to_json,
)
from dynamics.models import Convnet, Transformer

FEW = settings(derandomize=True, deadline=None, max_examples=25)


@frozen
class Dense:
    width: Count = 8
    scale: Positive = 1.0


@frozen
class Flat:
    bias: bool = True


@frozen
class Outer:
    name: str = "a"
    mode: Literal["one", "two"] = "one"
    rate: Annotated[Positive, Replica] = 0.5
    share: Annotated[Fraction, Replica] = 0.25
    seed: Annotated[Seed, Replica] = 0
    shift: float = 0.0
    limit: float | None = None
    cuts: tuple[Fraction, ...] = (0.5,)
    net: Dense | Flat = Dense()
    maybe: Dense | None = None
    parts: tuple[Dense | Flat, ...] = ()


class Color(enum.Enum):
    RED = 1


class Size(enum.IntEnum):
    BIG = 3


finite = st.floats(allow_nan=False, allow_infinity=False)
denses = st.builds(Dense, width=st.integers(1, 2**40), scale=st.floats(1e-300, 1e300))
nets = denses | st.builds(Flat, bias=st.booleans())
outers = st.builds(
    Outer,
    name=st.text(),
    mode=st.sampled_from(["one", "two"]),
    rate=st.floats(5e-324, 1e308),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31 - 1),
    shift=finite,
    limit=st.none() | finite,
    cuts=st.lists(st.floats(0, 1)).map(tuple),
    net=nets,
    maybe=st.none() | denses,
    parts=st.lists(nets, max_size=3).map(tuple),
)


# ---- text and back ------------------------------------------------------------------------------


@FEW
@given(outers)
def test_text_and_back(config):
    text = to_json(config)
    back = from_json(Outer, text)
    assert back == config and to_json(back) == text and fingerprint(back) == fingerprint(config)
    assert [type(v) for v in flatten(back).values()] == [type(v) for v in flatten(config).values()]
    shuffled = dict(reversed(json.loads(text).items()))
    assert from_json(Outer, json.dumps(shuffled)) == config
    json.loads(text, parse_constant=pytest.fail)  # no NaN, no Infinity


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            '{"kind": "Dense", "width": 3, "scale": 1.0, "widht": 3}',
            ["Dense", "'widht'", "perhaps 'width'"],
        ),
        ('{"kind": "Flat"}', ["kind", "Dense", "'Flat'"]),
        ('{"width": 3}', ["kind", "Dense", "None"]),
        ('{"kind": "Dense", "width": 0, "scale": 1.0}', ["Dense.width", ">= 1", "0"]),
        ('{"kind": "Dense", "width": 2.5, "scale": 1.0}', ["Dense.width", "int", "2.5"]),
        ('{"kind": "Dense", "width": 1, "scale": NaN}', ["Dense.scale", "finite"]),
        ("{", []),
    ],
)
def test_bad_text(text, words):
    with pytest.raises(ValueError) as error:
        from_json(Dense, text)
    assert all(word in str(error.value) for word in words), error.value


@frozen
class Needs:
    width: int


@pytest.mark.parametrize(
    ("cls", "text"),
    [
        (Dense, "3"),
        (Dense, "[]"),
        (Dense, "null"),
        (Dense, '{"kind": "Dense", "scale": 1.0, "width": [1]}'),
        (Dense, '{"kind": "Dense", "scale": 1.0, "width": {"kind": "int"}}'),
        (Dense, '{"kind": "Dense", "width": 3}'),
        (Needs, '{"kind": "Needs"}'),
    ],
)
def test_text_of_the_wrong_shape(cls, text):
    with pytest.raises(ValueError):
        from_json(cls, text)


@frozen
class PartsOrNone:
    parts: tuple[Dense | Flat, ...] | None = None


def test_optional_tuple_of_configs_comes_back():
    config = PartsOrNone(parts=(Dense(), Flat()))
    assert from_json(PartsOrNone, to_json(config)) == config
    assert from_json(PartsOrNone, to_json(PartsOrNone())) == PartsOrNone()


def test_a_field_named_kind_is_refused_or_harmless():
    class Named:
        kind: str = "x"

    try:
        made = frozen(Named)
    except (TypeError, ValueError):
        return
    assert to_dict(made())["kind"] == "Named"


# ---- fingerprints -------------------------------------------------------------------------------

KNOWN = "1ff1b0ced5d9932d"  # of Outer(): on every machine, under every Python


def test_fingerprint_is_a_known_value():
    """If this changes, every stored run is orphaned: change it only on purpose."""
    assert fingerprint(Outer()) == KNOWN
    assert fingerprint(()) != fingerprint((Outer(),)) != fingerprint((Outer(), Outer()))


def test_fingerprint_does_not_depend_on_the_process():
    parts = [inspect.getsource(cls) for cls in (Dense, Flat, Outer)]
    code = "from typing import *\nfrom dynamics.config import *\n" + "".join(parts)
    code += "print(fingerprint(Outer()))"
    for seed in ("1", "77"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip() == KNOWN, done.stderr


def test_fingerprint_does_not_depend_on_the_order_of_fields():
    """Sorting the fields of a class is not a change of its values."""
    fields = dataclasses.fields(Outer)
    hints = Outer.__annotations__
    for order in (reversed(fields), sorted(fields, key=lambda f: f.name)):
        order = list(order)
        body = {f.name: f.default for f in order}
        body["__annotations__"] = {f.name: hints[f.name] for f in order}
        other = frozen(type("Outer", (), body | {"__module__": __name__}))
        assert [f.name for f in dataclasses.fields(other)] == [f.name for f in order]
        assert fingerprint(other()) == KNOWN


CHANGED = {
    "name": "b",
    "mode": "two",
    "rate": 0.5000000000000001,
    "share": 0.0,
    "seed": 1,
    "shift": 5e-324,
    "limit": 0.0,
    "cuts": (0.5, 0.5),
    "net.width": 9,
    "net.scale": 1.5,
    "net": Flat(),
    "maybe": Dense(),
    "parts": (Flat(),),
}


def test_every_leaf_is_in_the_fingerprint():
    made = {name: override(Outer(), {name: value}) for name, value in CHANGED.items()}
    assert {f.name for f in dataclasses.fields(Outer)} <= CHANGED.keys()
    assert len({fingerprint(config) for config in made.values()} | {KNOWN}) == len(CHANGED) + 1


@FEW
@given(outers, outers)
def test_equal_configs_have_equal_fingerprints_and_others_do_not(a, b):
    assert (a == b) == (fingerprint(a) == fingerprint(b))
    assert fingerprint(override(a, {})) == fingerprint(dataclasses.replace(a)) == fingerprint(a)


def test_one_number_has_one_fingerprint():
    assert type(Outer(shift=3).shift) is float and type(Outer(limit=3).limit) is float
    assert fingerprint(Outer(shift=3)) == fingerprint(Outer(shift=3.0))
    assert fingerprint(Outer(cuts=(1, 0))) == fingerprint(Outer(cuts=[1.0, -0.0]))  # pyright: ignore
    assert fingerprint(Outer(shift=-0.0)) == KNOWN


@frozen
class Switch:
    order: Literal[1, 2] = 1
    size: int | float = 1


@pytest.mark.parametrize("values", [{"order": True}, {"order": 1.0}, {"size": 1.0}])
def test_equal_values_of_another_type_have_no_other_fingerprint(values):
    """Refused or made the same: never a second name for an equal config."""
    try:
        config = Switch(**values)
    except ValueError:
        return
    assert config != Switch() or fingerprint(config) == fingerprint(Switch())


# ---- values -------------------------------------------------------------------------------------

BAD = [
    (Outer, {"name": 3}, ["Outer.name", "str", "3", "int"]),
    (Outer, {"mode": "ones"}, ["Outer.mode", "['one', 'two']", "'ones'", "perhaps 'one'"]),
    (Outer, {"mode": None}, ["Outer.mode", "None"]),
    (Outer, {"rate": 0}, ["Outer.rate", "> 0", "0.0"]),
    (Outer, {"rate": "0.1"}, ["Outer.rate", "float", "'0.1'", "str"]),
    (Outer, {"rate": True}, ["Outer.rate", "float", "True", "bool"]),
    (Outer, {"share": 1.0000001}, ["Outer.share", "<= 1", "1.0000001"]),
    (Outer, {"share": -1e-9}, ["Outer.share", ">= 0"]),
    (Outer, {"seed": -1}, ["Outer.seed", ">= 0", "-1"]),
    (Outer, {"seed": 2**31}, ["Outer.seed", str(2**31)]),
    (Outer, {"seed": 1.0}, ["Outer.seed", "int", "1.0", "float"]),
    (Outer, {"seed": True}, ["Outer.seed", "int", "True", "bool"]),
    (Outer, {"shift": float("nan")}, ["Outer.shift", "finite", "nan"]),
    (Outer, {"shift": float("inf")}, ["Outer.shift", "finite", "inf"]),
    (Outer, {"shift": None}, ["Outer.shift", "float", "None"]),
    (Outer, {"limit": "x"}, ["Outer.limit", "float or None", "'x'"]),
    (Outer, {"limit": False}, ["Outer.limit", "float or None", "False"]),
    (Outer, {"cuts": 0.5}, ["Outer.cuts", "tuple", "0.5"]),
    (Outer, {"cuts": "0.5"}, ["Outer.cuts", "tuple"]),
    (Outer, {"cuts": (0.5, 1.5)}, ["Outer.cuts[1]", "<= 1", "1.5"]),
    (Outer, {"cuts": (None,)}, ["Outer.cuts[0]", "float", "None"]),
    (Outer, {"net": None}, ["Outer.net", "Dense or Flat", "None"]),
    (Outer, {"net": {}}, ["Outer.net", "Dense or Flat", "{}"]),
    (Outer, {"net": Dense}, ["Outer.net", "Dense or Flat"]),
    (Outer, {"maybe": Flat()}, ["Outer.maybe", "Dense or None", "Flat"]),
    (Outer, {"parts": (Dense(), 1)}, ["Outer.parts[1]", "1"]),
    (Flat, {"bias": 1}, ["Flat.bias", "bool", "1"]),
    (Flat, {"bias": "False"}, ["Flat.bias", "bool", "'False'"]),
    (Dense, {"scale": 10**400}, ["Dense.scale", "finite"]),
    (Dense, {"width": 2**63}, ["Dense.width", "63 bits", str(2**63)]),
    (Dense, {"width": -(10**9000)}, ["Dense.width", "63 bits", "thousands of digits"]),
    (Outer, {"name": ["x" * 1000] * 1000}, ["Outer.name", "str", "list"]),
]


@pytest.mark.parametrize(("cls", "values", "words"), BAD)
def test_bad_values_are_refused_with_name_expectation_and_value(cls, values, words):
    with pytest.raises(ValueError) as error:
        cls(**values)
    text = str(error.value).replace("NoneType", "None")
    assert all(word in text for word in words), text


kinds = st.one_of(
    st.none() | st.booleans() | st.integers() | st.integers(2**60, 2**70) | st.just(10**1000),
    st.floats() | st.complex_numbers() | st.decimals() | st.fractions() | st.text() | st.binary(),
    st.datetimes() | st.uuids() | st.sampled_from([Dense, len, object(), Path("data"), range(3)]),
    st.sampled_from([Color.RED, Size.BIG, np.str_("one"), np.bytes_(b"x"), Dense(), Flat()]),
    numpy_strategies.arrays(
        numpy_strategies.scalar_dtypes(), numpy_strategies.array_shapes(min_dims=0, max_side=3)
    ),
    numpy_strategies.scalar_dtypes().flatmap(numpy_strategies.from_dtype),
)
anything = st.recursive(
    kinds,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=2),
        st.sets(st.integers(), max_size=2),
    ),
    max_leaves=4,
)


@settings(FEW, max_examples=300)
@given(st.sampled_from([f.name for f in dataclasses.fields(Outer)]), anything)
def test_a_value_of_any_type_is_kept_or_refused_in_one_sentence(name, value):
    try:
        config = Outer(**{name: value})
    except ValueError as error:
        text = str(error)
        assert name in text and " must be " in text and "got" in text
        assert len(text.splitlines()) == 1 and len(text) < 400
        return
    text = to_json(config)
    back = from_json(Outer, text)
    assert back == config and to_json(back) == text and fingerprint(back) == fingerprint(config)
    own = (bool, int, float, str, tuple, type(None), Dense, Flat)
    assert type(getattr(config, name)) in own  # numpy's numbers have become Python's


@settings(FEW, max_examples=300)
@given(anything)
def test_any_value_of_a_config_that_is_a_dict_is_stored_or_named(value):
    try:
        text = to_json({"entry": [value]})
    except ValueError as error:
        assert "['entry'][0]" in str(error) and "got" in str(error)
        assert len(str(error).splitlines()) == 1
        return
    assert to_json(json.loads(text, parse_constant=pytest.fail)) == text


def test_numpy_numbers_have_the_fingerprints_of_their_values():
    assert fingerprint(Dense(width=np.int64(8), scale=np.float64(1.0))) == fingerprint(Dense())
    assert fingerprint(Dense(scale=np.float32(0.1))) == fingerprint(
        Dense(scale=float(np.float32(0.1)))
    )
    assert fingerprint(Flat(bias=np.bool_(True))) == fingerprint(Flat())
    assert Outer(cuts=[np.float32(0.5), np.array(1)]).cuts == (0.5, 1.0)
    rates = grid(Outer(), {"rate": np.logspace(-3, -1, 3), "seed": np.arange(2)})
    assert [type(point.seed) for point in rates] == [int] * 6


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rates": {"b": {1, 2}}}, ["dict['rates']['b'] must be", "{1, 2} (set)"]),
        ({"a": [0.5, float("nan")]}, ["dict['a'][1] must be a finite number", "nan (float)"]),
        ({"a": {1: 2}}, ["dict['a'] must be", "text keys", "{1: 2} (dict)"]),
        ((Dense(), {"folder": Path("x")}), ["tuple[1]['folder'] must be", "Path"]),
    ],
)
def test_what_json_cannot_hold_is_named(config, words):
    with pytest.raises(ValueError) as error:
        to_json(config)
    assert all(word in str(error.value) for word in words), error.value


def test_unknown_and_positional_arguments():
    with pytest.raises(TypeError, match="Dense has no field 'widht'; perhaps 'width'"):
        Dense(widht=3)  # pyright: ignore
    with pytest.raises(TypeError, match="Flat has no field 'zzz'; it has bias"):
        Flat(zzz=3)  # pyright: ignore
    with pytest.raises(TypeError, match="missing 1 required"):
        Needs()  # pyright: ignore
    with pytest.raises(TypeError):
        Dense(3)  # pyright: ignore


def test_limits_of_ranges_are_told_exactly():
    with pytest.raises(ValueError) as error:
        Outer(seed=2**31)
    assert str(2**31 - 1) in str(error.value)


def test_ranges():
    closed, open_ = Range(low=0.0, high=1.0), Range(above=0.0, below=1.0)
    assert 0 in closed and 1 in closed and 1.1 not in closed and float("nan") not in closed
    assert 0 not in open_ and 1 not in open_ and 0.5 in open_ and float("nan") not in open_
    assert (str(closed), str(open_)) == (">= 0 and <= 1", "> 0 and < 1")
    assert (str(Range(above=2.0)), str(Range(high=-1.0))) == ("> 2", "<= -1")


@frozen
class Either:
    auto: Literal["auto"] | Positive = "auto"
    number: Positive | Literal["auto"] = 1.0
    size: NonNegative | None = None


def test_unions_of_choices_and_numbers_in_any_order():
    assert Either(auto=2).auto == 2.0 and Either(number="auto").number == "auto"
    assert type(Either(auto=2).auto) is float
    with pytest.raises(ValueError):
        Either(number="autp")  # pyright: ignore
    with pytest.raises(ValueError):
        Either(auto=-1.0)
    with pytest.raises(ValueError):
        Either(size=-1.0)


def test_frozen_and_hashable():
    config = Outer()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rate = 1.0  # pyright: ignore
    with pytest.raises(dataclasses.FrozenInstanceError):
        del config.rate
    assert {config: 1}[Outer()] == 1


@frozen
class Ordered:
    low: float = 0.0
    high: float = 1.0
    seen: tuple[float, ...] = ()

    def __post_init__(self):
        assert type(self.low) is float, "checked before the class's own checks"
        if self.low >= self.high:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")


def test_own_checks_run_after_the_types():
    assert Ordered(low=0, high=2).high == 2.0
    with pytest.raises(ValueError, match="low must be below high, got 2.0 and 1.0"):
        Ordered(low=2)


@frozen
class Narrower(Ordered):
    extra: int = 0


def test_a_subclass_keeps_the_checks_of_its_parent():
    with pytest.raises(ValueError, match="low must be below high"):
        Narrower(low=5)


# ---- overrides and grids ------------------------------------------------------------------------


def test_override_replaces_only_what_it_names():
    config = override(Outer(), {"net.width": 3, "rate": 2, "cuts": [0, 1]})
    assert config == Outer(net=Dense(width=3), rate=2.0, cuts=(0.0, 1.0))
    assert override(config, {}) is config or override(config, {}) == config
    assert override(Outer(), {"net": Flat(), "net.bias": False}).net == Flat(bias=False)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rat": 1.0}, ["Outer", "'rat'", "perhaps 'rate'"]),
        ({"net.wdith": 1}, ["Dense", "'wdith'", "'net.wdith'", "perhaps 'width'"]),
        ({"net.qqq": 1}, ["Dense", "'qqq'", "scale", "width"]),
        ({"rate.x": 1}, ["rate.x"]),
        ({"width": 3}, ["Outer", "'width'", "perhaps 'net.width'"]),
        ({"maybe.width": 1}, ["maybe.width"]),
        ({"": 1}, ["''"]),
        ({"net.": 1}, ["'net.'"]),
        ({"net.width": 0}, ["Dense.width", ">= 1"]),
        ({"net.bias": True}, ["Dense", "'bias'"]),
    ],
)
def test_bad_overrides(values, words):
    with pytest.raises(ValueError) as error:
        override(Outer(), values)
    assert all(word in str(error.value) for word in words), error.value


def test_overrides_are_checked_together():
    """Only the result must be valid, whatever the order the fields are named in."""
    assert override(Ordered(), {"high": -1, "low": -2}) == Ordered(low=-2, high=-1)
    assert override(Ordered(), {"low": 5, "high": 6}) == Ordered(low=5, high=6)
    assert override(Transformer(), {"num_heads": 3, "width": 12}).num_heads == 3
    net = override(Convnet(), {"norm": "group", "channels": (12,), "groups": 4})
    assert net == Convnet(norm="group", channels=(12,), groups=4)
    with pytest.raises(ValueError):
        override(Ordered(), {"low": 6, "high": 5})


@FEW
@given(outers)
def test_flatten_names_what_override_sets(config):
    assert override(Outer(net=config.net, maybe=config.maybe), flatten(config)) == config


def test_grid_order_and_count():
    points = grid(Outer(), {"seed": range(3), "net.width": iter([4, 8]), "mode": ["two"]})
    wanted = itertools.product(range(3), [4, 8], ["two"])
    assert [(p.seed, p.net.width, p.mode) for p in points] == list(wanted)
    assert grid(Outer(), {}) == (Outer(),)
    assert len(grid(Outer(), {"shift": [1, 1.0, 2, -0.0, 0.0]})) == 3
    assert all(p == override(Outer(), {"seed": p.seed, "net.width": p.net.width, "mode": "two"})
               for p in points)  # fmt: skip


def test_bad_grids():
    with pytest.raises(ValueError, match="'seed' has no values"):
        grid(Outer(), {"rate": [1], "seed": []})
    with pytest.raises(ValueError, match="perhaps 'seed'"):
        grid(Outer(), {"seeed": [1]})
    with pytest.raises(ValueError, match="Outer.rate"):
        grid(Outer(), {"rate": [1, -1]})


def test_groups_differ_only_in_replica_fields():
    assert replica_fields(Outer()) == ("rate", "share", "seed")
    axes = {"rate": [1, 2], "net.width": [4, 8], "seed": [0, 1], "mode": ["one", "two"]}
    points = grid(Outer(), axes)
    groups = group(points)
    assert len(groups) == 4 and all(len(g) == 4 for g in groups)
    assert sorted(map(fingerprint, sum(groups, ()))) == sorted(map(fingerprint, points))
    for members in groups:
        assert len({(p.net, p.mode, p.shift, p.cuts) for p in members}) == 1
        assert [p for p in points if p in members] == list(members)  # in the order given


@frozen
class Twin:
    """The same fields as Dense, another class."""

    width: Count = 8
    scale: Positive = 1.0


@frozen
class Holds:
    net: Dense | Twin | None = None
    parts: tuple[Dense | Twin, ...] = ()
    seed: Annotated[Seed, Replica] = 0


def test_groups_never_mix_classes():
    configs = [Holds(net=Dense()), Holds(net=Twin()), Holds(), Holds(parts=(Dense(),))]
    configs += [Holds(parts=(Twin(),)), Holds(net=Dense(), seed=4)]
    assert [len(g) for g in group(configs)] == [2, 1, 1, 1, 1]
    assert group([]) == []


@frozen
class Inner:
    rate: Annotated[Positive, Replica] = 1.0
    width: int = 1


@frozen
class Nested:
    inner: Inner = Inner()
    other: Inner | Flat = Inner()


def test_replica_fields_of_nested_configs():
    assert replica_fields(Nested()) == ("inner.rate", "other.rate")
    assert replica_fields(Nested(other=Flat())) == ("inner.rate",)
    groups = group(grid(Nested(), {"inner.rate": [1, 2], "other.rate": [3], "inner.width": [1, 2]}))
    assert [len(g) for g in groups] == [2, 2]
