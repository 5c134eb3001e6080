"""What a run would take on a machine that is not here: compiled for it, not run.

``mesh.topology(name)`` has the devices of a TPU slice, or of a larger CPU. ``fit`` on a mesh of
them raises ``Planned``, which knows the run and can compile it: the chunk of steps, and what its
probes run.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dynamics import mesh as meshes
from dynamics import population
from dynamics.chunk import Chunk
from dynamics.types import Probe, PyTree, StepProbe, TrainState
from dynamics.watch import Fold

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8, "s8": 1, "u8": 1}


class Collective(NamedTuple):
    """Equal collectives of a program; what is in a loop counts once, as a step does."""

    kind: str
    axes: tuple[str, ...]  # of the mesh that it runs along
    bytes: int  # what one chip has of the result, each time
    count: int


class Program(NamedTuple):
    """One compiled program, per chip."""

    name: str
    arguments: int  # bytes; parameters, optimizer, data and the like
    temporary: int  # bytes; activations, gradients, what a chunk leaves
    flops: float  # of one step: the compiler counts a loop's body once
    accessed: float  # bytes read and written in one step
    collectives: tuple[Collective, ...]


class Plan(NamedTuple):
    """What a run would take on each chip of a mesh."""

    mesh: Mesh
    replicas: int
    batch_size: int
    params: int  # bytes a chip
    optimizer: int
    extras: int
    data: int
    steps: int
    programs: tuple[Program, ...]  # the chunk of steps first, then the probes
    unplanned: dict[str, str]  # probes that can't be compiled unseen, and why

    @property
    def peak(self) -> int:
        """Bytes that the program of the most memory needs on a chip, the state included."""
        held = self.params + self.optimizer + self.extras + self.data
        return max(max(p.arguments, held) + p.temporary for p in self.programs)


class Planned(Exception):  # noqa: N818 - no error: the end of what can be done without the machine
    """Raised by ``fit`` on a mesh of another machine. ``state`` holds shapes."""

    def __init__(
        self,
        chunk: Callable[[], Chunk],
        state: TrainState,
        probes: Sequence[Probe],
        num_steps: int,
        batch_size: int,
    ):
        """``chunk`` makes the chunk: that traces the step."""
        super().__init__("a mesh of a machine that is not here: fit can compile for it, not run")
        self._chunk, self._state, self._probes = chunk, state, probes
        self.replicas, self.batch_size, self.num_steps = len(state.step), batch_size, num_steps

    def compile(self, *, probes: bool = True) -> Plan:
        """Compile the chunk, and the probes."""
        chunk = self._chunk()
        state = meshes.placed(self._state, chunk.where)
        programs, unplanned = [], {}
        aux, compiled = chunk.compiled(state)
        programs.append(read("step", compiled, chunk.mesh))
        for probe in self._probes if probes else ():
            try:
                programs += _of_probe(probe, chunk, state, aux)
            except Exception as error:  # whatever a probe does with numbers that are not there
                unplanned[probe.name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return Plan(
            mesh=chunk.mesh,
            replicas=self.replicas,
            batch_size=self.batch_size,
            params=held(state.params),
            optimizer=held(state.opt_state),
            extras=held(state.extras),
            data=held((chunk.shared, chunk.own)),
            steps=self.num_steps,
            programs=tuple(programs),
            unplanned=unplanned,
        )


def held(tree: PyTree) -> int:
    """Bytes that one chip holds of arrays or their shapes, by their shardings."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * _width(x) for x in jax.tree.leaves(tree)
    )


def _width(x: Any) -> int:
    key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return 8 if key else x.dtype.itemsize


def _of_probe(probe: Probe, chunk: Chunk, state: TrainState, aux: PyTree) -> list[Program]:
    """The programs of a probe: its fold over a chunk, or what it runs on the first measurement."""
    if isinstance(probe, StepProbe):
        fold = Fold(probe, chunk.mesh, chunk.how)
        carry = meshes.placed(jax.eval_shape(fold.init, state), meshes.over_replicas(chunk.mesh))
        compiled = fold.run.lower(carry, aux, np.int32(1)).compile()
        return [read(probe.name, compiled, chunk.mesh)]
    found: list[Program] = []

    def each(fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
        def all_replicas(own: PyTree, *shared: PyTree) -> PyTree:
            mine = meshes.shaped(own, chunk.mesh, chunk.rules)
            rest = meshes.placed(shared, meshes.everywhere(chunk.mesh))
            spread = jax.jit(population.spread(fn, chunk.mesh, chunk.how))
            found.append(read(probe.name, spread.lower(mine, *rest).compile(), chunk.mesh))
            zeros = lambda x: jnp.zeros(x.shape, x.dtype)  # noqa: E731
            return jax.tree.map(zeros, jax.eval_shape(spread, mine, *rest))

        return all_replicas

    jax.eval_shape(lambda s: probe.measure(probe.start(s, each), s, each), state)
    unique = {(p.arguments, p.temporary, p.flops): p for p in found}
    return list(unique.values())


# ---- reading a compiled program -----------------------------------------------------------------


def read(name: str, compiled: Any, mesh: Mesh) -> Program:
    """Memory, FLOPs and collectives of a compiled program, as its compiler reports them."""
    memory = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    return Program(
        name=name,
        arguments=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        flops=float(cost.get("flops", 0.0)),
        accessed=float(cost.get("bytes accessed", 0.0)),
        collectives=collectives(compiled.as_text(), mesh),
    )


def collectives(text: str, mesh: Mesh) -> tuple[Collective, ...]:
    """The collectives of a program's HLO text, by kind and the mesh axes they run along."""
    counts: dict[tuple[str, tuple[str, ...], int], int] = {}
    pattern = rf"= (\S.*?) ({'|'.join(KINDS)})(?:-start)?\("
    for line in text.splitlines():
        if found := re.search(pattern, line):
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", found[1])
            if "-start(" in line and len(shapes) > 1:  # operands and results of a pair
                shapes = shapes[len(shapes) // 2 :]
            size = sum(_size(kind, dims) for kind, dims in shapes)
            key = (found[2], _axes(line, mesh), size)
            counts[key] = counts.get(key, 0) + 1
    order = sorted(counts.items(), key=lambda item: -item[0][2] * item[1])
    return tuple(Collective(*key, count) for key, count in order)


def _size(kind: str, dims: str) -> int:
    width = BYTES.get(kind, 4)
    return width * int(np.prod([int(d) for d in dims.split(",") if d]))


def _axes(line: str, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group, or the two ends of a copy, differ."""
    groups = _groups(line, mesh.size)
    places = np.stack(np.unravel_index(np.arange(mesh.size), mesh.devices.shape), axis=1)
    differ = np.zeros(places.shape[1], bool)
    for group in groups:
        differ |= (places[group] != places[group[0]]).any(axis=0)
    return tuple(name for name, yes in zip(mesh.axis_names, differ, strict=True) if yes)


def _groups(line: str, size: int) -> list[list[int]]:
    """The groups of a collective: listed, or as a reshaped and transposed count."""
    if found := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        return _listed(found[1])
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, dims, order = (
            [int(n) for n in part.split(",")] if part else None for part in found.groups()
        )
        ids = np.arange(size).reshape(dims)
        ids = ids.transpose(order) if order else ids
        return [[int(i) for i in group] for group in ids.reshape(shape)]  # pyright: ignore
    if found := re.search(r"replica_groups=\{(.*?)\}\}", line):
        return _listed(found[1])
    return [list(range(size))]


def _listed(text: str) -> list[list[int]]:
    return [[int(n) for n in part.split(",")] for part in re.findall(r"[\d,]*\d", text)]
