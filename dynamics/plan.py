"""What a run would take on a machine that is not here: compiled for it, not run.

``mesh.topology(name)`` has the devices of a TPU slice, or of a larger CPU. ``fit`` on a mesh of
them raises ``Planned``, which knows the run and can compile it: the chunk of steps, and what its
probes run.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh

from dynamics import mesh as meshes
from dynamics import population
from dynamics.chunk import Chunk
from dynamics.task import by_value
from dynamics.types import Context, Dataset, Probe, PyTree, StepProbe, Task, TrainState
from dynamics.watch import Fold

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8, "s8": 1, "u8": 1}

# what a probe runs is compiled for TPUs in a third of the time: FLOPs and collectives are the same,
# memory is off by a tenth (ResNet-18), bytes read and written by up to a half
QUICK = {"exec_time_optimization_effort": -1.0}


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


class Work(NamedTuple):
    """What a step of the whole population is made of, counted from its equations: no compiler."""

    replicas: int
    batch_size: int
    params: int  # bytes
    state: int  # parameters, optimizer and the rest
    data: int  # on each chip
    flops: float  # of matrix products and convolutions
    moved: float  # bytes of their operands and results; the rest is fused into them
    kept: float  # bytes of their results


class Planned(Exception):  # noqa: N818 - no error: the end of what can be done without the machine
    """Raised by ``fit`` on a mesh of another machine. ``state`` holds shapes."""

    def __init__(
        self,
        chunk: Callable[[], Chunk],
        state: TrainState,
        task: Task,
        probes: Sequence[Probe],
        data: Mapping[str, Dataset],
        num_steps: int,
        batch_size: int,
    ):
        """``chunk`` makes the chunk: that traces the step."""
        super().__init__("a mesh of a machine that is not here: fit can compile for it, not run")
        self._chunk, self._state, self._probes = chunk, state, probes
        self._task, self._data = task, data
        self.replicas, self.batch_size, self.num_steps = (
            population.size(state),
            batch_size,
            num_steps,
        )

    def work(self) -> Work:
        """What a step takes, in about a second: to choose a mesh by."""
        chunk, k = self._chunk(), self.replicas
        take = lambda tree: population.take(tree, 0)  # noqa: E731
        member = jax.eval_shape(take, (self._state, chunk.own))
        flops, moved, kept = counted(
            jax.make_jaxpr(chunk.program.advance)(*member, chunk.fed_shapes, chunk.shared)
        )
        return Work(
            replicas=k,
            batch_size=self.batch_size,
            params=_whole(self._state.params),
            state=_whole(self._state),
            data=held((chunk.shared, chunk.own)),
            flops=k * flops,
            moved=k * moved,
            kept=k * kept,
        )

    def compile(self, *, probes: bool = True) -> Plan:
        """Compile the chunk, and the probes."""
        chunk = self._chunk()
        state = meshes.placed(self._state, chunk.program.where)
        programs, unplanned = [], {}
        aux, compiled = chunk.compiled(state)
        programs.append(read("step", compiled, chunk.mesh))
        for probe in self._probes if probes else ():
            try:
                programs += self._of_probe(probe, chunk, state, aux)
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

    def _of_probe(
        self, probe: Probe, chunk: Chunk, state: TrainState, aux: PyTree
    ) -> list[Program]:
        """The programs of a probe: its fold over a chunk, or what it runs at the first step."""
        if isinstance(probe, StepProbe):
            fold = Fold(probe, chunk.mesh, chunk.program.how)
            carry = meshes.placed(
                jax.eval_shape(fold.init, state), meshes.over_replicas(chunk.mesh)
            )
            compiled = fold.run.lower(carry, aux, np.int32(1)).compile()
            return [read(probe.name, compiled, chunk.mesh)]
        found: dict[Any, tuple[Program, PyTree]] = {}  # data go through one program batch by batch

        def each(fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
            def all_replicas(own: PyTree, *shared: PyTree) -> PyTree:
                mine = meshes.shaped(own, chunk.mesh, chunk.rules, chunk.layout)
                rest = meshes.placed(shared, meshes.everywhere(chunk.mesh))
                key = (by_value(fn), str(jax.tree.map(lambda x: (x.shape, x.dtype), (mine, rest))))
                if key not in found:
                    spread = jax.jit(population.spread(fn, chunk.mesh, chunk.program.how))
                    lowered = spread.lower(mine, *rest)
                    tpu = chunk.mesh.devices.flat[0].platform == "tpu"
                    options: dict[str, Any] = {"compiler_options": QUICK} if tpu else {}
                    compiled = lowered.compile(**options)
                    found[key] = read(probe.name, compiled, chunk.mesh), lowered.out_info
                zeros = lambda x: jnp.zeros(x.shape, x.dtype)  # noqa: E731
                return jax.tree.map(zeros, found[key][1])

            return all_replicas

        context = Context(self._task, each, chunk.mesh, self._data)

        def measure(state: TrainState) -> PyTree:
            return probe.measure(context, probe.start(context, state), state)

        jax.eval_shape(measure, state)
        unique = {(p.arguments, p.temporary, p.flops): p for p, _ in found.values()}
        return list(unique.values())


def held(tree: PyTree) -> int:
    """Bytes that one chip holds of arrays or their shapes, by their shardings."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * _width(x) for x in jax.tree.leaves(tree)
    )


