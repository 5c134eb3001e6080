"""Per-example gradients in factored form: their norms and inner products, not the gradients.

A weight W used as x W has for one example the gradient sum_t a_t d_t^T, a the rows of x (patches of
them for a convolution, one-hot rows for a lookup), d the derivatives of the loss by x W. With
A [T, m] and D [T, n]

    ||A^T D||^2 = <A A^T, D D^T>,     <A^T D, A'^T D'> = <A A'^T, D D'^T>

so the gradient [m, n] need never be made ("ghost norms"); where T is large it is cheaper to make
it, and the cheaper way is chosen for each weight. Several uses of one weight are rows of one A and
one D, cross terms included.

Reference: Goodfellow 2015, arXiv 1510.01799 (dense layers); Li et al. 2022, arXiv 2110.05679,
section 4 (sequences); Bu et al. 2022, arXiv 2205.10683 (convolutions, the mixed choice).
"""

import logging
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dynamics.ghost.uses import (
    CONSTANT,
    EXAMPLE,
    Convolution,
    Lookup,
    Product,
    Site,
    Weight,
)
from dynamics.ghost.walk import Walk, live
from dynamics.types import Leaf, PyTree

log = logging.getLogger(__name__)

LossOfOne = Callable[[PyTree, PyTree, PyTree], jax.Array]


@struct.dataclass
class Part:
    """One use of a weight, for B examples: the rows of its A and D."""

    a: Leaf  # the other operand as the equation had it: [B, ...]
    d: Leaf  # derivative of the loss by the result, times the weight's factor: [B, ...]
    kind: Product | Convolution | Lookup = struct.field(pytree_node=False)
    swapped: bool = struct.field(pytree_node=False, default=False)
    loops: tuple[bool, ...] = struct.field(pytree_node=False, default=())  # as of ``Site``: axes


@struct.dataclass
class Factors:
    """The gradients of B examples: for each leaf of the parameters its uses, or the gradient."""

    parts: dict[str, tuple[Part, ...]]
    gradients: dict[str, Leaf]  # [B, *leaf], or [B, 0] where the loss does not use the leaf


def factors(
    loss: LossOfOne, params: PyTree, shared: PyTree, examples: PyTree, *, only: str = ""
) -> Factors:
    """The gradients of ``loss(params, shared, example)`` by ``params``, for each of B examples.

    ``examples`` has leaves [B, ...]; ``loss`` is of one of them, without that axis, so none can
    depend on another. ``only`` is a regular expression: leaves whose path ("head/kernel") it is
    not found in are left out, as are leaves that are not floating. Weights that enter only products
    (dense layers, attention projections), convolutions and lookups are factored, also in loops of a
    fixed length (``scan``); the gradients of all others are made for each example: cheap for
    biases, norms and positions; otherwise a warning names them.

    Cost: one forward and one backward pass without the gradients of factored weights.
    ValueError: no floating leaf is called ``only``, or a leaf is complex.
    """
    names, origins = _chosen(params, only)
    leaves = jax.tree.leaves(params)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), examples)
    closed = jax.make_jaxpr(loss)(params, shared, one)
    jaxpr, inputs = live(closed), list(origins)
    inputs += [CONSTANT] * len(jax.tree.leaves(shared)) + [EXAMPLE] * len(jax.tree.leaves(one))

    def walked(walk: Walk, values: list[Any]) -> tuple[Any, Any]:
        (value,), (origin,) = walk.run(jaxpr, closed.consts, values, inputs)
        return value, origin

    sites, direct = _plan(walked, (leaves, shared, one), names, leaves)

    def tapped(taps: dict, own: dict, example: PyTree) -> tuple[jax.Array, dict]:
        walk, mine = Walk(taps), [own.get(i, leaf) for i, leaf in enumerate(leaves)]
        value, _ = walked(walk, [*mine, *jax.tree.leaves((shared, example))])
        return value, walk.captured

    taps = {site.number: jnp.zeros(site.shape, site.dtype) for site in sites}
    own = {i: leaves[i] for i in direct}
    gradient = jax.vmap(jax.grad(tapped, argnums=(0, 1), has_aux=True), in_axes=(None, None, 0))
    (deltas, gradients), captured = gradient(taps, own, examples)
    unused = {i for i, origin in enumerate(origins) if origin is not CONSTANT} - {*direct}
    unused -= {site.weight.leaf for site in sites}
    gradients |= dict.fromkeys(unused, jnp.zeros((len(jax.tree.leaves(examples)[0]), 0)))
    return _collected(sites, names, deltas, gradients, captured)


