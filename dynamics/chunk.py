"""A chunk of steps of a population as one compiled program.

The number of steps is an argument of the program, so chunks of any length, and so any cadence of
probes and checkpoints, run the same code: a run that is cut elsewhere has the same bits.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from dynamics import mesh as meshes
from dynamics import population, step
from dynamics.types import Aux, PyTree, Stream, Task, TrainState

CHUNK_BYTES = 8 * 2**20  # of Aux that a chunk makes, and batches it is fed, on each device
CHUNK_STEPS = 256  # enough that dispatching a chunk is little beside computing it
IN_FLIGHT = 4  # dispatching without bound hangs a CPU of several devices on jax 0.10

Metrics = dict[str, jax.Array]


class Chunk:
    """The train step of a population, compiled for chunks of up to ``max_steps`` steps."""

    def __init__(
        self,
        task: Task,
        optimizer: optax.GradientTransformation,
        state: TrainState,
        stream: Stream,
        mesh: Mesh,
        *,
        rules: meshes.Rules = meshes.TENSOR_PARALLEL,
        how: population.How | None = None,
        accumulate: int = 1,
    ):
        """Traces the step once, to learn its shapes and whether it convolves."""
        self.mesh, self.stream, self.rules = mesh, stream, rules
        self.where = meshes.shardings(state, mesh, rules)
        self.shared = meshes.put(stream.shared, meshes.everywhere(mesh), mesh)
        self.own = meshes.put(stream.own, meshes.over_replicas(mesh), mesh)
        self._here = len(state.step) // mesh.shape[meshes.AXES[0]]
        self._fed: tuple[int, Iterator[PyTree]] = (-1, iter(()))

        def advance(unroll: bool) -> Callable[..., Any]:
            update = step.make(task, optimizer, accumulate=accumulate, unroll=unroll)

            def one(state: TrainState, own: PyTree, fed: PyTree, shared: PyTree) -> Any:
                batch = stream.batch(shared, own, fed, state.key, state.step)
                state, aux, metrics = update(state, meshes.split_batch(batch, mesh))
                return state, (aux, metrics)

            return one

        member = jax.eval_shape(lambda tree: jax.tree.map(lambda x: x[0], tree), (state, self.own))
        trace = jax.make_jaxpr(advance(False), return_shape=True)
        fed = self._fed_shapes()
        jaxpr, (_, self._outs) = trace(*member, fed, self.shared)
        platform = mesh.devices.flat[0].platform
        convolutional = population.has_convolution(jaxpr)
        self.how: population.How = how or population.choose(platform, convolutional)
        self.in_flight = 0 if meshes.must_wait(mesh) else IN_FLIGHT
        each = sum(
            math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves((self._outs, fed))
        )
        self.max_steps = max(1, min(CHUNK_STEPS, CHUNK_BYTES // (each * self._here)))
        self._advance = advance(unroll=convolutional and platform == "cpu")
        if self.how == "dispatch":
            self._compile_single()
        else:
            self._compile_loop()

    def run(self, state: TrainState, first: int, count: int) -> tuple[TrainState, Aux, Metrics]:
        """Do the steps first..first+count-1; ``state`` is given up.

        Leaves of the Aux and the metrics are [K, max_steps, ...]; the first ``count`` are written.
        """
        fed = self._feed(first, count)
        if self.how == "dispatch":
            state, (aux, metrics) = self._run_single(state, fed, count)
        else:
            rest = (self.own, fed)
            state, (aux, metrics) = self._loop(state, rest, np.int32(count), self.shared)
        return state, aux, metrics

    def compiled(self, state: TrainState) -> tuple[PyTree, jax.stages.Compiled]:
        """The shapes of the Aux of a chunk, and its program (of a step, if they are dispatched)."""
        lies, shapes = meshes.over_replicas(self.mesh), jax.eval_shape(self._room)
        k = len(state.step)
        wide = lambda x: jax.ShapeDtypeStruct((k, *x.shape), x.dtype)  # noqa: E731
        outs = meshes.placed(jax.tree.map(wide, shapes), lies)
        fed = jax.tree.map(wide, self._fed_room())
        fed = meshes.placed(fed, meshes.over_batches(self.mesh))
        if self.how == "dispatch":
            carry, rest = jax.eval_shape(self._prepare, state, self.own, fed)[0]
            arguments = (carry, rest, np.int32(0), self.shared)
            return outs[0], self._single.lower(*arguments).compile()
        rest = (self.own, fed)
        program = self._loop.lower(state, rest, np.int32(1), self.shared)
        return outs[0], program.compile()

    # ---- the same steps, as a loop inside a program or as a program a step --------------------

    def _room(self) -> PyTree:
        """For what the steps of a chunk leave."""
        room = lambda x: jnp.zeros((self.max_steps, *x.shape), x.dtype)  # noqa: E731
        return jax.tree.map(room, self._outs)

    def _body(self, i: jax.Array, carry: PyTree, own: PyTree, fed: PyTree, shared: PyTree) -> Any:
        state, outs = carry
        now = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, False), fed)
        state, out = self._advance(state, own, now, shared)
        put = lambda room, x: jax.lax.dynamic_update_index_in_dim(room, x, i, 0)  # noqa: E731
        return state, jax.tree.map(put, outs, out)

    def _compile_loop(self) -> None:
        def loop(members: tuple, count: jax.Array, shared: PyTree) -> Any:
            state, (own, fed) = members
            body = lambda i, carry: self._body(i, carry, own, fed, shared)  # noqa: E731
            return jax.lax.fori_loop(0, count, body, (state, self._room()))

        outs = jax.eval_shape(self._room)
        run = population.spread(loop, self.mesh, self.how, carried=outs)

        def train_chunk(state: TrainState, rest: PyTree, count: jax.Array, shared: PyTree) -> Any:
            return run((state, rest), count, shared)

        self._loop = jax.jit(train_chunk, donate_argnums=0, out_shardings=(self.where, None))

    def _compile_single(self) -> None:
        def single(members: tuple, i: jax.Array, shared: PyTree) -> Any:
            carry, (own, fed) = members
            state, outs = self._body(i, carry, own, fed, shared)
            return (state, outs), outs[1]["loss"][i]

        run = population.spread(single, self.mesh, self.how)
        room = population.spread(lambda state: self._room(), self.mesh, "vmap")

        def train_step(carry: PyTree, rest: PyTree, i: jax.Array, shared: PyTree) -> Any:
            return run((carry, rest), i, shared)

        def prepare(state: TrainState, own: PyTree, fed: PyTree) -> Any:
            return population.split(((state, room(state)), (own, fed)), self.mesh)

        lies = meshes.over_replicas(self.mesh)
        carry = (self.where, lies)
        parts = [(carry, lies)] * self._here
        self._prepare = jax.jit(prepare, out_shardings=parts)
        self._single = jax.jit(train_step, donate_argnums=0, out_shardings=(carry, lies))
        self._join = jax.jit(population.join, out_shardings=carry)

    def _run_single(self, state: TrainState, fed: PyTree, count: int) -> Any:
        carries = []
        for carry, rest in self._prepare(state, self.own, fed):
            pending = []
            for i in range(count):
                carry, loss = self._single(carry, rest, np.int32(i), self.shared)
                pending.append(loss)
                if len(pending) > self.in_flight:
                    pending.pop(0).block_until_ready()
            carries.append(carry)
        return self._join(carries)

    # ---- batches from the host -----------------------------------------------------------------

    def _fed_shapes(self) -> PyTree:
        """The shapes of what one replica is fed for a step."""
        if self.stream.host is None:
            return ()
        first = next(self.stream.host(0))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), first)

    def _fed_room(self) -> PyTree:
        """The shapes of what one replica is fed for a chunk."""
        wide = lambda x: jax.ShapeDtypeStruct((self.max_steps, *x.shape), x.dtype)  # noqa: E731
        return jax.tree.map(wide, self._fed_shapes())

    def _feed(self, first: int, count: int) -> PyTree:
        """The batches of a chunk, [K, max_steps, ...] with zeros after the last one.

        A process reads the examples that its devices need, and no others.
        """
        if self.stream.host is None:
            return ()
        lies, steps = meshes.over_batches(self.mesh), slice(0, self.max_steps)
        k, size = self._here * self.mesh.shape[meshes.AXES[0]], self.stream.batch_size
        replicas, _, examples = meshes.own_block(lies, (k, self.max_steps, size))
        position, source = self._fed
        if position != first:
            source = self.stream.host(first, (replicas, examples))
        fetched = [next(source) for _ in range(count)]
        self._fed = (first + count, source)
        fetched += [jax.tree.map(np.zeros_like, fetched[0])] * (self.max_steps - count)

        def whole(*parts: np.ndarray) -> jax.Array:
            block = np.stack(parts, axis=1)
            at = (replicas, steps, examples, *(slice(0, n) for n in block.shape[3:]))
            return meshes.from_block(block, at, lies, (k, self.max_steps, size, *block.shape[3:]))

        return jax.tree.map(whole, *fetched)
