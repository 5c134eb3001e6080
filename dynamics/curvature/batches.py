"""Examples as microbatches, parameters as blocks, and products added up over both."""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh, PartitionSpec

from dynamics import counts
from dynamics import mesh as meshes
from dynamics.curvature.operator import Operator
from dynamics.data.rows import take
from dynamics.types import Batch, Dataset, PyTree

Join = Callable[[PyTree], PyTree]
"""The whole parameters, from those that are free."""
DATA = meshes.AXES[1]
APART = 1e-4  # relative: a loss of two microbatches and the mean of both, by rounding


def cut(arrays: PyTree, size: int | None = None) -> PyTree:
    """Leaves [n, ...] as microbatches [n / size, size, ...]; all in one without ``size``.

    ValueError: leaves of unequal length, or a size that does not divide it.
    """
    lengths = {x.shape[0] for x in jax.tree.leaves(arrays)}
    if len(lengths) != 1:
        raise ValueError(f"arrays must have one length, the examples, got {sorted(lengths)}")
    n = lengths.pop()
    b = n if size is None else size
    if not 0 < b <= n or n % b:
        sizes = [d for d in range(1, n + 1) if n % d == 0]
        near = sorted(sorted(sizes, key=lambda d: abs(d - b))[:2])
        raise ValueError(
            f"size must divide the {n} examples, got {size}: {' and '.join(map(str, near))} do "
            "(cut_dataset pads with examples of weight 0)"
        )
    return jax.tree.map(lambda x: x.reshape(n // b, b, *x.shape[1:]), arrays)


def cut_dataset(data: Dataset, size: int | None = None) -> Batch:
    """A dataset, normalised, as microbatches [ceil(n / size), size, ...]; all in one without it.

    Where ``size`` does not divide n, the last one is filled up with copies of the first example of
    weight 0, and the others weigh ceil(n / size) size / n, so that the mean of
    ``mean(batch.weight * loss)`` over the microbatches is the mean over the examples.

    ValueError: a size that is not 1 to n.
    """
    batch = take(jax.tree.map(jnp.asarray, data), slice(None))
    n = len(batch.index)
    size = n if size is None else size
    counts.check(size=size)
    if size > n:
        raise ValueError(f"size must be at most the {n} examples, got {size}")
    if n % size == 0:
        return cut(batch, size)
    short = -n % size
    rows = jnp.concatenate([jnp.arange(n), jnp.zeros(short, jnp.int32)])
    weight = jnp.where(jnp.arange(n + short) < n, jnp.float32((n + short) / n), 0)
    padded = jax.tree.map(lambda x: x[rows], batch)
    return cut(dataclasses.replace(padded, weight=weight), size)


def select(params: PyTree, only: str) -> PyTree:
    """The mask of the leaves in whose path ("block_0/conv_1/kernel") ``only`` is found.

    ``only`` is a regular expression; ValueError: nothing is called so.
    """

    def named(path: tuple, leaf: Any) -> bool:
        return bool(re.search(only, jax.tree_util.keystr(path, simple=True, separator="/")))

    mask = jax.tree_util.tree_map_with_path(named, params)
    if not any(jax.tree.leaves(mask)):
        raise ValueError(f"no parameter's path matches {only!r}")
    return mask


# ---- the mean of a product over microbatches ----------------------------------------------------


def over_batches(
    term: Callable[..., PyTree],
    whole: Callable[..., jax.Array],
    params: PyTree,
    batches: PyTree,
    rest: tuple,
    *,
    mask: PyTree | None,
    unroll: bool,
    mesh: Mesh | None,
    is_mean: bool,
) -> Operator:
    """The mean over microbatches of ``term(join, free, v, batch, rest)``, checked and widened.

    ``whole(params, batch, *rest)`` is the loss behind it, for the checks alone; ``is_mean`` says
    that it is known to be a mean over the examples, so that its numbers need not be looked at.
    """
    params = jax.tree.map(jnp.asarray, params)
    params, batches, rest = jax.tree.map(_wide, (params, batches, rest))
    _check_batches(batches, mesh)
    _check_loss(whole, params, batches, rest)
    if not is_mean:
        _check_mean(whole, params, batches, rest)
    free, fixed, inside = _parts(params, mask)
    data = (free, fixed, inside, batches, rest)
    return Operator(_Mean(term, unroll, mesh), data, free, inside)


@dataclass(frozen=True)
class _Mean:
    term: Callable[..., PyTree]
    unroll: bool
    mesh: Mesh | None

    def __call__(self, data: tuple, v: PyTree) -> PyTree:
        free, fixed, inside, batches, rest = data
        v = v if inside is None else jax.tree.map(jnp.multiply, inside, v)
        fn = self.local if self.mesh is None else self.spread(self.mesh)
        with jax.default_matmul_precision("highest"):
            out = fn(batches, v, free, fixed, rest)
        return out if inside is None else jax.tree.map(jnp.multiply, inside, out)

    def local(self, batches: PyTree, v: PyTree, free: PyTree, fixed: PyTree, rest: tuple) -> PyTree:
        """The mean over the microbatches that are here."""

        def one(batch: PyTree) -> PyTree:
            return self.term(lambda free: _join(free, fixed), free, v, batch, rest)

        m = jax.tree.leaves(batches)[0].shape[0]
        if m == 1 or self.unroll:
            parts = [one(jax.tree.map(lambda x, i=i: x[i], batches)) for i in range(m)]
            out = jax.tree.map(lambda *xs: sum(xs[1:], start=xs[0]), *parts)
        else:

            def add(sums: PyTree, batch: PyTree) -> tuple[PyTree, None]:
                return jax.tree.map(jnp.add, sums, one(batch)), None

            out = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, v), batches)[0]
        return jax.tree.map(lambda x: x / m, out)

    def spread(self, mesh: Mesh) -> Callable[..., PyTree]:
        """``local`` on the examples of each device, and one reduction of what they found."""

        def share(batches: PyTree, *everywhere: PyTree) -> PyTree:
            return jax.lax.pmean(self.local(batches, *everywhere), DATA)

        whole = PartitionSpec()
        return jax.shard_map(
            share,
            mesh=mesh,
            in_specs=(PartitionSpec(None, DATA), whole, whole, whole, whole),
            out_specs=whole,
            axis_names={DATA},
            check_vma=False,
        )