def counted(jaxpr: Any) -> np.ndarray:
    """FLOPs, bytes of operands and results, and of results, of all products in a (closed) jaxpr.

    What is in a loop counts as often as it runs, or once where that is not known.
    """
    total = np.zeros(3)
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        times = eqn.params.get("length", 1)
        total += times * sum(map(counted, jaxprs_in_params(eqn.params)), np.zeros(3))
        if eqn.primitive.name not in ("dot_general", "conv_general_dilated"):
            continue
        (out,), (left, right) = eqn.outvars, (v.aval for v in eqn.invars)
        if eqn.primitive.name == "dot_general":
            summed = math.prod(left.shape[i] for i in eqn.params["dimension_numbers"][0][0])
        else:
            features = eqn.params["dimension_numbers"].rhs_spec[0]
            summed = math.prod(right.shape) // right.shape[features]
        size = _whole(out.aval)
        total += (2 * out.aval.size * summed, size + _whole((left, right)), size)
    return total


def _whole(tree: PyTree) -> int:
    return sum(math.prod(x.shape) * _width(x) for x in jax.tree.leaves(tree))


def _width(x: Any) -> int:
    key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return 8 if key else x.dtype.itemsize


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
    seen: set[str] = set()  # TPUs repeat a channel in each fusion that it goes on beside
    pattern = rf"= (\S.*?) ({'|'.join(KINDS)})(?:-start)?\("
    for line in text.splitlines():
        if found := re.search(pattern, line):
            channel = re.search(r"channel_id=\d+", line)
            if channel and (channel[0] in seen or seen.add(channel[0])):
                continue
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", found[1])
            if f"{found[2]}-start(" in line and found[2] in ("all-gather", "collective-permute"):
                shapes = [one for one in shapes if one != ("u32", "")]  # what a permute counts by
                shapes = shapes[len(shapes) // 2 :]  # of operands and results
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
    if found := re.search(r"replica_groups=(\[[\d,]+\])<=(\S*?),? ", line + " "):
        return _numbered(found[2]).reshape(_listed(found[1])[0]).tolist()
    pattern = r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}"
    if found := re.search(pattern, line):
        return _along(*found.groups())
    if found := re.search(r"replica_groups=\{(.*?)\}\}", line):
        return _listed(found[1])
    if re.search(r"replica_groups=(?!\{\})", line):
        raise ValueError(f"the groups of a collective can't be read: {line.strip()[:200]}")
    return [list(range(size))]


def _numbered(text: str) -> np.ndarray:
    """``[4,2]T(1,0)``: 0, 1, ... in this shape, transposed; or listed as they are."""
    shape, _, order = text.partition("T")
    (dims,) = _listed(shape)
    if "[" not in shape:
        return np.array(dims)
    ids = np.arange(math.prod(dims)).reshape(dims)
    return ids.transpose(_listed(order)[0]) if order else ids


def _along(sizes: str, devices: str | None, axes: str) -> list[list[int]]:
    """The groups along ``'b'``, or ``'b':(2)4``, a part of it, of a mesh ``'a'=2,'b'=8``."""
    pattern = r"'(\w+)':\((\d+)\)(\d+)"
    parts = {name: (int(a), int(b)) for name, a, b in re.findall(pattern, axes)}
    dims, moved = [], []
    for name, size in re.findall(r"'(\w+)'=(\d+)", sizes):
        before, here = parts.get(name, (1, int(size)))
        if f"'{name}'" in axes:
            moved.append(len(dims) + 1)
        dims += [before, here, int(size) // (before * here)]
    ids = _numbered(devices or f"[{math.prod(dims)}]").reshape(dims)
    group = math.prod(dims[i] for i in moved)
    return np.moveaxis(ids, moved, range(-len(moved), 0)).reshape(-1, group).tolist()


def _listed(text: str) -> list[list[int]]:
    return [[int(n) for n in part.split(",")] for part in re.findall(r"[\d,]*\d", text)]
