"""The nouns: what a run is made of, and what comes out of it.

Arrays live in ``struct.dataclass`` (pytrees), functions in ``NamedTuple`` (static). Everything is
written for one replica; ``population`` adds the leading axis.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from flax import struct

PyTree = Any
Leaf = Any  # an array; a ShapeDtypeStruct, sharding or spec where the tree describes arrays
Key = jax.Array
Scalars = Mapping[str, Any]
NO_SCALARS: Scalars = MappingProxyType({})

INIT, ORDER, LOSS, AUGMENT, PROBE, OPTIMIZER = range(6)  # purposes a root key is folded with
NEVER = 2**31 - 1  # the step at which something that has not happened happened
IGNORED = -100
"""The label of what has none: an example, a token, a pixel. Its loss is 0 and gives no gradient; it
counts in no mean over labels, accuracy or score, is never drawn as noise and never corrected. An
example all of whose labels are ignored has loss 0, and NaN for a score. Other conventions (255 in
many segmentations) are converted where data come in: ``np.where(y == 255, IGNORED, y)``."""


@struct.dataclass
class TrainState:
    """Everything that determines the rest of a run; saving it saves the run."""

    step: Leaf  # i32[*r]: updates done so far
    params: PyTree  # what is trained
    extras: PyTree  # batch statistics, running targets, averages: state that is not trained
    opt_state: PyTree
    hyperparameters: dict[str, Leaf]  # f32[]: scalars that may differ between replicas
    key: Leaf  # [*r]: root key, never split: fold_in(fold_in(key, purpose), step)
    diverged: Leaf  # i32[*r]: the first step that was not finite (step.make), NEVER until then


@struct.dataclass
class Dataset:
    """Examples as stored; ``x`` is normalised where it is used.

    ``row`` is each example's place in the dataset of the run, whatever part of it this is: 0..n - 1
    where examples are loaded (None), kept by ``data.subset``. It is what ``Batch.index`` carries,
    so tables and metrics with a row for each example mean the same one everywhere. ``file_row`` is
    its place in the file (None: ``row``), to be published; nothing is computed from it.
    """

    x: Leaf  # [n ...]: uint8 images stay uint8; tokens stay integers
    y: Leaf  # [n ...]: integers (classes or IGNORED), floats (targets, soft labels [n ... classes])
    mean: Leaf  # f32[...]: broadcast against one example
    std: Leaf  # f32[...]
    row: Leaf = None  # i32[n]
    file_row: Leaf = None  # i32[n]

    def __post_init__(self) -> None:
        # trees of the same form hold shardings, shapes or nothing in the place of arrays
        if self.row is None and hasattr(self.x, "shape"):
            object.__setattr__(self, "row", np.arange(self.x.shape[0], dtype=np.int32))
        if self.file_row is None:
            object.__setattr__(self, "file_row", self.row)

    def __len__(self) -> int:
        return self.x.shape[0]


@struct.dataclass
class Batch:
    """What one step is computed on."""

    x: Leaf  # [b ...]
    y: Leaf  # [b ...]: i32 classes (or IGNORED), or f32 targets
    index: Leaf  # i32[b]: ``Dataset.row`` of the examples
    weight: Leaf | None = None  # f32[b]: factor of each example's loss; None: 1


@struct.dataclass
class Aux:
    """What the forward pass knew about each example of the batch, before the update."""

    loss: Leaf  # f32[b]
    logits: Leaf  # f32[b ...]
    y: Leaf  # [b ...]: the labels the run was trained on, noise included
    index: Leaf  # i32[b]
    scalars: dict[str, Leaf] = struct.field(default_factory=dict)  # recorded as rows


@struct.dataclass
class Info:
    """What a step knew, of the parameters before its update."""

    aux: Aux
    grads: PyTree  # like the parameters: the mean over the microbatches
    updates: PyTree  # like the parameters: what the optimizer adds to them
    squares: Leaf | None = None  # f32[accumulate]: |gradient|^2 of each microbatch; None for one


@struct.dataclass
class Written:
    """Rows of a table in ``extras`` that a step writes: in their place, if the step counts.

    A task with a row of state for each example returns this in the table's place, so that a step
    moves the rows of its batch and never the table.
    """

    index: Leaf  # i32[b]; where a row is there twice, one of the two is written
    rows: Leaf  # [b ...]


Lies = Literal["parameters", "examples", "replicated"]
"""Where an array of ``extras`` lies on the mesh: as rules say by its path, like a parameter; a row
for each example, split over all devices of a replica where they divide it; or a copy on each."""


def _like_parameters(extras: PyTree) -> PyTree:
    return "parameters"


def _as_they_are(params: PyTree, extras: PyTree) -> tuple[PyTree, PyTree]:
    return params, extras


class Task(NamedTuple):
    """A model and a loss as pure functions of one replica.

    Compiled programs are found again by the task: ``task.of_methods`` makes one that is equal to
    another of equal parts.
    """

    init: Callable[[Key, Scalars], tuple[PyTree, PyTree]]
    """``(key, hyperparameters={}) -> (params, extras)``; the hyperparameters are the member's."""
    loss: Callable[[PyTree, PyTree, Batch, Key, Scalars], tuple[jax.Array, tuple[PyTree, Aux]]]
    """``(params, extras, batch, key, hyperparameters) -> (scalar, (extras, aux))``, training mode.
    The scalar is the mean over the batch of ``weight * loss`` plus whatever the method adds;
    ``aux.loss`` is never weighted."""
    evaluate: Callable[[PyTree, PyTree, Batch, Scalars], Aux]
    """``(params, extras, batch, hyperparameters) -> aux``, evaluation mode: no example depends on
    another, nothing is random."""
    network: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]] = _as_they_are
    """``(params, extras) -> (params, extras)`` of the module, which ``module.apply`` takes: those
    given, unless other things are trained (coordinates in a subspace, two networks) or extras hold
    more than the module's own. What reads weights by the module's names reads these."""
    layout: Callable[[PyTree], PyTree] = _like_parameters
    """``extras -> Lies`` of all of them, or a tree of ``Lies`` that is a prefix of theirs."""
    bare: "Task | None" = None
    """The task of what ``network`` returns, without what is added in training; None: this one."""
    num_examples: int | None = None
    """Of the dataset that its tables have rows for; None: it has none, and takes any."""

    def read(self, state: TrainState) -> "tuple[Task, TrainState]":
        """The module's own weights as a task and a state: equal outputs, but for two networks."""
        params, extras = self.network(state.params, state.extras)
        return self.bare or self, dataclasses.replace(state, params=params, extras=extras)


