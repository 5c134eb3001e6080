"""Probes over a population: compiled apart from the step, so that watching changes no bit of it."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dynamics import mesh as meshes
from dynamics import population
from dynamics.task import by_value
from dynamics.types import (
    NEVER,
    Aux,
    Context,
    Dataset,
    Each,
    Probe,
    PyTree,
    Revision,
    StepProbe,
    Task,
    TrainState,
)


class Watch:
    """The probes of a run, and the revision of its data: their carries, cadences, metrics."""

    def __init__(
        self,
        probes: Sequence[Probe],
        state: TrainState,
        context: Context,
        how: population.How,
        revision: Revision | None = None,
        own: PyTree = None,
    ):
        """Starts every probe on the state before the first step, the revision on the data too."""
        self._probes = {probe.name: probe for probe in probes}
        self._revision, self._context = revision, context
        self._mesh, self._lies = context.mesh, meshes.over_replicas(context.mesh)
        self._folds: dict[str, Fold] = {}
        self._metrics: dict[str, dict[str, jax.Array]] = {}
        self.carries: dict[str, Any] = {}
        for name, probe in self._probes.items():
            if isinstance(probe, StepProbe):
                self._folds[name] = fold_of(probe, context.mesh, how)
                self.carries[name] = self._folds[name].init(state)
            else:
                self.carries[name] = _own(probe.start(context, state), state)
        if revision is not None:
            begun = _own((revision.start(context, own, state), own), state)
            self.carries[revision.name] = meshes.put(begun, self._lies, self._mesh)

    def next(self, done: int) -> int:
        """The first step after ``done`` at which something is measured or revised."""
        watching = [*self._probes.values(), *([self._revision] if self._revision else [])]
        return min((next_due(one.every, done) for one in watching), default=NEVER)

    @property
    def own(self) -> PyTree:
        """What the batches of the next step are made from, as it was last revised."""
        assert self._revision is not None
        return self.carries[self._revision.name][1]

    def revise(self, state: TrainState, done: int) -> dict[str, dict[str, jax.Array]] | None:
        """Revise the data if that is due after ``done`` steps: its metrics by name, else None."""
        revision = self._revision
        if revision is None or not done or next_due(revision.every, done - 1) != done:
            return None
        carry, before = self.carries[revision.name]
        carry, own, metrics = revision.revise(self._context, carry, before, state)
        if (was := _shapes(before)) != (now := _shapes(own)):
            raise ValueError(f"revision {revision.name!r} must keep the shapes {was}, got {now}")
        carry, own, metrics = _own((carry, own, metrics), state)
        self.carries[revision.name] = meshes.put((carry, own), self._lies, self._mesh)
        return {revision.name: metrics}

    def fold(self, aux: Aux, count: int) -> None:
        """Show the steps of a chunk to the probes that read them."""
        for name, fold in self._folds.items():
            carry, metrics = fold.run(self.carries[name], aux, np.int32(count))
            self.carries[name], self._metrics[name] = carry, metrics

    def measure(
        self, state: TrainState, done: int, num_steps: int
    ) -> dict[str, dict[str, jax.Array]]:
        """Probe -> its metrics, of the probes that are due after ``done`` steps."""
        found: dict[str, dict[str, jax.Array]] = {}
        for name, probe in self._probes.items():
            last = done == num_steps and isinstance(probe.every, int)
            if not (last or next_due(probe.every, done - 1) == done):
                continue
            if name in self._folds:
                metrics = self._metrics.get(name, {})  # nothing folded yet before the first step
            else:
                assert not isinstance(probe, StepProbe)
                measured = probe.measure(self._context, self.carries[name], state)
                self.carries[name], metrics = _own(measured, state)
            found[name] = metrics
        return found


def _own(tree: PyTree, state: TrainState) -> PyTree:
    """A tree with copies of what it has of the state, whose arrays the next step overwrites."""
    given = {id(leaf) for leaf in jax.tree.leaves(state)}
    return jax.tree.map(lambda x: jnp.copy(x) if id(x) in given else x, tree)


def _shapes(own: PyTree) -> str:
    return str(jax.tree.map(lambda x: f"{x.dtype}{x.shape}", own))


def next_due(every: int | Collection[int], done: int) -> int:
    """The first due step after ``done``."""
    if isinstance(every, int):
        return (done // every + 1) * every
    return min((s for s in every if s > done), default=NEVER)


class Fold:
    """A StepProbe over a population, compiled apart from the step it watches."""

    def __init__(self, probe: StepProbe, mesh: Mesh, how: population.How):
        """Its carry lies with the replica it belongs to."""
        how = "map" if how == "dispatch" else how
        start = population.spread(probe.init, mesh, how)
        self.init = jax.jit(start, out_shardings=meshes.over_replicas(mesh))

        def fold(members: tuple[PyTree, Aux], count: jax.Array) -> Any:
            carry, aux = members
            at = lambda i: jax.tree.map(lambda x: x[i], aux)  # noqa: E731
            body = lambda i, carry: probe.fold(carry, at(i))[0]  # noqa: E731
            return probe.fold(jax.lax.fori_loop(0, count - 1, body, carry), at(count - 1))

        spread = population.spread(fold, mesh, how)

        def probe_chunk(carry: PyTree, aux: Aux, count: jax.Array) -> Any:
            return spread((carry, aux), count)

        lies = meshes.over_replicas(mesh)
        self.run = jax.jit(probe_chunk, donate_argnums=0, out_shardings=(lies, None))


_fold = functools.lru_cache(maxsize=256)(Fold)


def fold_of(probe: StepProbe, mesh: Mesh, how: population.How) -> Fold:
    """The programs of a StepProbe: equal probes share them, if they have a hash."""
    try:
        hash(probe)
    except TypeError:  # a list of steps, say
        return Fold(probe, mesh, how)
    return _fold(probe, mesh, how)


@functools.lru_cache(maxsize=512)
def _program(fn: Callable[..., PyTree], mesh: Mesh, how: population.How) -> Callable[..., PyTree]:
    return jax.jit(population.spread(fn, mesh, how))


@functools.lru_cache(maxsize=64)
def _parts(mesh: Mesh) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return jax.jit(lambda tree: population.split(tree, mesh)), jax.jit(population.join)


def each_member(mesh: Mesh, how: population.How) -> Each:
    """``each(fn)(own, *shared)``: ``fn`` of one member, run for all of them.

    Compiled programs are found again by (fn, mesh, how) and the shapes, methods of equal objects by
    these objects.
    """
    settled = jax.block_until_ready if meshes.must_wait(mesh) else lambda out: out

    def each(fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
        run = _program(by_value(fn), mesh, how)

        def all_members(own: PyTree, *shared: PyTree) -> PyTree:
            if how != "dispatch":
                return settled(run(own, *shared))
            parts, join = _parts(mesh)
            return settled(join([settled(run(part, *shared)) for part in parts(own)]))

        return all_members

    return each


def context(
    task: Task, mesh: Mesh, data: Mapping[str, Dataset], how: population.How = "map"
) -> Context:
    """What ``fit`` gives to probes, to measure a population's state without a run.

    ``probe.measure(context, probe.start(context, state), state)`` is (carry, metrics).
    """
    return Context(task, each_member(mesh, how), mesh, data)
