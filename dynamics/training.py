"""Populations described by a table, one row for each member, and trained by it.

The table has a column ``member``, whatever columns tell the members apart (the point of a sweep,
the cell of a study, the seed), and one for each hyperparameter that differs between them. What was
measured comes back joined to it, so that splitting by point, cell or seed is a group-by.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
from jax.sharding import Mesh

from dynamics import fit, models, optim, task
from dynamics import mesh as meshes
from dynamics.config import Count, frozen
from dynamics.data import augment
from dynamics.data.sources import Splits
from dynamics.data.stream import stream
from dynamics.record import Array
from dynamics.types import Dataset, PyTree, Results, Stream, Task, TrainState

ROWS = 500  # of the training loss that are kept of a long run, about


@frozen
class Train:
    """How a network is trained."""

    optimizer: optim.Optimizer = optim.SGD()
    """The rule and its numbers"""
    batch_size: Count = 64
    """Examples a step"""
    augment: Literal["none", "crop_flip"] = "none"
    """crop_flip: reflect-pad 4 pixels, random crop, horizontal flip, per image"""


def net_of(model: models.Model, data: Splits) -> Task:
    """The classification task of a model config."""
    return task.of_dataset(models.make(model, data.num_classes), data.train)


def steps(train: Train, data: Splits, epochs: float, name: str = "epochs") -> int:
    """The steps of so many epochs of the full data, whatever is trained on.

    ValueError: some training, but less than half a step of it.
    """
    an_epoch = len(data.train) // train.batch_size
    if epochs and not (found := round(epochs * an_epoch)):
        raise ValueError(f"{name} must be at least a step of {an_epoch} an epoch, got {epochs:g}")
    return found if epochs else 0


def batches(train: Train, data: Dataset, roots: jax.Array, **subset: Any) -> Stream:
    """The stream of a training config; ``subset`` are a stream's rows, sizes and labels."""
    change = augment.crop_and_flip() if train.augment == "crop_flip" else None
    return stream(data, train.batch_size, roots, augment=change, **subset)


def check_batch(train: Train, data: Splits, kept: float = 1.0) -> None:
    """ValueError unless the smallest subset, a part of the training set, fills a batch."""
    n = len(data.train)
    if train.batch_size > round(kept * n):
        raise ValueError(
            f"train.batch_size {train.batch_size} is more than the {round(kept * n)} examples "
            f"that keeping {kept:g} leaves of {n}: take a smaller batch or keep more"
        )


@runtime_checkable
class Rule(Protocol):
    """How a direction becomes an update: the configs of ``dynamics.optim``, or another."""

    def make(self, num_steps: int) -> optax.GradientTransformationExtraArgs:
        """The optimizer of a run of so many steps."""
        ...

    def hyperparameters(self) -> dict[str, float]:
        """The scalars that it reads from the state."""
        ...


class Trained(NamedTuple):
    """What a population leaves behind, each frame joined to the table of its members."""

    members: pl.DataFrame  # the table, and ``diverged``, the step, null if that did not happen
    rows: pl.DataFrame  # for each (step, member) recorded, the loss and what the task records
    measured: dict[str, pl.DataFrame]  # probe -> for each (step, member) measured, its scalars
    arrays: dict[tuple[str, str], Array]  # (probe, metric) -> dims step, member, ...
    state: TrainState | None  # None: of several programs

    def at(self, probe: str, step: int) -> pl.DataFrame:
        """A row for each member: the table, and what a probe measured at a step.

        Null where the member had diverged.
        """
        found = self.measured.get(probe, self.members.select("member").clear())
        if "step" in found.columns:
            found = found.filter(pl.col("step") == step).drop("step")
        own = [name for name in found.columns if name not in self.members.columns]
        measured = found.select("member", *own)
        return self.members.join(measured, on="member", how="left", maintain_order="left")


def table(
    points: Iterable[Mapping[str, Any]],
    cells: Callable[[int], Iterable[Mapping[str, Any]]],
    replicas: int,
) -> pl.DataFrame:
    """A table with a member for each (point, cell, replica), in this order.

    Columns: ``member``, ``point``, those of the point (its ``seed`` among them), ``replica``, the
    number of the paired seed, and those of the cells, ``cells(p)`` for point p; null where a cell
    has no such column.
    """
    found = [
        {"point": p, **point, "replica": replica, **cell}
        for p, point in enumerate(points)
        for cell in cells(p)
        for replica in range(replicas)
    ]
    return pl.DataFrame(found, infer_schema_length=None).with_row_index("member")


