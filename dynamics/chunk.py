"""A chunk of steps of a population as one compiled program.

The number of steps is an argument of the program, so chunks of any length, and so any cadence of
probes and checkpoints, run the same code: a run that is cut elsewhere has the same bits. Programs
are found again in the process by what they are made of: a second identical run traces nothing.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from dynamics import mesh as meshes
from dynamics import population, step
from dynamics.data.rows import check_classes
from dynamics.types import Aux, Observer, PyTree, Stream, Task, TrainState

CHUNK_BYTES = 8 * 2**20  # of Aux that a chunk makes, and batches it is fed, on each device
CHUNK_STEPS = 256  # enough that dispatching a chunk is little beside computing it
IN_FLIGHT = 4  # dispatching without bound hangs a CPU of several devices on jax 0.10

Metrics = dict[str, jax.Array]


class Chunk:
    """The train step of a population and what it is fed, in chunks of up to ``max_steps`` steps."""

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
        gradient: step.Gradient = step.BACKWARD,
        observers: Sequence[Observer] = (),
    ):
        """Finds the program of these parts and shapes again, or makes it: that traces the step."""
        self.mesh, self.stream, self.rules, self.layout = mesh, stream, rules, task.layout
        self.shared = meshes.put(stream.shared, meshes.everywhere(mesh), mesh)
        self.own = meshes.put(stream.own, meshes.over_replicas(mesh), mesh)
        self.fed_shapes = _fed_shapes(stream)
        shapes = jax.tree.map(_shape, (state, self.own, self.fed_shapes, self.shared))
        leaves, structure = jax.tree.flatten(shapes)
        self.program = program(
            task,
            optimizer,
            stream.batch,
            mesh,
            tuple(rules),
            how,
            accumulate,
            gradient,
            tuple(observers),
            structure,
            tuple(leaves),
        )
        aux = self.program.aux
        check_classes(stream.classes, aux.logits, aux.y, "labels of the stream")
        self.in_flight = 0 if meshes.must_wait(mesh) else IN_FLIGHT
        self._members = population.size(state)
        self._fed: tuple[int, Iterator[PyTree]] = (-1, iter(()))

    @property
    def max_steps(self) -> int:
        """The most steps of a chunk."""
        return self.program.max_steps

    def run(self, state: TrainState, first: int, count: int) -> tuple[TrainState, Aux, Metrics]:
        """Do the steps first..first+count-1; ``state`` is given up.

        Leaves of the Aux and the metrics are [K, max_steps, ...]; the first ``count`` are written.
        """
        rest = (self.own, self._feed(first, count))
        if self.program.how == "dispatch":
            return self.program.steps(state, rest, count, self.shared, self.in_flight)
        state, (aux, metrics) = self.program.loop(state, rest, np.int32(count), self.shared)
        return state, aux, metrics

    def compiled(self, state: TrainState) -> tuple[PyTree, jax.stages.Compiled]:
        """The shapes of the Aux of a chunk, and its program (of a step, if they are dispatched)."""
        made = self.program
        lies, shapes = meshes.over_replicas(self.mesh), jax.eval_shape(made.room)
        wide = lambda x: jax.ShapeDtypeStruct((self._members, *x.shape), x.dtype)  # noqa: E731
        outs = meshes.placed(jax.tree.map(wide, shapes), lies)
        long = lambda x: jax.ShapeDtypeStruct(  # noqa: E731
            (self._members, self.max_steps, *x.shape), x.dtype
        )
        fed = meshes.placed(jax.tree.map(long, self.fed_shapes), meshes.over_batches(self.mesh))
        rest = (self.own, fed)
        if made.how == "dispatch":
            carry, part = jax.eval_shape(made.prepare, state, rest)[0]
            lowered = made.single.lower(carry, part, np.int32(0), self.shared)
        else:
            lowered = made.loop.lower(state, rest, np.int32(1), self.shared)
        return outs[0], lowered.compile()

    def _feed(self, first: int, count: int) -> PyTree:
        """The batches of a chunk, [K, max_steps, ...] with zeros after the last one.

        A process reads the examples that its devices need, and no others.
        """
        if self.stream.host is None:
            return ()
        lies, steps = meshes.over_batches(self.mesh), slice(0, self.max_steps)
        k, size = self._members, self.stream.batch_size
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


class Program:
    """The step of a population, traced and compiled; it holds no data."""

    def __init__(
        self,
        advance: Callable[..., Callable[..., Any]],
        mesh: Mesh,
        where: PyTree,
        how: population.How | None,
        shapes: PyTree,
    ):
        """``advance(unroll, split)`` is a step of one member, of ``shapes`` with a member axis; its
        batch is split over the data axis of the mesh with ``split``.
        """
        state, own, fed, shared = shapes
        member = jax.eval_shape(lambda tree: population.take(tree, 0), (state, own))
        trace = jax.make_jaxpr(advance(False), return_shape=True)
        jaxpr, (_, self._outs) = trace(*member, fed, shared)
        alone = mesh.shape[meshes.AXES[1]] == 1  # else the step names the devices of its parts
        again = jax.make_jaxpr(advance(False, split=False))
        self.jaxpr = lambda: jaxpr if alone else again(*member, fed, shared)  # whatever the mesh
        platform = mesh.devices.flat[0].platform
        convolutional = population.has_convolution(jaxpr)
        self.how: population.How = how or population.choose(platform, convolutional)
        self.convolves = convolutional and platform == "cpu"  # then no compiled loop may hold it
        self.advance = advance(self.convolves)
        self.mesh, self.where = mesh, where
        self._here = population.size(state) // mesh.shape[meshes.AXES[0]]
        each = sum(
            math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves((self._outs, fed))
        )
        self.max_steps = max(1, min(CHUNK_STEPS, CHUNK_BYTES // (each * self._here)))
        self.laid = jax.jit(lambda tree: tree, out_shardings=where)  # a copy where it should lie
        if self.how == "dispatch":
            self._compile_single()
        else:
            self._compile_loop()

    @property
    def aux(self) -> Aux:
        """The shapes of the Aux of one step of one member."""
        return self._outs[0]

    # ---- the same steps, as a loop inside a program or as a program a step --------------------

    def room(self) -> PyTree:
        """Zeros in the shapes of the Aux and the metrics of the steps of a chunk."""
        wide = lambda x: jnp.zeros((self.max_steps, *x.shape), x.dtype)  # noqa: E731
        return jax.tree.map(wide, self._outs)

    def _body(self, i: jax.Array, carry: PyTree, own: PyTree, fed: PyTree, shared: PyTree) -> Any:
        state, outs = carry
        now = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, False), fed)
        state, out = self.advance(state, own, now, shared)
        put = lambda room, x: jax.lax.dynamic_update_index_in_dim(room, x, i, 0)  # noqa: E731
        return state, jax.tree.map(put, outs, out)

    def _compile_loop(self) -> None:
        def loop(members: tuple, count: jax.Array, shared: PyTree) -> Any:
            state, (own, fed) = members
            body = lambda i, carry: self._body(i, carry, own, fed, shared)  # noqa: E731
            return jax.lax.fori_loop(0, count, body, (state, self.room()))

        outs = jax.eval_shape(self.room)
        run = population.spread(loop, self.mesh, self.how, carried=outs)

        def train_chunk(state: TrainState, rest: PyTree, count: jax.Array, shared: PyTree) -> Any:
            return run((state, rest), count, shared)

        self.loop = jax.jit(train_chunk, donate_argnums=0, out_shardings=(self.where, None))

    def _compile_single(self) -> None:
        def single(members: tuple, i: jax.Array, shared: PyTree) -> Any:
            carry, (own, fed) = members
            state, outs = self._body(i, carry, own, fed, shared)
            return (state, outs), outs[1]["loss"][i]

        run = population.spread(single, self.mesh, self.how)
        room = population.spread(lambda state: self.room(), self.mesh, "vmap")

        def train_step(carry: PyTree, rest: PyTree, i: jax.Array, shared: PyTree) -> Any:
            return run((carry, rest), i, shared)

        def prepare(state: TrainState, rest: PyTree) -> Any:
            return population.split(((state, room(state)), rest), self.mesh)

        lies = meshes.over_replicas(self.mesh)
        carry = (self.where, lies)
        parts = [(carry, lies)] * self._here
        self.prepare = jax.jit(prepare, out_shardings=parts)
        self.single = jax.jit(train_step, donate_argnums=0, out_shardings=(carry, lies))
        self._join = jax.jit(population.join, out_shardings=carry)

    def steps(
        self, state: TrainState, rest: PyTree, count: int, shared: PyTree, in_flight: int
    ) -> tuple[TrainState, Aux, Metrics]:
        """The steps of a chunk, each a call of a program."""
        carries = []
        for carry, part in self.prepare(state, rest):
            pending = []
            for i in range(count):
                carry, loss = self.single(carry, part, np.int32(i), shared)
                pending.append(loss)
                if len(pending) > in_flight:
                    pending.pop(0).block_until_ready()
            carries.append(carry)
        state, (aux, metrics) = self._join(carries)
        return state, aux, metrics


@functools.lru_cache(maxsize=32)
def program(
    task: Task,
    optimizer: optax.GradientTransformation,
    batch: Callable[..., Any],
    mesh: Mesh,
    rules: meshes.Rules,
    how: population.How | None,
    accumulate: int,
    gradient: step.Gradient,
    observers: tuple[Observer, ...],
    structure: Any,
    leaves: tuple[jax.ShapeDtypeStruct, ...],
) -> Program:
    """The program of these parts for a state, batches and data of these shapes: made once."""

    def advance(unroll: bool, split: bool = True) -> Callable[..., Any]:
        update = step.make(
            task,
            optimizer,
            gradient=gradient,
            observers=observers,
            accumulate=accumulate,
            unroll=unroll,
        )

        def one(state: TrainState, own: PyTree, fed: PyTree, shared: PyTree) -> Any:
            examples = batch(shared, own, fed, state.key, state.step)
            examples = meshes.split_batch(examples, mesh) if split else examples
            state, aux, metrics = update(state, examples)
            return state, (aux, metrics)

        return one

    shapes = jax.tree.unflatten(structure, leaves)
    where = meshes.shardings(shapes[0], mesh, rules, task.layout)
    return Program(advance, mesh, where, how, shapes)


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _fed_shapes(stream: Stream) -> PyTree:
    """The shapes of what one member is fed from the host for a step."""
    if stream.host is None:
        return ()
    first = next(stream.host(0))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), first)
