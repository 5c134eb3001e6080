"""What a stored run is made of, so that nothing else is continued in its place.

An identity is a JSON value: the data, the batches, the probes with their cadences, the program of
the step, the state it began with. A run is taken up only by a call with the same one. What does not
change its numbers beyond the rounding of another mesh is no part of it: the mesh, how a population
is run, when it is saved, how many steps it does.
"""

import dataclasses
import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from dynamics import mesh as meshes
from dynamics.types import PyTree, Stream, TrainState

Value = Any  # what JSON can hold

SAME = 1e-4  # of a leaf's size: by how much the numbers of a first state differ on another mesh
ENTRIES = 16  # of each leaf of the first state are kept
WHOLE = 2**26  # bytes of a leaf up to which its mean and size are kept, too
FED = 4  # batches from the host that are hashed in place of the data

WORDS = {
    "data": "its data are other than these",
    "keys": "its keys, and so the order of its batches, are other than these",
    "program": "its model, loss, optimizer, schedule or augmentation is another",
}


def of_run(
    state: TrainState,
    stream: Stream,
    program: Callable[[], Any],
    watching: Sequence[Any],
    counts: Mapping[str, int],
    looked_at: Mapping[str, PyTree] = {},
) -> dict[str, Value]:
    """The identity of a run from ``state`` on, as a JSON value.

    ``program`` gives the jaxpr of a step, ``watching`` are probes and revisions, ``counts`` sizes
    and cadences, ``looked_at`` the data sets that probes look at. Cost: the data are hashed (about
    1 GB/s; of data from the host the first batches), and 16 numbers of each leaf of the first state
    are fetched. All processes must call it.
    """
    fed = () if stream.host is None else tuple(itertools.islice(stream.host(0), FED))
    return {
        **counts,
        "step it began at": int(np.max(meshes.fetch(state.step))),
        "jax": jax.__version__,
        "data": digest((stream.shared, fed)),
        "batches": _each(stream.own),
        "keys": digest(state.key),
        "hyperparameters": _each(state.hyperparameters),
        "probes and revisions": {p.name: {"every": describe(p.every)} | of(p) for p in watching},
        "data sets": {name: digest(data) for name, data in looked_at.items()} if watching else {},
        "program": of_program(program()),
        "first state": marks({"params": state.params, "extras": state.extras}),
    }


def difference(then: Mapping[str, Value], now: Mapping[str, Value]) -> str | None:
    """The first thing in which two identities differ, in words; None if they are the same run."""
    for name, here in now.items():
        there = then.get(name)
        if name == "jax" or there == here:
            continue
        if name == "program" and then.get("jax") != now.get("jax"):
            continue  # another version writes the same program in other words
        if name == "first state":
            if leaf := _moved(there or {}, here):
                return f"it began with other parameters ({leaf})"
        elif name in WORDS:
            return WORDS[name]
        elif isinstance(there, dict) and isinstance(here, dict):
            return _within(name, there, here)
        else:
            return f"its {name} is {there}, now {here}"
    return None


def _within(name: str, there: Mapping[str, Value], here: Mapping[str, Value]) -> str:
    if there.keys() != here.keys():
        return f"its {name} are {sorted(there) or 'none'}, now {sorted(here) or 'none'}"
    key = next(key for key in there if there[key] != here[key])
    one, other = there[key], here[key]
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return f"its {name} differ in {key!r}"
    field = next(f for f in {**one, **other} if one.get(f) != other.get(f))
    return f"{field} of its {key!r} is {_short(one.get(field))}, now {_short(other.get(field))}"


def _short(value: Value) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _moved(there: Mapping[str, list[float]], here: Mapping[str, list[float]]) -> str | None:
    """The first leaf whose numbers differ by more than the rounding of another mesh."""
    for name in {**there, **here}:
        a, b = np.array(there.get(name, [])), np.array(here.get(name, []))
        if a.shape != b.shape:
            return name
        scale = np.sqrt(np.mean(a**2)) if a.size else 0.0
        if not np.allclose(a, b, rtol=0, atol=SAME * scale, equal_nan=True):
            return name
    return None