def keys(members: pl.DataFrame, *purposes: int) -> jax.Array:
    """Root keys [K]: each depends on the member's seed, the purposes, and its replica alone."""

    def root(seed: Any, replica: Any) -> jax.Array:
        key = jax.random.key(seed)
        for part in (*purposes, replica):
            key = jax.random.fold_in(key, part)
        return key

    numbers = (members[name].to_numpy().astype(np.int32) for name in ("seed", "replica"))
    return jax.vmap(root)(*map(jnp.asarray, numbers))


def column(members: pl.DataFrame, name: str, default: float = 0.0) -> np.ndarray:
    """f64[K]: a number of each member; the default where the table has none."""
    if name not in members.columns:
        return np.full(len(members), default)
    return members[name].cast(pl.Float64).fill_null(default).to_numpy()


def train(
    members: pl.DataFrame,
    roots: jax.Array,
    task: Task,
    rule: Rule,
    stream: Stream,
    num_steps: int,
    mesh: Mesh | None = None,
    *,
    total: int | None = None,
    scalars: Mapping[str, float] = {},
    start: TrainState | None = None,
    params: PyTree | None = None,
    record_every: int | None = None,
    **options: Any,
) -> Trained:
    """Train a member for each row of the table and each of ``roots`` [K], until ``num_steps``.

    The hyperparameters are those of the rule, and ``scalars`` of the task: each the table's column
    of that name, else the number given. Schedules span ``total`` steps, if that is not the last.
    From ``start`` if given, whose members are those of the table, with ``roots`` as their keys;
    or from the weights ``params`` (``fit.init``).
    ``options`` are those of ``fit.fit``; about 500 rows of the loss are kept by default. Without a
    mesh, members are spread over as many devices as divide them.
    """
    mesh = mesh or meshes.for_population(len(members), stream.batch_size)
    optimizer = rule.make(total or num_steps)
    if start is None:
        given = {**rule.hyperparameters(), **scalars}
        own = {name: column(members, name, value) for name, value in given.items()}
        state = fit.init(task, optimizer, roots, own, mesh, params=params)
    else:
        again = dataclasses.replace(start, key=roots)
        state = meshes.put(again, meshes.over_replicas(mesh), mesh)
    every = record_every or max(1, num_steps // ROWS)
    results = fit.fit(
        task, optimizer, state, stream, num_steps, mesh, record_every=every, **options
    )
    return joined(members, results)


def joined(members: pl.DataFrame, results: Results) -> Trained:
    """The results of a population, each frame joined to the table of its members.

    An array has no number of a member at the steps after it diverged: NaN, -1 of integers.
    """
    places = members["member"].to_numpy()
    step = results.status["step"].set(results.status["status"] != "diverged", None)
    table = members.with_columns(diverged=step)

    def whole(frame: pl.DataFrame) -> pl.DataFrame:
        named = frame.with_columns(member=pl.Series(places[frame["member"].to_numpy()]))
        return table.join(named, on="member", how="right", maintain_order="right")

    gone = np.where(step.is_null(), np.inf, step.fill_null(0).to_numpy())
    arrays = {
        key: _until(gone, array)._replace(coords={**array.coords, "member": places})
        for key, array in results.arrays.items()
    }
    measured = {name: whole(frame) for name, frame in results.measured.items()}
    return Trained(table, whole(results.rows), measured, arrays, results.state)


def _until(gone: np.ndarray, array: Array) -> Array:
    """The array without what members gave at steps after that at which they are ``gone``."""
    after = np.asarray(array.coords["step"])[:, None] > gone
    if not after.any() or array.values.dtype.kind not in "fi":
        return array
    values = array.values.copy()
    none = np.nan if values.dtype.kind == "f" else -1
    values[after] = none
    return array._replace(values=values)


def by_program(
    members: pl.DataFrame, columns: str | Sequence[str], one: Callable[[pl.DataFrame], Trained]
) -> Trained:
    """Members that can't be one program, trained group by group; frames are concatenated.

    ``one`` trains the members that have the same values in ``columns``; groups come in the order in
    which the table has them. ValueError: an array has other dims, coordinates or sizes in one of
    them.
    """
    parts = [one(group) for group in members.partition_by(columns, maintain_order=True)]
    if len(parts) == 1:
        return parts[0]
    return Trained(
        pl.concat([part.members for part in parts], how="diagonal"),
        pl.concat([part.rows for part in parts], how="diagonal"),
        {
            name: pl.concat(
                [part.measured[name] for part in parts if name in part.measured], how="diagonal"
            )
            for name in dict.fromkeys(name for part in parts for name in part.measured)
        },
        {
            key: _concatenated([part.arrays[key] for part in parts if key in part.arrays])
            for key in dict.fromkeys(key for part in parts for key in part.arrays)
        },
        None,
    )


def by_phase(
    phases: Sequence[Callable[[TrainState | None], Trained]], start: TrainState | None = None
) -> Trained:
    """Members trained in phases: on this, then on that, each from the weights of the one before.

    A phase is given the state to begin with (None: it makes its own) and trains it to a later step,
    ``train(..., start=state)``. One clock runs through all of them. Frames and arrays are those of
    all phases, in order; what two of them measured where they meet is the earlier one's.
    """
    parts: list[Trained] = []
    for phase in phases:
        parts.append(phase(parts[-1].state if parts else start))

    def one_after_another(frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
        whole = pl.concat(frames, how="diagonal_relaxed")
        whole = whole.unique(["member", "step"], keep="first", maintain_order=True)
        known = parts[-1].members.select("member", "diverged")
        joined = whole.drop("diverged").join(known, on="member", how="left", maintain_order="left")
        return joined.select(whole.columns)

    measured = dict.fromkeys(name for part in parts for name in part.measured)
    arrays: dict[tuple[str, str], list[Array]] = {}
    for part in parts:
        for key, array in part.arrays.items():
            arrays.setdefault(key, []).append(array)
    return Trained(
        parts[-1].members,
        one_after_another([part.rows for part in parts]),
        {
            name: one_after_another([p.measured[name] for p in parts if name in p.measured])
            for name in measured
        },
        {key: _over_phases(some) for key, some in arrays.items()},
        parts[-1].state,
    )


def _over_phases(arrays: Sequence[Array]) -> Array:
    steps, values = [], []
    for array in arrays:
        for i, step in enumerate(array.coords["step"]):
            if step not in steps:
                steps.append(int(step))
                values.append(array.values[i])
    first = arrays[0]
    return Array(np.stack(values), first.dims, {**first.coords, "step": np.array(steps)})


def _concatenated(arrays: Sequence[Array]) -> Array:
    first, axis = arrays[0], arrays[0].dims.index("member")
    for other in arrays[1:]:
        if (one := _frame_of(first)) != (found := _frame_of(other)):
            raise ValueError(f"arrays of members must differ in their members only: {one}, {found}")
    values = np.concatenate([array.values for array in arrays], axis=axis)
    places = np.concatenate([array.coords["member"] for array in arrays])
    return Array(values, first.dims, {**first.coords, "member": places})


def _frame_of(array: Array) -> dict[str, Any]:
    """What arrays of other members have in common: the size and coordinates of every other dim."""
    sizes = dict(zip(array.dims, array.values.shape, strict=True))
    coords = {name: np.asarray(labels).tolist() for name, labels in array.coords.items()}
    return {d: coords.get(d, n) for d, n in sizes.items() if d != "member"}


def unstack(array: Array, members: pl.DataFrame, *columns: str) -> Array:
    """The array of members with a dim for each of ``columns`` in place of ``member``.

    ``members`` says which members and what they are called: one for each combination of the values
    in ``columns``, which become coordinates in the order of the table. ValueError: not so.
    """
    labels = [members[name].unique(maintain_order=True).to_list() for name in columns]
    shape = tuple(map(len, labels))
    rows = [
        tuple(label.index(value) for label, value in zip(labels, row, strict=True))
        for row in members.select(columns).rows()
    ]
    if len(rows) != int(np.prod(shape)) or len(set(rows)) != len(rows):
        raise ValueError(
            f"{len(rows)} members are not one for each of {dict(zip(columns, shape, strict=True))}"
        )
    places = {int(member): i for i, member in enumerate(array.coords["member"])}
    order = np.empty(shape, np.int64)
    for row, member in zip(rows, members["member"], strict=True):
        order[row] = places[member]
    axis = array.dims.index("member")
    dims = (*array.dims[:axis], *columns, *array.dims[axis + 1 :])
    coords = {name: value for name, value in array.coords.items() if name != "member"}
    coords |= {name: np.array(label) for name, label in zip(columns, labels, strict=True)}
    return Array(np.take(array.values, order, axis=axis), dims, coords)
