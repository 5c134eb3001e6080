"""How a step gets its batch: from the device if the data fit there, else from the host.

Both make the same batches: which examples is ``order``'s business alone. ``sampled`` draws them
with replacement instead, ``whole`` takes all of them at every step.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from dynamics import counts
from dynamics.calls import Call
from dynamics.data.files import DataError
from dynamics.data.order import batch_rows
from dynamics.data.rows import (
    as_labels,
    checked,
    class_range,
    label_type,
    normalise,
    numbered,
    seen,
    take,
)
from dynamics.types import AUGMENT, NEVER, ORDER, Batch, Dataset, Key, PyTree, Stream

Augment = Callable[[Key, jax.Array], jax.Array]

RESIDENT_BYTES = 4 * 2**30  # of inputs, a copy for each device, in one memory
EVERYTHING = slice(None), slice(None)  # replicas and examples of a batch
CELL = 2**31  # probabilities are multiples of 1 / (n CELL)


def stream(data: Dataset, batch_size: int, keys: Shaped[Array, "k"], **options: Any) -> Stream:
    """``resident`` if the inputs are at most RESIDENT_BYTES, else ``streamed``; same options."""
    copies = len(jax.local_devices()) if jax.default_backend() == "cpu" else 1  # share one memory
    if data.x.nbytes * copies <= RESIDENT_BYTES:
        return resident(data, batch_size, len(keys), **options)
    return streamed(data, batch_size, keys, **options)


def resident(
    data: Dataset,
    batch_size: int,
    num_replicas: int,
    *,
    rows: Int[np.ndarray, "k m"] | None = None,
    sizes: Int[np.ndarray, "k"] | None = None,
    labels: Shaped[np.ndarray, "k n ..."] | None = None,
    augment: Augment | None = None,
) -> Stream:
    """A stream from data that lies on the device as stored and is normalised in the step.

    Replica s trains on the first ``sizes[s]`` of its ``rows[s]`` (all examples if None), with its
    own ``labels[s]`` if given; both count the examples of ``data``, while the batch's ``index`` is
    their ``data.row``, which differs in a ``subset``. ``augment(key, x)`` gets the normalised
    batch.
    ValueError: shapes that don't fit, rows out of range or repeated, a batch larger than a subset.
    """
    own = _own(data, batch_size, num_replicas, rows, sizes, labels)
    batch = Call(_resident, (batch_size, augment))
    known = class_range(own.get("labels", data.y))
    return Stream(batch, data, own, batch_size, num_examples=numbered(data), classes=known)


def _resident(
    batch_size: int,
    augment: Augment | None,
    shared: Dataset,
    own: PyTree,
    fed: PyTree,
    key: Key,
    step: jax.Array,
) -> Batch:
    where = batch_rows(key, step, own["size"], batch_size)
    at = own["rows"][where] if "rows" in own else where
    return _augmented(take(shared, at, own.get("labels")), augment, key, step)


def streamed(
    data: Dataset,
    batch_size: int,
    keys: Shaped[Array, "k"],
    *,
    rows: Int[np.ndarray, "k m"] | None = None,
    sizes: Int[np.ndarray, "k"] | None = None,
    labels: Shaped[np.ndarray, "k n ..."] | None = None,
    augment: Augment | None = None,
    num_threads: int = 4,
) -> Stream:
    """The same stream from data that stay on the host (a numpy memory map, say), through grain.

    ``keys`` are the state's root keys; the batches equal those of ``resident``. grain fetches ahead
    with ``num_threads`` threads; only the batches travel to the device, as stored, and of several
    processes each reads its own part of them.
    """
    try:
        import grain
    except ModuleNotFoundError as error:
        raise DataError(
            "data are read from the host through grain, which is not installed: "
            "pip install 'training-dynamics[data]'"
        ) from error
    own = _own(data, batch_size, len(keys), rows, sizes, labels)
    host_own, row = jax.tree.map(np.asarray, own), np.asarray(data.row)
    cpu = jax.local_devices(backend="cpu")[0]
    host_keys, impl = jax.device_put(jax.random.key_data(keys), cpu), jax.random.key_impl(keys)

    @jax.jit
    def positions(data: jax.Array, size: jax.Array, step: jax.Array) -> jax.Array:
        keys = jax.random.wrap_key_data(data, impl=impl)
        return jax.vmap(lambda k, n: batch_rows(k, step, n, batch_size))(keys, size)

    def fetch(step: int, replicas: slice, examples: slice) -> PyTree:
        with jax.default_device(cpu):
            where = np.asarray(positions(host_keys, host_own["size"], np.int32(step)))
        mine = {name: value[replicas] for name, value in host_own.items()}
        where = where[replicas, examples]
        if "rows" in mine:
            where = np.take_along_axis(mine["rows"], where, axis=1)
        y = data.y[where]
        if "labels" in mine:
            y = np.stack([y[w] for y, w in zip(mine["labels"], where, strict=True)])
        return {"x": data.x[where], "y": y.astype(label_type(y.dtype)), "row": row[where]}

    def host(
        first: int, part: tuple[slice, slice] = (slice(None), slice(None))
    ) -> Iterator[PyTree]:
        steps = grain.MapDataset.range(first, NEVER).map(lambda t: fetch(int(t), *part))
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
        return iter(steps.to_iter_dataset(options))

    shared = {"mean": jnp.asarray(data.mean), "std": jnp.asarray(data.std)}
    own = {"size": own["size"]}
    batch, known = Call(_streamed, (augment,)), class_range(host_own.get("labels", data.y))
    return Stream(batch, shared, own, batch_size, host, len(data), known)


def _streamed(
    augment: Augment | None, shared: PyTree, own: PyTree, fed: PyTree, key: Key, step: jax.Array
) -> Batch:
    return _augmented(seen(**fed, **shared), augment, key, step)


def sampled(
    data: Dataset,
    batch_size: int,
    num_replicas: int,
    probabilities: Float[np.ndarray, "k n"],
    *,
    labels: Shaped[np.ndarray, "k n ..."] | None = None,
    augment: Augment | None = None,
) -> Stream:
    """A stream like ``resident``'s whose examples are drawn with replacement, in proportion.

    Replica s draws example i with p_i = ``probabilities[s, i]``, never if that is 0, and gives it
    the weight 1 / (n p_i): the mean of a batch's weighted losses is in expectation (1 / n) times
    the sum over all examples with p > 0. An example may be twice in a batch.

    The p_i are rounded to multiples of 2^-31 / n, those that are not 0 to at least one, and the
    weights are those of the rounded; a uniform row has weights of exactly 1. Cost: two random words
    and two look-ups an example, 12 n bytes a replica, and on the host a loop over n for each
    replica (0.02 s for 60,000). ValueError: rows that are no probabilities, and what ``resident``
    refuses.

    Reference: Walker 1977, "An efficient method for generating discrete random variables with
    general distributions"; Vose 1991 for making the table in O(n), here in integers.
    """
    own = _own(data, batch_size, num_replicas, None, None, labels)
    own = {name: value for name, value in own.items() if name == "labels"}
    units = [_units(p) for p in _distributions(probabilities, num_replicas, len(data))]
    keep, other = zip(*map(_alias, units), strict=True)
    weight = [np.divide(CELL, u, out=np.zeros(len(u)), where=u > 0) for u in units]
    own |= {"keep": np.stack(keep), "other": np.stack(other)}
    own["weight"] = np.stack(weight).astype(np.float32)
    batch = Call(_sampled, (batch_size, augment))
    known = class_range(own.get("labels", data.y))
    return Stream(batch, data, own, batch_size, num_examples=numbered(data), classes=known)


def _sampled(
    batch_size: int,
    augment: Augment | None,
    shared: Dataset,
    own: PyTree,
    fed: PyTree,
    key: Key,
    step: jax.Array,
) -> Batch:
    drawn = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, ORDER), step))
    cell = jax.random.randint(drawn[0], (batch_size,), 0, len(shared))
    coin = jax.random.bits(drawn[1], (batch_size,), jnp.uint32) >> 1  # 0..CELL - 1
    at = jnp.where(coin < own["keep"][cell], cell, own["other"][cell])
    found = take(shared, at, own.get("labels"))
    found = dataclasses.replace(found, weight=own["weight"][at])
    return _augmented(found, augment, key, step)


def doubled(stream: Stream) -> Stream:
    """Two batches a step, each in an order of its own, entry by entry in turns.

    Entry 2 i is the first's i-th, entry 2 i + 1 the second's: for a task that trains two networks
    on data in different orders. An example may be in both. ValueError: a stream from the host.
    """
    if stream.host is not None:
        raise ValueError("doubled needs data that lie on the device: use data.stream.resident")

    return stream._replace(batch=Call(_doubled, (stream.batch,)), batch_size=2 * stream.batch_size)


def _doubled(
    one: Callable[..., Batch], shared: PyTree, own: PyTree, fed: PyTree, key: Key, step: jax.Array
) -> Batch:
    keys = [jax.random.fold_in(key, k) for k in range(2)]
    two = [one(shared, own, fed, k, step) for k in keys]
    weave = lambda a, b: jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])  # noqa: E731
    return jax.tree.map(weave, *two)


def whole(
    data: Dataset,
    num_replicas: int,
    *,
    inputs: Shaped[np.ndarray, "k n ..."] | None = None,
    labels: Shaped[np.ndarray, "k n ..."] | None = None,
) -> Stream:
    """Full-batch gradient descent: all examples at every step, in their order.

    Replica s may have its own ``inputs[s]`` (as stored, in place of ``data.x``) and ``labels[s]``;
    what is shared lies on the device once, and under ``vmap`` a product of shared inputs with every
    replica's weights is one matrix product. Cost: inputs are normalised once, here, and lie there
    as float32 (tokens: int32), as they do in any step. ValueError: shapes that don't fit.
    """
    own: dict[str, Any] = {}
    n = checked(data)
    given = {"inputs": (inputs, data.x.shape), "labels": (labels, data.y.shape)}
    for name, (array, shape) in given.items():
        if array is not None and array.shape != (num_replicas, *shape):
            raise ValueError(f"{name} must have shape {(num_replicas, *shape)}, got {array.shape}")
    mean, std = jnp.asarray(data.mean), jnp.asarray(data.std)
    shared = {"y": jnp.asarray(as_labels(data.y)), "index": jnp.asarray(data.row, jnp.int32)}
    if inputs is None:
        shared["x"] = normalise(jnp.asarray(data.x), mean, std)
    else:
        own["x"] = jnp.stack([normalise(jnp.asarray(x), mean, std) for x in inputs])
    if labels is not None:
        own["y"] = as_labels(labels, data.y.dtype)
    known = class_range(own.get("y", data.y))
    return Stream(_whole, shared, own, n, num_examples=numbered(data), classes=known)


def _whole(shared: PyTree, own: PyTree, fed: PyTree, key: Key, step: jax.Array) -> Batch:
    return Batch(**{**shared, **own})


def _distributions(probabilities: np.ndarray, k: int, n: int) -> np.ndarray:
    """Checked, in float64."""
    if probabilities.shape != (k, n):
        raise ValueError(
            f"probabilities must have shape {(k, n)}, a row for each member, got "
            f"{probabilities.shape}"
        )
    p = probabilities.astype(np.float64)
    for s, row in enumerate(p):
        if not (np.isfinite(row).all() and row.min() >= 0 and abs(row.sum() - 1) < 1e-4):
            raise ValueError(
                f"probabilities of member {s} must be >= 0 and sum to 1, got {row.min():g} to "
                f"{row.max():g} with sum {row.sum():g}: divide them by their sum"
            )
    return p


def _units(p: np.ndarray) -> np.ndarray:
    """Probabilities [n] in units of 1 / (n CELL): i64[n], whose sum is exactly n CELL."""
    total = len(p) * CELL
    units = np.maximum(np.rint(p / p.sum() * total), p > 0).astype(np.int64)
    units[units.argmax()] += total - units.sum()
    return units


def _alias(units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One cell of CELL units an example: ``keep[i]`` of them are i's, the rest ``other[i]``'s."""
    keep, other = units.tolist(), list(range(len(units)))
    small = np.flatnonzero(units < CELL).tolist()
    large = np.flatnonzero(units >= CELL).tolist()
    while small:  # the cells not yet done are full on average, so one of them is large
        i, j = small.pop(), large[-1]
        other[i] = j
        keep[j] -= CELL - keep[i]
        if keep[j] < CELL:
            small.append(large.pop())
    return np.array(keep, np.uint32), np.array(other, np.int32)


