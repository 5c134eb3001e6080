"""Early-learning regularization beside plain training: what a row of targets an example costs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import sides
from benchmarks.measure import Result, race
from benchmarks.plain import CLASSES, Lap, Side
from benchmarks.sides import Job
from dynamics import fit, models, step, task
from dynamics import mesh as meshes
from dynamics.chunk import Chunk
from dynamics.data.rows import take
from dynamics.data.stream import doubled, resident
from dynamics.types import Task, TrainState

REPLICAS = 10
ROWS = (2_000, 1_000_000)  # of targets, for the same examples
SCALARS = {"elr_lambda": 3.0, "elr_beta": 0.7}
METHODS = {"ce": "CE", "elr": "ELR", "plus": "ELR+"}
WORK = {"elr": 1, "plus": 2}  # steps of CE on as many examples
MB = 1e6


class Population(NamedTuple):
    """Replicas of a net that learns a job by one of ``METHODS``, with so many rows of targets."""

    job: Job
    method: str
    replicas: int
    rows: int

    def net(self) -> Task:
        """The task as an experiment makes it."""
        inner = self.job.task()
        if self.method == "ce":
            return inner
        make = {"elr": task.elr, "plus": task.elr_plus}[self.method]
        return make(inner, self.rows, CLASSES)

    def chunk(self) -> tuple[Chunk, TrainState]:
        """The step as ``fit`` compiles it, and the state it starts from."""
        mesh, net, optimizer = meshes.for_population(self.replicas), self.net(), self.optimizer()
        keys = jax.random.split(jax.random.key(0), self.replicas)
        scalars = sides.RULE.hyperparameters() | SCALARS
        state = fit.init(net, optimizer, keys, scalars, mesh)
        stream = resident(self.job.data, self.job.batch_size, self.replicas)
        stream = doubled(stream) if self.method == "plus" else stream
        return Chunk(net, optimizer, state, stream, mesh), state

    def optimizer(self) -> Any:
        """SGD, as of every benchmark."""
        return sides.RULE.make(1_000_000)

    def trained(self, steps: int) -> Side:
        """So many steps a lap, in chunks as long as they may be: what ``fit`` does in 0.25 s."""

        def run(lap: Lap) -> None:
            chunk, state = self.chunk()
            done = 0
            while True:
                left = steps
                while left:
                    count = min(left, chunk.max_steps)
                    state, _, _ = chunk.run(state, done, count)
                    done, left = done + count, left - count
                jax.block_until_ready(state)
                lap()

        return run

    def memory(self) -> tuple[float, float]:
        """Temporary and donated bytes of the chunk's program, on one device."""
        chunk, state = self.chunk()
        if chunk.program.how == "dispatch":
            return float("nan"), float("nan")
        arguments = (state, (chunk.own, ()), np.int32(1), chunk.shared)
        found: Any = chunk.program.loop.lower(*arguments).compile().memory_analysis()
        return found.temp_size_in_bytes, found.alias_size_in_bytes

    def flops(self) -> float:
        """Of one step of one replica, as the compiler counts them."""
        net, optimizer, b = self.net(), self.optimizer(), self.job.batch_size
        h = {name: jnp.float32(x) for name, x in SCALARS.items()}
        h |= {name: jnp.float32(x) for name, x in sides.RULE.hyperparameters().items()}
        state = jax.eval_shape(lambda key: step.init(net, optimizer, key, h), jax.random.key(0))
        rows = jnp.arange(b * (2 if self.method == "plus" else 1)) % b
        batch = jax.eval_shape(take, self.job.data, rows)
        program = jax.jit(step.make(net, optimizer)).lower(state, batch).compile()
        return (program.cost_analysis() or {}).get("flops", 0)

    def table(self) -> tuple[int, int]:
        """Bytes of one replica's targets, and of its parameters."""
        params, extras = jax.eval_shape(self.net().init, jax.random.key(0), {})
        size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
        return size(extras.get("targets", ())), size(params)


def elr_digits(quick: bool) -> list[Result]:
    """A step of a tenth of a millisecond: what the regulariser costs at its worst."""
    job = sides.digits()._replace(model=models.MLP(width=256, depth=2))
    return _methods("digits", job, 2 if quick else 80, quick)


