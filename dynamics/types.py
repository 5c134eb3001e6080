"""The nouns: what a run is made of, and what comes out of it.

Arrays live in ``struct.dataclass`` (pytrees), functions in ``NamedTuple`` (static). Everything is
written for one replica; ``population`` adds the leading axis.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from flax import struct

PyTree = Any
Leaf = Any  # an array; a ShapeDtypeStruct, sharding or spec where the tree describes arrays
Key = jax.Array
Scalars = Mapping[str, Any]

INIT, ORDER, LOSS, AUGMENT, PROBE = range(5)  # purposes a root key is folded with
NEVER = 2**31 - 1  # the step at which something that has not happened happened


@struct.dataclass
class TrainState:
    """Everything that determines the rest of a run; saving it saves the run."""

    step: Leaf  # i32[*r]: updates done so far
    params: PyTree  # what is trained
    extras: PyTree  # batch statistics, running targets, averages: state that is not trained
    opt_state: PyTree
    hyperparameters: dict[str, Leaf]  # f32[]: scalars that may differ between replicas
    key: Leaf  # [*r]: root key, never split: fold_in(fold_in(key, purpose), step)
    diverged: Leaf  # i32[*r]: the first step whose loss was not finite, NEVER until then


@struct.dataclass
class Dataset:
    """Examples as stored, in the order of the file; ``x`` is normalised where it is used."""

    x: Leaf  # [n ...]: uint8 images stay uint8; tokens stay integers
    y: Leaf  # [n ...]
    index: Leaf  # i32[n]: the place of each row in the file it came from
    mean: Leaf  # f32[...]: broadcast against one example
    std: Leaf  # f32[...]

    def __len__(self) -> int:
        return self.x.shape[0]


@struct.dataclass
class Batch:
    """What one step is computed on."""

    x: Leaf  # [b ...]
    y: Leaf  # [b ...]
    index: Leaf  # i32[b]: the example's row in the dataset, never reordered
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
class Written:
    """Rows of a table in ``extras`` that a step writes: in their place, if the step counts.

    A task with a row of state for each example returns this in the table's place, so that a step
    moves the rows of its batch and never the table.
    """

    index: Leaf  # i32[b]; where a row is there twice, one of the two is written
    rows: Leaf  # [b ...]


class Task(NamedTuple):
    """A model and a loss as three pure functions of one replica."""

    init: Callable[[Key], tuple[PyTree, PyTree]]
    """``key -> (params, extras)``"""
    loss: Callable[[PyTree, PyTree, Batch, Key, Scalars], tuple[jax.Array, tuple[PyTree, Aux]]]
    """``(params, extras, batch, key, hyperparameters) -> (scalar, (extras, aux))``, training mode.
    The scalar is the mean over the batch of ``weight * loss`` plus whatever the method adds;
    ``aux.loss`` is never weighted."""
    evaluate: Callable[[PyTree, PyTree, Batch, Scalars], Aux]
    """``(params, extras, batch, hyperparameters) -> aux``, evaluation mode: no example depends on
    another, nothing is random."""


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


Each = Callable[[Callable[..., PyTree]], Callable[..., PyTree]]
"""``each(fn)(own, *shared)``: compile ``fn`` of one replica and run it for every replica."""


@runtime_checkable
class StepProbe(Protocol):
    """Reads what every training step already knew, so it costs no forward pass.

    Both functions are pure and of one replica. ``fold`` runs for every step; its metrics are
    recorded at the cadence ``every``: an interval in steps, or the exact steps.
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
class StateProbe(Protocol):
    """Computes something from the state of the population at the cadence ``every``.

    It runs on the host and dispatches functions of one replica through ``each``. Metrics have a
    leading replica axis: a scalar per replica becomes a column of the rows, anything larger an
    array named ``<probe>.<metric>@<step>``.
    """

    name: str
    every: int | Collection[int]

    def start(self, state: TrainState, each: Each) -> PyTree:
        """The carry before the first measurement; ``()`` if nothing is remembered."""
        ...

    def measure(
        self, carry: PyTree, state: TrainState, each: Each
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

    def start(self, own: PyTree, state: TrainState, each: Each) -> PyTree:
        """The carry before the first step, from the stream's ``own``."""
        ...

    def revise(
        self, carry: PyTree, own: PyTree, state: TrainState, each: Each
    ) -> tuple[PyTree, PyTree, dict[str, jax.Array]]:
        """The new carry, the new ``own`` of the same shapes, and metrics as a StateProbe's."""
        ...


class Results(NamedTuple):
    """What a run leaves behind."""

    rows: dict[str, Any]  # column -> values: a long table, one row per (step, replica)
    arrays: dict[str, Any]  # name -> numpy array, replica axis first
    state: TrainState | None = None
