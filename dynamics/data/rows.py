"""Examples by their positions: a part of a dataset, and the batch that a step sees."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped
from numpy.typing import ArrayLike

from dynamics.types import IGNORED, Batch, Dataset, Leaf


def subset(data: Dataset, positions: np.ndarray | slice) -> Dataset:
    """The examples at these positions of ``data``, as a dataset: ``row`` and ``file_row`` follow.

    ``positions`` count in ``data`` itself, from 0, in the order asked for: integers, a mask of
    bools, or a slice. So do the labels of a stream or a probe that is given a part: one for each
    example of that part. What is measured is found under ``row``. ValueError: others, or none.
    """
    n = checked(data)
    chosen = np.arange(n)[positions] if isinstance(positions, slice) else np.asarray(positions)
    if chosen.dtype == bool and chosen.shape == (n,):
        chosen = np.flatnonzero(chosen)
    if chosen.ndim != 1 or not chosen.size or not np.issubdtype(chosen.dtype, np.integer):
        raise ValueError(
            f"positions must be integers [m], or a mask of {n} bools, and choose at least one "
            f"example, got {chosen.dtype}{list(chosen.shape)}"
        )
    if chosen.min() < 0 or chosen.max() >= n:
        raise ValueError(f"positions must be 0 to {n - 1}, got {chosen.min()} to {chosen.max()}")
    if isinstance(positions, slice):
        chosen = positions  # a view, no copy
    return dataclasses.replace(
        data,
        x=data.x[chosen],
        y=data.y[chosen],
        row=np.asarray(data.row)[chosen],
        file_row=np.asarray(data.file_row)[chosen],
    )


def checked(data: Dataset) -> int:
    """The number of examples. ValueError: inputs, labels and rows that are not as many."""
    found = {name: len(getattr(data, name)) for name in ("x", "y", "row", "file_row")}
    if len(set(found.values())) > 1:
        raise ValueError(
            f"a dataset must hold as many x, y, row and file_row, got {found}: data.subset(data, "
            "positions) takes part of all of them"
        )
    return found["x"]


def numbered(data: Dataset) -> int | None:
    """The number of examples of a dataset whose rows are 0, 1, ...; None of a part of one."""
    row = np.asarray(data.row)
    return len(row) if np.array_equal(row, np.arange(len(row))) else None


def take(
    data: Dataset,
    positions: Int[Array | np.ndarray, "b"] | slice,
    labels: Shaped[Array | np.ndarray, "n ..."] | None = None,
) -> Batch:
    """The examples at these positions of a dataset as a step sees them, in the order asked for.

    Positions count in ``data``, and so do ``labels``, which take the place of its own; ``index`` of
    the batch is ``data.row`` there. This, and ``seen`` for examples that were fetched already, is
    how every batch of a dataset is made.
    """
    y = data.y if labels is None else labels
    x, y, row = data.x[positions], y[positions], data.row[positions]
    return seen(x, y, row, data.mean, data.std)


def seen(
    x: Shaped[Array | np.ndarray, "b ..."],
    y: Shaped[Array | np.ndarray, "b ..."],
    row: Int[Array | np.ndarray, "b"],
    mean: Leaf,
    std: Leaf,
) -> Batch:
    """Examples as stored, with their ``Dataset.row``, as a step sees them."""
    x, index = normalise(x, mean, std), row.astype(jnp.int32)
    return Batch(x=x, y=y.astype(label_type(y.dtype)), index=index)


def label_type(dtype: Any) -> Any:
    """What labels are as a step sees them: int32 of integers and bools, float32 of floats.

    float64 stays so where jax has 64 bits. ValueError: anything else.
    """
    if jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.bool_):
        return jnp.int32
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"labels must be integers (classes) or floats (targets), got {dtype}")
    wide = dtype == jnp.float64 and jax.config.jax_enable_x64  # pyright: ignore
    return jnp.float64 if wide else jnp.float32


def as_inputs(x: Any) -> np.ndarray:
    """Inputs [n, ...] on the host, numbers that are finite in float32, as a step sees them.

    ValueError: sparse matrices, text, objects, complex numbers; a value that is not finite, with
    its example.
    """
    if hasattr(x, "toarray"):
        raise ValueError(
            f"x must be a dense array, got a sparse {type(x).__name__}{list(x.shape)}: give "
            "x.toarray()"
        )
    x = np.asarray(x)
    numbers = jnp.issubdtype(x.dtype, jnp.integer) or jnp.issubdtype(x.dtype, jnp.floating)
    if not (numbers or x.dtype == bool):
        raise ValueError(f"x must be integers, floats or bools, got {x.dtype}{list(x.shape)}")
    check_finite("x", x)
    return x


def check_finite(name: str, values: np.ndarray) -> None:
    """ValueError if a float of [n, ...] is not finite in float32, which names the first example."""
    if not jnp.issubdtype(values.dtype, jnp.floating):
        return
    block = max(1, 2**22 // max(1, values[:1].size))  # examples: 16 MB of float32 at a time
    for first in range(0, len(values), block):
        part = values[first : first + block]
        with np.errstate(over="ignore"):
            bad = ~np.isfinite(part.astype(np.float32)).reshape(len(part), -1).all(axis=1)
        if bad.any():
            at = int(np.argmax(bad))
            given = part[at].reshape(-1)
            with np.errstate(over="ignore"):
                wrong = given[~np.isfinite(given.astype(np.float32))][0]
            raise ValueError(
                f"{name} must be finite in float32, got {wrong} in example {first + at}"
            )


def class_range(y: ArrayLike | None) -> tuple[int, int] | None:
    """(least, greatest) class among integer labels; None of floats, and where all are IGNORED."""
    y = np.asarray(y)
    if y.dtype.kind not in "biu":
        return None
    if y.dtype.kind == "i" and (y == IGNORED).any():
        y = y[y != IGNORED]
    return (int(y.min()), int(y.max())) if y.size else None


def check_classes(found: tuple[int, int] | None, logits: Leaf, y: Leaf, of: str = "labels") -> None:
    """ValueError unless the ``class_range`` of labels lies within the outputs of a network.

    ``logits`` [..., C] and ``y`` [...] tell by their shapes; labels that are floats, or targets in
    the shape of the logits, are no classes.
    """
    classes = jnp.issubdtype(y.dtype, jnp.integer) and logits.ndim == y.ndim + 1
    if found is None or not classes:
        return
    count = logits.shape[-1]
    if found[0] < 0 or found[1] >= count:
        wrong = found[1] if found[1] >= count else found[0]
        raise ValueError(
            f"{of} must be classes 0 to {count - 1}, as the network has {count} outputs, or "
            f"IGNORED ({IGNORED}) for none, got {wrong}"
        )


def as_labels(y: np.ndarray, like: Any = None) -> np.ndarray:
    """Labels [...] on the host in their ``label_type``, none of them changed by it.

    ``like`` is the dtype of those whose place they take. ValueError: integers beyond int32, floats
    in the place of integers or the reverse, floats that are not finite, anything that is no number.
    """
    y = np.asarray(y)
    kind = label_type(y.dtype)
    if like is not None and kind != label_type(like):
        raise ValueError(f"labels must be {np.dtype(like)} like those of the data, got {y.dtype}")
    if y.size and kind == jnp.int32 and not np.can_cast(y.dtype, np.int32):
        low, high = int(y.min()), int(y.max())
        if low < -(2**31) or high >= 2**31:
            raise ValueError(f"labels must fit int32, got {y.dtype} from {low} to {high}")
    if y.ndim:
        check_finite("labels", y)
    return y.astype(kind)


def normalise(x: Leaf, mean: Leaf, std: Leaf) -> Leaf:
    """``(x - mean) / std`` in float32, of examples [b, ...].

    A ``std`` of size 0 marks tokens, which pass as integers.
    """
    if std.size == 0:
        return x.astype(jnp.int32)
    return (x.astype(jnp.float32) - mean[None]) / std[None]