def elr_mnist(quick: bool) -> list[Result]:
    """Targets of 60,000 examples."""
    job = sides.mnist()._replace(model=models.MLP(width=256, depth=2))
    return _methods("mnist", job, 1 if quick else 20, quick)


def _methods(name: str, job: Job, steps: int, quick: bool) -> list[Result]:
    """ELR beside CE, and ELR+, which trains two networks, beside two steps of CE."""
    k, rounds = (2, 1) if quick else (REPLICAS, 15)
    if quick:
        job = job._replace(model=models.MLP(width=8, depth=2))
    runs = {m: Population(job, m, k, len(job.data)) for m in METHODS}
    # a lap of CE does as many steps as one of ELR, on half the examples of one of ELR+
    found = race({m: run.trained(steps) for m, run in runs.items()}, rounds)
    devices = meshes.for_population(k).size
    about = f"{k} replicas on {devices} devices, {job.net()}, {len(job.data)} examples"
    flops, bytes_ = ({m: f(run) for m, run in runs.items()} for f in (Population.flops, _memory))
    out = []
    for m, work in WORK.items():
        beside = f"{METHODS[m]} / {'a step' if work == 1 else 'two steps'} of CE"
        goal, note = (1.1, job.about) if m == "elr" else (None, job.about)
        out.append(
            found.compare(
                *(f"{m}_{name}", f"{beside}: {about}", (m, steps), ("ce", steps / work)),
                goal=goal,
                note=note,
            )
        )
        counted = {
            "flops": ("compiled FLOPs of a replica's step", flops, work, "MFLOP"),
            "memory": ("temporary memory of a chunk on a device", bytes_, 1, "MB"),
        }
        for what, (words, count, times, unit) in counted.items():
            ours, theirs = count[m] / MB, count["ce"] * times / MB
            label = f"{words}, {beside if times == work else f'{METHODS[m]} / CE'}: {about}"
            out.append(_counted(f"{m}_{name}_{what}", label, ours, theirs, unit))
        table, params = (x / MB for x in runs[m].table())
        label = f"{METHODS[m]}'s targets / its parameters, a replica: {about}"
        out.append(_counted(f"{m}_{name}_table", label, table, params, "MB"))
    return out


def elr_rows(quick: bool) -> list[Result]:
    """The time of a step must not grow with the table: rows are written where they lie."""
    few, many = (256, 4096) if quick else ROWS
    job = sides.digits()._replace(data=sides.noise(256 if quick else few, 8, 8))
    job = job._replace(model=models.MLP(width=8 if quick else 256, depth=2))
    devices, rounds, out = meshes.for_population(REPLICAS).size, 1 if quick else 15, []
    for k in (devices, REPLICAS):
        runs = {str(n): Population(job, "elr", k, n) for n in (few, many)}
        steps = 2 if quick else 800 // k
        found = race({n: run.trained(steps) for n, run in runs.items()}, rounds)
        about = f"ELR with {many} / {few} rows of targets, {k} replicas on {devices} devices"
        small, large = runs.values()
        name, sizes = f"elr_rows_{k}", ((str(many), steps), (str(few), steps))
        goal = 1.1 if k == devices else None
        out.append(found.compare(name, f"{about}: {job.net()}", *sizes, goal=goal))
        grown, table = large.memory()[0] - small.memory()[0], large.table()[0]
        label = f"growth of a chunk's temporary memory on a device / a replica's table: {about}"
        goal = 0.01 if k == devices else None  # no copy of the table
        out.append(_counted(f"{name}_memory", label, grown / MB, table / MB, "MB", goal))
    return out


def _memory(run: Population) -> float:
    return run.memory()[0]


def _counted(
    name: str, what: str, ours: float, theirs: float, unit: str, goal: float | None = None
) -> Result:
    """A row that needs no clock."""
    if not np.isfinite(ours) or not theirs > 0:
        return Result(name, what, goal=goal, skipped="there is no such program, or no count")
    ratio = ours / theirs
    return Result(name, what, ours, theirs, unit, ratio, ratio, ratio, goal)