# What is factored


def _chosen(params: PyTree, only: str) -> tuple[list[str], list[Any]]:
    """The paths of the leaves, and what each is: a weight, or constant if it is not asked for."""
    names, origins = [], []
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
        names.append(jax.tree_util.keystr(path, simple=True, separator="/"))
        dtype = jax.dtypes.result_type(leaf)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise ValueError(f"parameters must be real, got {names[-1]!r} of {dtype}")
        ours = re.search(only, names[-1]) and jnp.issubdtype(dtype, jnp.floating)
        origins.append(Weight(i, tuple(range(jnp.ndim(leaf))), (), 1.0) if ours else CONSTANT)
    if all(origin is CONSTANT for origin in origins):
        raise ValueError(f"no parameter has {only!r} in its path; there are {names}")
    return names, origins


def _plan(
    walked: Callable[..., Any], args: PyTree, names: list[str], leaves: Sequence[Any]
) -> tuple[list[Site], list[int]]:
    """The sites whose weights are factored, and the leaves that are not."""
    walk = Walk()

    def noted(args: PyTree) -> Any:
        value, origin = walked(walk, jax.tree.leaves(args))
        walk.note("the loss", origin)
        return value

    jax.eval_shape(noted, args)
    direct = dict(walk.direct)
    by_leaf: dict[int, list[Site]] = {}
    for site in walk.sites:
        by_leaf.setdefault(site.weight.leaf, []).append(site)
    for leaf, sites in by_leaf.items():
        if leaf not in direct and len({_layout(site) for site in sites}) > 1:
            direct[leaf] = "it is used in shapes that do not match"
    for leaf, reason in direct.items():
        if reason or leaf in by_leaf:
            log.warning(
                "the gradients of parameter %r %s are made for each example, %.3g MB each: %s",
                *(names[leaf], list(jnp.shape(leaves[leaf])), 4e-6 * jnp.size(leaves[leaf])),
                reason or "it is also used elementwise",
            )
    sites = [s for s in walk.sites if s.weight.leaf not in direct and math.prod(s.shape)]
    return sites, sorted(direct)


def _layout(site: Site) -> Any:
    """Equal for sites whose rows and columns are the same axes of the leaf, either way round."""
    weight, kind = site.weight, site.kind
    if isinstance(kind, Convolution):
        return (weight.history, kind.rhs, kind.kernel, kind.groups)
    if isinstance(kind, Lookup):
        rows, columns, groups = (0,), tuple(range(1, len(weight.axes or (0,)))), ()
    else:
        rows, columns, groups = kind.rows[0], kind.left[0], kind.groups[0]
    if weight.axes is None:
        return (weight.history, rows, columns, groups)
    rows, columns, groups = (tuple(weight.axes[i] for i in s) for s in (rows, columns, groups))
    slices = tuple(step[2] for step in weight.history if step[0] == "slice")
    return frozenset((rows, columns)), slices + groups


def _collected(
    sites: Sequence[Site],
    names: list[str],
    deltas: dict,
    gradients: dict,
    captured: dict,
) -> Factors:
    """What the backward pass found, by leaf."""
    parts: dict[str, tuple[Part, ...]] = {}
    first: dict[int, Any] = {}
    for site in sites:
        rows = _oriented(site)
        swapped = rows != first.setdefault(site.weight.leaf, rows)
        a, scale = captured[site.number]
        d = deltas[site.number].astype(jnp.float32)
        d = d * scale.reshape(*scale.shape, *(1,) * (d.ndim - scale.ndim))
        part = Part(a, d, site.kind, swapped, site.loops)
        name = names[site.weight.leaf]
        parts[name] = (*parts.get(name, ()), part)
    return Factors(parts, {names[leaf]: g for leaf, g in gradients.items()})


def _oriented(site: Site) -> Any:
    """The leaf's axes that are rows of A, where that is known."""
    weight, kind = site.weight, site.kind
    if isinstance(kind, Convolution) or weight.axes is None:
        return None
    rows = (0,) if isinstance(kind, Lookup) else kind.rows[0]
    return tuple(weight.axes[i] for i in rows)
