"""The ways to use a weight, as equations of a jaxpr show them.

A value is *made of* a weight if it holds the weight's entries and nothing else, moved and scaled; a
*use* is an equation in which such a value meets something that depends on the example, or becomes
smaller. At a use that is a product, a convolution or a lookup, the derivative by an added tap and
the other operand say everything about the weight's gradient.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp

CONSTANT, EXAMPLE = "constant", "example"  # does not depend on params / depends on the example

SAME = ("convert_element_type", "copy", "reduce_precision", "sharding_constraint", "copy_p")
RESHAPED = ("reshape", "squeeze", "expand_dims", "broadcast_in_dim")


class Weight(NamedTuple):
    """A value made of one leaf. ``axes``: the leaf's axis behind each of its own, or None if it
    was reshaped; ``history`` tells apart values that hold the same entries in other places.
    """

    leaf: int
    axes: tuple[int, ...] | None
    history: tuple
    factor: Any


class Mixed(NamedTuple):
    """A value that depends on these leaves in any other way, by an equation of this name."""

    leaves: frozenset[int]
    by: str


class Product(NamedTuple):
    """A use in a dot_general: the axes (of the weight, of the other operand) by their role."""

    weight_first: bool
    rows: tuple[tuple[int, ...], tuple[int, ...]]  # summed over
    groups: tuple[tuple[int, ...], tuple[int, ...]]  # in step with one another
    left: tuple[tuple[int, ...], tuple[int, ...]]  # columns of the weight, positions of the other


class Convolution(NamedTuple):
    """A use as the kernel of a convolution."""

    lhs: tuple[int, ...]
    rhs: tuple[int, ...]
    out: tuple[int, ...]
    kernel: tuple[int, ...]  # spatial
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int


class Lookup(NamedTuple):
    """A use as a table whose rows are taken."""

    rows: int
    column: int  # of the other operand's last axis: where the row is written
    clipped: bool  # an index outside is the last row's; else it has no row


class Site(NamedTuple):
    """One use: its place in the walk, the weight there, what kind, and the shape of its result.

    In loops the place is one number for each, and the shape begins with their lengths; ``loops``
    tells of each, outermost first, whether the weight there is another slice in each round.
    """

    number: tuple[int, ...]
    weight: Weight
    kind: Product | Convolution | Lookup
    shape: tuple[int, ...]
    dtype: Any
    loops: tuple[bool, ...] = ()


def moved(eqn: Any, values: list[Any], origins: list[Any], ours: list[int]) -> Weight | Mixed:
    """Where the result of an equation comes from that no example enters."""
    name, weight = eqn.primitive.name, origins[ours[0]]
    simple = len(ours) == 1 and isinstance(weight, Weight)
    if simple and len(origins) == 1:
        shape = eqn.outvars[0].aval.shape
        if name in SAME and jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
            return weight
        if name == "neg":
            return weight._replace(factor=-weight.factor)
        if name == "transpose":
            order = eqn.params["permutation"]
            axes = None if weight.axes is None else tuple(weight.axes[i] for i in order)
            return weight._replace(axes=axes, history=(*weight.history, ("transpose", order)))
        if name in RESHAPED and math.prod(shape) == math.prod(eqn.invars[0].aval.shape):
            same = shape == eqn.invars[0].aval.shape
            step = (*weight.history, (name, shape))
            return weight if same else weight._replace(axes=None, history=step)
    if simple and len(origins) == 2 and name in ("mul", "div"):
        at, other = ours[0], values[1 - ours[0]]
        if jnp.ndim(other) == 0 and (name == "mul" or at == 0):
            by = jnp.asarray(other, jnp.float32)
            return weight._replace(factor=weight.factor * (by if name == "mul" else 1 / by))
    leaves = [{o.leaf} if isinstance(o, Weight) else o.leaves for o in (origins[i] for i in ours)]
    return Mixed(frozenset().union(*leaves), name)


def kind_of(eqn: Any, origins: list[Any], ours: list[int]) -> Product | Convolution | Lookup | None:
    """How the one weight of an equation is used, if in a way whose gradient factorises."""
    name, at = eqn.primitive.name, ours[0]
    if len(ours) > 1 or not isinstance(origins[at], Weight) or len(origins) != 2:
        return None
    if name == "dot_general":
        contracted, groups = eqn.params["dimension_numbers"]
        axes = [range(v.aval.ndim) for v in eqn.invars]
        left = [
            tuple(i for i in axes[j] if i not in contracted[j] and i not in groups[j])
            for j in (0, 1)
        ]

        def ordered(pair: Any) -> Any:
            return tuple(pair[at]), tuple(pair[1 - at])

        return Product(at == 0, ordered(contracted), ordered(groups), ordered(left))
    if name == "conv_general_dilated" and at == 1 and eqn.params["batch_group_count"] == 1:
        p, d = eqn.params, eqn.params["dimension_numbers"]
        kernel = tuple(eqn.invars[1].aval.shape[i] for i in d.rhs_spec[2:])
        return Convolution(
            *(tuple(d.lhs_spec), tuple(d.rhs_spec), tuple(d.out_spec), kernel),
            *(tuple(p["window_strides"]), tuple(map(tuple, p["padding"]))),
            *(tuple(p["lhs_dilation"]), tuple(p["rhs_dilation"]), p["feature_group_count"]),
        )
    if name == "gather" and at == 0:
        sliced = any(step[0] == "slice" for step in origins[0].history)
        return None if sliced else _lookup(eqn)
    return None


def _lookup(eqn: Any) -> Lookup | None:
    """What a gather takes, if that is whole rows of its operand, side by side."""
    d, shape = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
    clipped = "CLIP" in str(eqn.params["mode"]).upper()  # also moves whole axes back to 0
    by_row = 0 in d.start_index_map and (clipped or d.start_index_map == (0,))
    whole = tuple(eqn.params["slice_sizes"]) == (1, *shape[1:]) and not d.operand_batching_dims
    ndim = eqn.outvars[0].aval.ndim
    taken = len(shape) - len(d.collapsed_slice_dims)
    last = d.offset_dims == tuple(range(ndim - taken, ndim))
    if by_row and whole and last and d.collapsed_slice_dims in ((), (0,)):
        return Lookup(shape[0], d.start_index_map.index(0), clipped)
    return None
