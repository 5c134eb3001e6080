"""What the studies of both theories share: every member's own examples, and what is seen of it."""

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl

from dynamics import optim, training
from dynamics.data.stream import whole
from dynamics.training import Rule, Trained
from dynamics.types import Context, Dataset, Key, PyTree, Stream, Task, TrainState
from experiments.experiment import Job

PLAIN = optim.SGD(momentum=0.0, nesterov=False)

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Look:
    """What ``seen((state, own))`` says of each member, ``own`` its part of arrays [K, ...]."""

    seen: Callable[[Any], dict[str, jax.Array]]
    own: PyTree
    every: Collection[int]
    name: str = "look"
    dims: tuple[str, ...] = ()

    def start(self, context: Context, state: TrainState) -> PyTree:
        """Nothing is remembered."""
        return ()

    def measure(
        self, context: Context, carry: PyTree, state: TrainState
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """The metrics of every member."""
        return carry, context.each(self.seen)((state, self.own))


def descend(
    job: Job[Any, Any],
    members: pl.DataFrame,
    net: Task,
    stream: Stream,
    num_steps: int,
    *,
    name: str,
    rule: Rule = PLAIN,
    how: Any = "vmap",
    **options: Any,
) -> Trained:
    """The members trained, with no loss recorded but the first: a few numbers each, so by vmap."""
    roots, options["store"] = training.keys(members), job.stage(name.replace(" ", "-"))
    options |= {"name": f"{type(job.study).__name__.lower()}, {name}", "how": how}
    options["record_every"] = num_steps
    return training.train(members, roots, net, rule, stream, num_steps, job.mesh, **options)


def drawn(job: Job[Any, Any], members: pl.DataFrame, draw: Callable[[Any, int], T]) -> list[T]:
    """``draw(study, seed)`` for each member: one draw for each replica of each point."""
    found, keys = {}, members.select("point", "seed", "replica").rows()
    for point, seed, replica in dict.fromkeys(keys):
        own = draw(job.studies[point], own_seed(seed, replica))
        found[point, seed, replica] = own
    return [found[key] for key in keys]


def zeros(**shapes: tuple[int, ...]) -> Callable[[Key], PyTree]:
    """An ``init`` of zeros, for members that start from given weights."""
    return functools.partial(_zeros, tuple(shapes.items()))


def _zeros(shapes: tuple[tuple[str, tuple[int, ...]], ...], key: Key) -> PyTree:
    return {name: jnp.zeros(shape) for name, shape in shapes}


def own_seed(seed: int, replica: int) -> int:
    """Of what a replica of a point draws."""
    return int(np.random.SeedSequence([seed, replica]).generate_state(1)[0])


def own_examples(x: np.ndarray, y: np.ndarray | None = None) -> Stream:
    """All of x[k], f32[K, n, ...], at every step of member k, with targets y[k]; None: all 0."""
    n, rank = x.shape[1], (1,) * (x.ndim - 2)  # of one example
    targets = np.zeros(n, np.int32) if y is None else y[0]
    data = Dataset(x[0], targets, np.zeros(rank, np.float32), np.ones(rank, np.float32))
    return whole(data, len(x), inputs=x, labels=y)


def logarithmic(steps: int, measured: int) -> tuple[int, ...]:
    """About so many steps from 0 to the last, evenly in their logarithm."""
    return tuple(np.unique([0, *np.geomspace(1, steps, measured).round().astype(int)]).tolist())