class Stream(NamedTuple):
    """Batch t of replica s as a pure function of (s, t).

    A stream from the host yields from ``host(first)`` what the batches of the steps first,
    first + 1, ... are made of, with leaves [K, B, ...]; it arrives as ``fed``, which is ``()`` for
    data that lie on the device. ``host(first, (replicas, examples))`` yields these slices of it.
    """

    batch: Callable[[PyTree, PyTree, PyTree, Key, jax.Array], Batch]
    """``(shared, own, fed, key, step) -> Batch``"""
    shared: PyTree  # lies on the device once
    own: PyTree  # every leaf has a leading replica axis
    batch_size: int
    host: Callable[..., Iterator[PyTree]] | None = None
    num_examples: int | None = None  # of the dataset that Batch.index counts in, where it is known
    classes: tuple[int, int] | None = None  # least and greatest integer label; None: not known


Each = Callable[[Callable[..., PyTree]], Callable[..., PyTree]]
"""``each(fn)(own, *shared)``: ``fn`` of one member, run for every member. Programs are found again
by the equality of ``fn``: a module's function, or a method of a frozen dataclass."""


class Context:
    """What a probe or a revision of a run may use, so that it holds no copies of its own."""

    def __init__(
        self,
        task: Task,
        each: Each,
        mesh: Any,
        data: Mapping[str, Dataset],
        convolves: bool = False,
    ):
        """``convolves``: the step does, on a CPU, where a compiled loop must not hold it."""
        self.task, self.each, self.mesh, self.convolves = task, each, mesh, convolves
        self.data = dict(data)
        self.kept: dict[Any, Any] = {}  # what probes made of the data, for the next measurement

    def examples(self, name: str) -> Dataset:
        """The data set of a name. ValueError: ``fit`` was given none of that name."""
        if name not in self.data:
            raise ValueError(
                f"a probe looks at the data {name!r}, fit was given {sorted(self.data)}: pass "
                f"data={{{name!r}: ...}}"
            )
        return self.data[name]