def _each(tree: PyTree) -> dict[str, str]:
    """Path -> digest of the leaf."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(path) or "batches": digest(leaf) for path, leaf in flat}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def digest(tree: PyTree) -> str:
    """BLAKE2b of the paths, shapes, types and bytes of all leaves."""
    made = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = _numbers(leaf)
        made.update(f"{_name(path)} {array.dtype}{array.shape}".encode())
        made.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return made.hexdigest()


def _numbers(leaf: Any) -> np.ndarray:
    leaf = meshes.fetch(leaf)
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def marks(tree: PyTree) -> dict[str, list[float]]:
    """Path -> some numbers of each leaf, evenly over it; of small ones its mean and size, too."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not leaf.size or jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue
        places = np.unique(np.linspace(0, leaf.size - 1, ENTRIES).astype(np.int64))
        index = np.unravel_index(places, leaf.shape)
        small = leaf.size * leaf.dtype.itemsize <= WHOLE
        array = meshes.fetch(leaf if small else leaf[index]).astype(np.float64)
        more = [array.mean(), np.sqrt(np.mean(array**2))] if small else []
        found[_name(path)] = [float(x) for x in (*(array[index] if small else array), *more)]
    return found


# ---- programs -----------------------------------------------------------------------------------


def of_program(jaxpr: Any) -> str:
    """A digest of a closed jaxpr: its equations, the programs within them, the constants."""
    known: dict[int, str] = {}

    def of(part: Any) -> str:
        if id(part) not in known:
            known[id(part)] = _of_jaxpr(part, of)
        return known[id(part)]

    return of(jaxpr)


def _of_jaxpr(part: Any, of: Callable[[Any], str]) -> str:
    inner, numbers = getattr(part, "jaxpr", part), {}
    made = hashlib.blake2b(digest_size=16)

    def say(*words: str) -> None:
        made.update("\n".join((*words, "")).encode())

    def place(var: Any) -> str:
        if hasattr(var, "val"):  # a literal
            return f"{var.aval.str_short()} {np.asarray(var.val).tobytes().hex()}"
        return f"{numbers.setdefault(var, len(numbers))} {var.aval.str_short()}"

    consts = [np.asarray(x) for x in getattr(part, "consts", ()) if not isinstance(x, Tracer)]
    say(digest(consts), *map(place, (*inner.constvars, *inner.invars)))
    for eqn in inner.eqns:
        parameters = [f"{name}={_word(eqn.params[name], of)}" for name in sorted(eqn.params)]
        say(eqn.primitive.name, *parameters, *map(place, (*eqn.invars, *eqn.outvars)))
    say(*map(place, inner.outvars))
    return made.hexdigest()


def _word(value: Any, of: Callable[[Any], str]) -> str:
    """A parameter of an equation, without what differs between two processes or two meshes."""
    if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
        return of(value)
    if isinstance(value, tuple | list):
        return f"({', '.join(_word(inner, of) for inner in value)})"
    if isinstance(value, set | frozenset):
        return f"({', '.join(sorted(_word(inner, of) for inner in value))})"
    if isinstance(value, Mapping):
        return f"({', '.join(f'{name}: {_word(value[name], of)}' for name in sorted(value))})"
    if isinstance(value, np.ndarray | jax.Array):
        return digest(value)
    if isinstance(value, FunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, jax.sharding.Sharding | jax.sharding.Mesh | jax.sharding.AbstractMesh):
        return ""
    return re.sub(r" at 0x[0-9a-f]+|id=\d+", "", repr(value))


# ---- what watches -------------------------------------------------------------------------------


def of(watching: Any) -> dict[str, Value]:
    """The fields of a probe or a revision as JSON; those of a plain object by its attributes."""
    if dataclasses.is_dataclass(watching):
        return describe(watching)
    named = watching._asdict() if hasattr(watching, "_asdict") else vars(watching)
    fields = {name: describe(value) for name, value in named.items() if name != "task"}
    return {"kind": type(watching).__name__, **fields}


def describe(value: Any) -> Value:
    """A value of a config or a probe as JSON: dataclasses by field, arrays by digest."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, functools.partial):
        return [describe(value.func), describe(value.args), describe(value.keywords)]
    if isinstance(value, Mapping):
        return {str(name): describe(inner) for name, inner in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f.name for f in dataclasses.fields(value) if f.name not in ("task", "parent")]
        return {"kind": type(value).__name__} | {n: describe(getattr(value, n)) for n in fields}
    if isinstance(value, set | frozenset):
        return sorted((describe(inner) for inner in value), key=str)
    if isinstance(value, tuple | list | range):
        return [describe(inner) for inner in value]
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return digest(value)
    if callable(value):
        return _of_function(value)
    return str(type(value))


def _of_function(function: Any) -> Value:
    """Its name, the object it is a method of, and the numbers, words and arrays it closes over."""
    owner, cells = getattr(function, "__self__", None), getattr(function, "__closure__", None)
    kind = type(function).__qualname__
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', kind)}"
    simple = (bool, int, float, str, np.generic, np.ndarray, jax.Array)
    held = [describe(c.cell_contents) for c in cells or () if isinstance(_inside(c), simple)]
    found = [name, *held] if owner is None else [name, describe(owner)]
    return name if len(found) == 1 else found


def _inside(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return None
