"""Probes over a population: compiled apart from the step, so that watching changes no bit of it."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dynamics import mesh as meshes
from dynamics import population
from dynamics.types import NEVER, Aux, Probe, PyTree, Revision, StepProbe, TrainState


class Watch:
    """The probes of a run, and the revision of its data: their carries, cadences, metrics."""

    def __init__(
        self,
        probes: Sequence[Probe],
        state: TrainState,
        mesh: Mesh,
        how: population.How,
        revision: Revision | None = None,
        own: PyTree = None,
    ):
        """Starts every probe on the state before the first step, the revision on the data too."""
        self._probes = {probe.name: probe for probe in probes}
        self._revision = revision
        self._each = each_replica(mesh, how)
        self._mesh, self._lies = mesh, meshes.over_replicas(mesh)
        self._folds: dict[str, Fold] = {}
        self._metrics: dict[str, dict[str, jax.Array]] = {}
        self.carries: dict[str, Any] = {}
        for name, probe in self._probes.items():
            if isinstance(probe, StepProbe):
                self._folds[name] = Fold(probe, mesh, how)
                self.carries[name] = self._folds[name].init(state)
            else:
                self.carries[name] = probe.start(state, self._each)
        if revision is not None:
            begun = (revision.start(own, state, self._each), own)
            self.carries[revision.name] = meshes.put(begun, self._lies, mesh)

    def next(self, done: int) -> int:
        """The first step after ``done`` at which something is measured or revised."""
        watching = [*self._probes.values(), *([self._revision] if self._revision else [])]
        return min((next_due(one.every, done) for one in watching), default=NEVER)

    @property
    def own(self) -> PyTree:
        """What the batches of the next step are made from, as it was last revised."""
        assert self._revision is not None
        return self.carries[self._revision.name][1]

    def revise(self, state: TrainState, done: int) -> dict[str, jax.Array] | None:
        """Revise the data if that is due after ``done`` steps: its metrics, else None."""
        revision = self._revision
        if revision is None or not done or next_due(revision.every, done - 1) != done:
            return None
        carry, before = self.carries[revision.name]
        carry, own, metrics = revision.revise(carry, before, state, self._each)
        if (was := _shapes(before)) != (now := _shapes(own)):
            raise ValueError(f"revision {revision.name!r} must keep the shapes {was}, got {now}")
        self.carries[revision.name] = meshes.put((carry, own), self._lies, self._mesh)
        return {f"{revision.name}.{metric}": value for metric, value in metrics.items()}

    def fold(self, aux: Aux, count: int) -> None:
        """Show the steps of a chunk to the probes that read them."""
        for name, fold in self._folds.items():
            carry, metrics = fold.run(self.carries[name], aux, np.int32(count))
            self.carries[name], self._metrics[name] = carry, metrics

    def measure(self, state: TrainState, done: int, num_steps: int) -> dict[str, jax.Array]:
        """The metrics of the probes that are due after ``done`` steps."""
        found: dict[str, jax.Array] = {}
        given = {id(leaf) for leaf in jax.tree.leaves(state)}  # which the next step will overwrite
        for name, probe in self._probes.items():
            last = done == num_steps and isinstance(probe.every, int)
            if not (last or next_due(probe.every, done - 1) == done):
                continue
            if name in self._folds:
                metrics = self._metrics.get(name, {})  # nothing folded yet before the first step
            else:
                assert not isinstance(probe, StepProbe)
                self.carries[name], metrics = probe.measure(self.carries[name], state, self._each)
                metrics = {k: jnp.copy(v) if id(v) in given else v for k, v in metrics.items()}
            found |= {f"{name}.{metric}": value for metric, value in metrics.items()}
        return found


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


def each_replica(mesh: Mesh, how: population.How) -> Callable[..., Any]:
    """``each(fn)(own, *shared)``: ``fn`` of one replica, compiled once, run for all of them."""
    compiled: dict[Any, Any] = {}
    parts = jax.jit(lambda tree: population.split(tree, mesh))
    join = jax.jit(population.join)
    settled = jax.block_until_ready if meshes.must_wait(mesh) else lambda out: out

    def each(fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
        if fn not in compiled:
            compiled[fn] = jax.jit(population.spread(fn, mesh, how))
        run = compiled[fn]

        def all_replicas(own: PyTree, *shared: PyTree) -> PyTree:
            if how != "dispatch":
                return settled(run(own, *shared))
            return settled(join([settled(run(part, *shared)) for part in parts(own)]))

        return all_replicas

    return each