@runtime_checkable
class StepProbe(Protocol):
    """Reads what every training step already knew, so it costs no forward pass.

    Both functions are pure and of one replica. ``fold`` runs for every step; its metrics are
    recorded at the cadence ``every``: an interval in steps, or the exact steps. A frozen dataclass:
    equal probes share their compiled programs. ``dims`` may name the axes of what is no scalar.
    """

    name: str
    every: int | Collection[int]

    def init(self, state: TrainState) -> PyTree:
        """The carry before the first step."""
        ...

    def fold(self, carry: PyTree, aux: Aux) -> tuple[PyTree, dict[str, jax.Array]]:
        """One step taken in: the new carry, and the metrics up to here."""
        ...


@runtime_checkable
class Observer(Protocol):
    """Reads what a step knew beside its examples: gradient and update.

    It is pure, of one replica, and compiled into the step of every run that declares it, so it may
    change how the compiler rounds the rest. Its metrics are scalars, in the rows of each step as
    ``<name>.<metric>``.
    """

    name: str

    def observe(self, state: TrainState, info: Info) -> dict[str, jax.Array]:
        """The metrics of a step, from the state before its update."""
        ...


@runtime_checkable
class StateProbe(Protocol):
    """Computes something from the state of the population at the cadence ``every``.

    It runs on the host and dispatches functions of one member through ``context.each``, which
    finds the program of an equal function again. Metrics have a leading member axis: a scalar per
    member becomes a column of the probe's frame, anything larger a labelled array, whose other axes
    ``dims`` may name. No metrics at all leave no row.
    """

    name: str
    every: int | Collection[int]

    def start(self, context: Context, state: TrainState) -> PyTree:
        """The carry before the first measurement; ``()`` if nothing is remembered."""
        ...

    def measure(
        self, context: Context, carry: PyTree, state: TrainState
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """The new carry, and the metrics of the state after ``state.step`` updates."""
        ...


Probe = StepProbe | StateProbe


@runtime_checkable
class Revision(Protocol):
    """Changes what a run is trained on while it trains: its labels, or which of its examples.

    It runs on the host at the cadence ``every`` (never at step 0), after the probes, and sees the
    state without changing it. What it returns as ``own`` is what the batches of the following steps
    are made from; with its carry, whose leaves are [K, ...] too, it is in every checkpoint.
    """

    name: str
    every: int | Collection[int]

    def start(self, context: Context, own: PyTree, state: TrainState) -> PyTree:
        """The carry before the first step, from the stream's ``own``."""
        ...

    def revise(
        self, context: Context, carry: PyTree, own: PyTree, state: TrainState
    ) -> tuple[PyTree, PyTree, dict[str, jax.Array]]:
        """The new carry, the new ``own`` of the same shapes, and metrics as a StateProbe's."""
        ...


class Results(NamedTuple):
    """What a run leaves behind; frames are polars tables."""

    rows: Any  # a row for each (step, member) recorded: its loss and what the task records
    measured: dict[str, Any]  # probe -> a row for each (step, member) measured, its scalars
    arrays: dict[tuple[str, str], Any]  # (probe, metric) -> record.Array: step, member, ...
    status: Any  # a row for each member: finished or diverged, and the step
    state: TrainState | None = None