def _parts(params: PyTree, mask: PyTree | None) -> tuple[PyTree, PyTree, PyTree | None]:
    """Free and fixed parameters, each with None where the other has leaves; entries that count."""
    leaves, tree = jax.tree.flatten(params)
    flags = [True] * len(leaves) if mask is None else _flags(mask, params)
    for flag, (path, leaf) in zip(flags, jax.tree_util.tree_leaves_with_path(params), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if jnp.ndim(flag) and jnp.shape(flag) != leaf.shape:
            raise ValueError(f"the mask of {name!r} has shape {jnp.shape(flag)}, not {leaf.shape}")
        if flag is not False and not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"parameter {name!r} is {leaf.dtype}, not floats: mask it out")
    kept = [flag is not False for flag in flags]
    if not any(kept):
        raise ValueError("the mask leaves no parameter")
    free = tree.unflatten([x if k else None for x, k in zip(leaves, kept, strict=True)])
    fixed = tree.unflatten([None if k else x for x, k in zip(leaves, kept, strict=True)])
    if not any(jnp.ndim(flag) for flag in flags):
        return free, fixed, None
    entries = [
        jnp.broadcast_to(jnp.asarray(flag, x.dtype), x.shape) if k else None
        for flag, x, k in zip(flags, leaves, kept, strict=True)
    ]
    return free, fixed, tree.unflatten(entries)


def _flags(mask: PyTree, params: PyTree) -> list[Any]:
    """One flag for each leaf of the parameters: a bool, or an array of them."""
    spread = jax.tree.map(lambda flag, part: jax.tree.map(lambda _: flag, part), mask, params)
    flags = jax.tree.leaves(spread)
    for flag in flags:
        if not isinstance(flag, bool) and str(getattr(flag, "dtype", "")) != "bool":
            raise ValueError(f"a mask has bools and arrays of bools, got {type(flag).__name__}")
    return [bool(flag) if isinstance(flag, bool) else flag for flag in flags]


def _join(free: PyTree, fixed: PyTree) -> PyTree:
    def either(a: Any, b: Any) -> Any:
        return b if a is None else a

    return jax.tree.map(either, free, fixed, is_leaf=lambda x: x is None)