def _augmented(batch: Batch, augment: Augment | None, key: Key, step: jax.Array) -> Batch:
    if augment is None:
        return batch
    key = jax.random.fold_in(jax.random.fold_in(key, AUGMENT), step)
    return dataclasses.replace(batch, x=augment(key, batch.x))


def _own(
    data: Dataset,
    batch_size: int,
    num_replicas: int,
    rows: np.ndarray | None,
    sizes: np.ndarray | None,
    labels: np.ndarray | None,
) -> dict[str, np.ndarray]:
    """What differs between replicas, checked."""
    counts.check(batch_size=batch_size, num_replicas=num_replicas)
    k, n = num_replicas, checked(data)
    rows, sizes, labels = (None if x is None else np.asarray(x) for x in (rows, sizes, labels))
    if rows is not None and rows.ndim != 2:
        raise ValueError(f"rows must be [{k}, m], one row for each member, got {rows.shape}")
    if rows is None:
        sizes = np.full(k, n) if sizes is None else sizes
    elif sizes is None:
        sizes = np.full(k, rows.shape[1])
    own = {"size": np.asarray(sizes, np.int32)}
    if own["size"].shape != (k,) or own["size"].min() < 1:
        raise ValueError(f"sizes must be {k} positive numbers, one for each member, got {sizes}")
    if rows is not None:
        if not np.issubdtype(rows.dtype, np.integer):
            raise ValueError(f"rows must be integers, positions in the data, got {rows.dtype}")
        if rows.shape[0] != k:
            raise ValueError(f"rows must have one row for each of {k} members, got {rows.shape}")
        for s, (r, m) in enumerate(zip(rows, own["size"], strict=True)):
            if m > len(r) or len(np.unique(r[:m])) < m or r[:m].min() < 0 or r[:m].max() >= n:
                raise ValueError(
                    f"rows of member {s} must be {m} different examples of 0..{n - 1}, got "
                    f"{len(np.unique(r[:m]))} different ones in {r[:m].min()}..{r[:m].max()}"
                )
        own["rows"] = np.asarray(rows, np.int32)
    elif own["size"].max() > n:
        raise ValueError(f"sizes must be at most {n} examples, got {own['size'].max()}")
    if labels is not None:
        if labels.shape != (k, *data.y.shape):
            raise ValueError(f"labels must have shape {(k, *data.y.shape)}, got {labels.shape}")
        own["labels"] = as_labels(labels, data.y.dtype)
    if not 1 <= batch_size <= own["size"].min():
        raise ValueError(
            f"batch_size must be at most {own['size'].min()}, the examples of the smallest subset, "
            f"got {batch_size}: keep more examples or take smaller batches"
        )
    return own
