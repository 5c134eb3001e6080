"""Trees as leaves by name, and back: what a checkpoint says of the trees in it."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynamics.types import PyTree


def named(tree: PyTree) -> dict[str, Any]:
    """Path -> leaf; no two paths have one name."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def data(leaf: Any) -> Any:
    """What is stored of a leaf: of a PRNG key the integers it is made of."""
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        made = jax.eval_shape(jax.random.key_data, leaf)
        return jax.ShapeDtypeStruct(made.shape, made.dtype, sharding=leaf.sharding)
    return jax.random.key_data(leaf)


def kind(leaf: Any) -> str:
    """The type and shape of a leaf in words."""
    return f"{leaf.dtype}{list(leaf.shape)}"


def about(tree: PyTree) -> dict[str, Any]:
    """What is said of a tree beside its leaves, as a JSON value.

    ``leaves``: the type and shape of each; ``data``: those of what is stored of it, and which kind
    of key it is, if it is one; ``structure``: the containers they are in.
    """
    leaves = named(tree)
    stored = {}
    for name, leaf in leaves.items():
        key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        impl = str(jax.random.key_impl(leaf)) if key else None
        made = data(leaf)
        stored[name] = [str(made.dtype), list(made.shape), impl]
    kinds = {name: kind(leaf) for name, leaf in leaves.items()}
    return {"leaves": kinds, "data": stored, "structure": structure(tree)}


def structure(tree: PyTree, path: tuple[Any, ...] = ()) -> Any:
    """The containers of a tree as a JSON value: names of leaves in dict, tuple, list or fields."""
    if tree is None:
        return None
    inside = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)[0]
    if inside and not inside[0][0]:
        return _name(path)
    parts = [[_part(key[0]), structure(inner, (*path, *key))] for key, inner in inside]
    if isinstance(tree, Mapping):
        return {"dict": parts}
    if isinstance(tree, tuple) and not hasattr(tree, "_fields"):
        return {"tuple": parts}
    return {"list" if isinstance(tree, list) else "fields": parts}


def built(structure: Any, leaves: Mapping[str, Any]) -> Any:
    """The tree of a structure; what is neither dict, tuple nor list is a dict of its fields."""
    if structure is None:
        return None
    if isinstance(structure, str):
        return leaves[structure]
    ((container, parts),) = structure.items()
    inside = {name: built(inner, leaves) for name, inner in parts}
    sequence: dict[str, Callable[..., Any]] = {"tuple": tuple, "list": list}
    return sequence[container](inside.values()) if container in sequence else inside


def like(tree: PyTree, leaves: Mapping[str, Any], impls: Mapping[str, str | None]) -> PyTree:
    """Restored leaves in the structure of a tree, keys as keys."""
    names = list(named(tree))
    return jax.tree.unflatten(
        jax.tree.structure(tree), [as_saved(leaves[name], impls[name]) for name in names]
    )


def as_saved(leaf: Any, impl: str | None) -> Any:
    """A stored leaf as the key that it is of, if it is of one."""
    return leaf if impl is None else jax.random.wrap_key_data(leaf, impl=impl)


def difference(item: str, stored: Mapping[str, str], wanted: Mapping[str, str]) -> str | None:
    """The first leaf that is another or absent, in words."""
    for name in [*wanted, *stored]:
        if stored.get(name) != wanted.get(name):
            return (
                f"{item}.{name} is {stored.get(name, 'absent')} there and "
                f"{wanted.get(name, 'absent')} here"
            )
    return None


def here(stored: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Where leaves may be put without knowing where they lay: this process's first device."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {
        name: jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), sharding=device)
        for name, (dtype, shape, _) in stored.items()
    }


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape, type and place of what is stored of a leaf."""
    leaf = data(leaf)
    sharding = leaf.sharding if hasattr(leaf, "sharding") else None
    if sharding is None and isinstance(leaf, np.ndarray):
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _part(key: Any) -> Any:
    """A dict's key, an attribute's name, a place in a sequence."""
    return next(getattr(key, n) for n in ("name", "key", "idx") if hasattr(key, n))


def _name(path: tuple[Any, ...]) -> str:
    """Parts joined by dots; a dot or slash within one is written as in an address."""
    parts = [str(_part(key)) for key in path]
    for sign, written in (("%", "%25"), (".", "%2E"), ("/", "%2F")):
        parts = [part.replace(sign, written) for part in parts]
    return ".".join(part or "%" for part in parts) if parts else "leaf"
