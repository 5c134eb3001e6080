"""A probe of one's own from one function."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import jax

from dynamics import mesh as meshes
from dynamics.data.rows import take
from dynamics.task import by_value
from dynamics.types import Batch, Context, Dataset, PyTree, Task, TrainState

Function = Callable[[Task, TrainState, Batch], Mapping[str, jax.Array]]


@dataclass(frozen=True)
class Measure:
    """What ``function(task, state, batch)`` says of each member, by name; the batch is all of the
    data set ``on``, in its order, as a step sees it.

    A scalar becomes a column f32[K] of the probe's frame, anything larger an array [K, ...], whose
    axes ``dims`` may name. The function is pure and of one member; one that is made anew is
    compiled anew, but for a ``functools.partial`` and a method of a frozen dataclass, which are
    known by their parts. Numbers of each example that no other example has a part in are a
    ``Score``, which needs room for a batch only.

    Cost: that of the function, for each member, and the room for all of the data at once.
    ValueError: ``fit`` was given no data of that name.
    """

    function: Function
    every: int | Collection[int]
    name: str
    on: str = "train"
    dims: tuple[str, ...] = ()

    def start(self, context: Context, state: TrainState) -> PyTree:
        """Nothing is remembered."""
        context.examples(self.on)
        return ()

    def measure(
        self, context: Context, carry: PyTree, state: TrainState
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """What the function returns, with a member axis."""
        of_member = _Measured(by_value(self.function), context.task).of_member
        return carry, context.each(of_member)(state, context.examples(self.on))


@dataclass(frozen=True)
class _Measured:
    """What is compiled of the probe, for one member: equal ones once."""

    function: Function
    task: Task

    def of_member(self, state: TrainState, data: Dataset) -> dict[str, jax.Array]:
        """What the function says of one member."""
        batch = meshes.split_here(take(data, slice(None)))
        return meshes.whole_here(dict(self.function(self.task, state, batch)))