def _wide(x: Any) -> Any:
    """Half precision becomes float32; the rest stays."""
    dtype = getattr(x, "dtype", None)
    narrow = dtype is not None and jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    return x.astype(jnp.float32) if narrow else x


# ---- checks, before anything is compiled --------------------------------------------------------


def _check_batches(batches: PyTree, mesh: Mesh | None) -> None:
    shapes = [x.shape for x in jax.tree.leaves(batches)]
    if not shapes or any(len(s) < 2 for s in shapes) or len({s[:2] for s in shapes}) != 1:
        raise ValueError(
            f"batches must be arrays [microbatches, examples, ...], got shapes {shapes}: cut(...)"
        )
    if mesh is not None and shapes[0][1] % mesh.shape[DATA]:
        raise ValueError(
            f"the microbatch size must be a multiple of the mesh's data axis, {mesh.shape[DATA]}, "
            f"got {shapes[0][1]}"
        )


def _check_loss(
    whole: Callable[..., jax.Array], params: PyTree, batches: PyTree, rest: tuple
) -> None:
    def of_first(params: PyTree, batches: PyTree, rest: tuple) -> Any:
        return whole(params, jax.tree.map(lambda x: x[0], batches), *rest)

    closed, shape = jax.make_jaxpr(of_first, return_shape=True)(params, batches, rest)
    if getattr(shape, "shape", None) != ():
        raise ValueError(f"a loss must return a scalar, the mean over the batch, got {shape}")
    if narrow := _narrow(closed):
        raise ValueError(
            f"the loss computes in {narrow}: its curvature would be off by 1e-3 and not symmetric; "
            "give the loss of the same model in float32 (our models: precision='float32')"
        )


def _check_mean(
    whole: Callable[..., jax.Array], params: PyTree, batches: PyTree, rest: tuple
) -> None:
    """ValueError unless the loss of two microbatches together is the mean of the loss of each.

    A sum over the batch is not, nor is batch norm in training mode: their curvature would depend on
    the size of the microbatches. Nor may a loss leave out the weights of a batch. Not looked at
    where there is one microbatch without weights, where it is traced, or where a process has a part
    alone. Cost: at most four losses of a microbatch.
    """
    leaves = jax.tree.leaves((params, batches, rest))
    if any(_is_unknown(x) for x in leaves):
        return

    @jax.default_matmul_precision("highest")
    def losses(*parts: PyTree) -> list[float] | None:
        found = [whole(params, batch, *rest) for batch in parts]
        return None if any(map(_is_unknown, found)) else list(map(float, found))

    first, weight = jax.tree.map(lambda x: x[0], batches), getattr(batches, "weight", None)
    if weight is not None:
        unweighted = losses(dataclasses.replace(first, weight=0 * weight[0]))
        if unweighted not in (None, [0]):
            raise ValueError(
                "the loss must be the mean of batch.weight times the loss of an example, got one "
                "that is not 0 where all weights are"
            )
    if len(jax.tree.leaves(batches)[0]) < 2:
        return
    both = jax.tree.map(lambda x: x[:2].reshape(-1, *x.shape[2:]), batches)
    found = losses(both, first, jax.tree.map(lambda x: x[1], batches))
    if found is None:
        return
    together, *each = found
    if abs(together - sum(each) / 2) > APART * sum(map(abs, each)) / 2:
        raise ValueError(
            f"a loss must be the mean over the examples of a batch, got {together:.6g} of two "
            f"microbatches together and {sum(each) / 2:.6g} as the mean of both: a sum, or batch "
            "norm in training mode, has another curvature in microbatches of another size"
        )


def _is_unknown(x: Any) -> bool:
    """Whether this process has no numbers of an array."""
    return isinstance(x, Tracer) or not getattr(x, "is_fully_addressable", True)


def _narrow(jaxpr: Any) -> str:
    """The first half-precision type that something in a (closed) jaxpr has."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        for out in eqn.outvars:
            dtype = getattr(out.aval, "dtype", None)
            if dtype is not None and jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4:
                return str(dtype)
        for inner in jaxprs_in_params(eqn.params):
            if found := _narrow(inner):
                return found
    return ""
