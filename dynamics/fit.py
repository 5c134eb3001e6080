"""The only loop over steps: chunks, bounded dispatch, probes, checkpoints, rows."""

import functools
import logging
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from dynamics import hosts, population, step
from dynamics import mesh as meshes
from dynamics.checkpoint import CheckpointError, Checkpoints
from dynamics.chunk import IN_FLIGHT, Chunk
from dynamics.plan import Planned
from dynamics.record import Recorder
from dynamics.types import NEVER, Probe, Results, Revision, Stream, Task, TrainState
from dynamics.watch import Watch, next_due

log = logging.getLogger(__name__)

CHUNK_SECONDS = 0.25  # what a chunk should take: signals and the progress line wait for its end
CHECKPOINT_SECONDS = 60.0
SAY_SECONDS = 0.2


def init(
    task: Task,
    optimizer: optax.GradientTransformation,
    keys: jax.Array,
    hyperparameters: Mapping[str, Any],
    mesh: Mesh,
    rules: meshes.Rules = meshes.TENSOR_PARALLEL,
) -> TrainState:
    """The state of a population, made where it will lie: one replica for each of ``keys`` [K].

    A hyperparameter is one number for all replicas or K of them. Shapes alone on a mesh of a
    machine that is not here. ValueError: another length.
    """
    k = len(keys)
    meshes.check(mesh, k)
    scalars = {}
    for name, value in hyperparameters.items():
        array = np.asarray(value, np.float32)
        if array.shape not in ((), (k,)):
            raise ValueError(f"{name} must be one number or {k}, one a replica, got {array.shape}")
        scalars[name] = np.broadcast_to(array, (k,))

    def make(keys: jax.Array, scalars: dict[str, jax.Array]) -> TrainState:
        return jax.vmap(lambda key, h: step.init(task, optimizer, key, h))(keys, scalars)

    shapes = jax.eval_shape(make, keys, scalars)
    if meshes.is_elsewhere(mesh):
        return meshes.shaped(shapes, mesh, rules)
    where = meshes.shardings(shapes, mesh, rules)
    return jax.jit(make, out_shardings=where)(keys, scalars)


def fit(
    task: Task,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    stream: Stream,
    num_steps: int,
    mesh: Mesh,
    *,
    probes: Sequence[Probe] = (),
    revision: Revision | None = None,
    store: Recorder | None = None,
    rules: meshes.Rules = meshes.TENSOR_PARALLEL,
    how: population.How | None = None,
    accumulate: int = 1,
    checkpoint_every: int | None = None,
    record_every: int = 1,
    name: str = "fit",
) -> Results:
    """Train the population ``state`` until it has done ``num_steps`` steps.

    Rows: one for each (step, replica) with the loss of that step before its update, at every
    ``record_every``-th step; and one for each replica where a probe measured, with its metrics of
    the state after ``step`` updates (always at the last step, too, unless the probe lists its
    steps). Arrays: ``<probe>.<metric>@<step>`` [K, ...], and ``diverged`` [K], the first step with
    a loss that was not finite (infinity if none).

    With a ``store`` the run is continued from its newest checkpoint and saved every
    ``checkpoint_every`` steps (about every minute if None), at the end, and on SIGTERM, which then
    ends the process with status 0. Results with and without a store are equal, as are those of an
    undisturbed run and of one killed and continued on the same mesh, bit for bit.

    On a GPU the bits are equal with XLA_FLAGS=--xla_gpu_deterministic_ops=true. Rows are also kept
    in memory, steps / record_every x K of them.

    A ``revision`` changes what the batches are made from (the stream's ``own``) while training.

    ``how`` overrides ``population.choose``. The state passed in stays valid. Cost: one gradient
    evaluation of the batch for each step and replica; the task's loss is traced twice. ValueError,
    before anything is compiled, for sizes that don't fit together. ``plan.Planned`` on a mesh of a
    machine that is not here (``mesh.topology``): it can compile the run for it; nothing is run.
    """
    meshes.check(mesh, len(state.step), stream.batch_size // accumulate)
    _check(state, stream, num_steps, probes, accumulate, checkpoint_every, record_every, revision)
    if meshes.is_elsewhere(mesh):
        options = {"rules": rules, "how": how, "accumulate": accumulate}
        chunk = functools.partial(Chunk, task, optimizer, state, stream, mesh, **options)
        raise Planned(chunk, state, probes, num_steps, stream.batch_size)
    checkpoints = Checkpoints(store.path) if store is not None else None
    saving = nullcontext() if checkpoints is None else closing(checkpoints)  # whatever happens
    with _among_processes(), saving, _terminated(listen=store is not None) as terminated:
        chunk = Chunk(
            task, optimizer, state, stream, mesh, rules=rules, how=how, accumulate=accumulate
        )
        state = jax.jit(lambda tree: tree, out_shardings=chunk.where)(state)
        watch = Watch(probes, state, mesh, chunk.how, revision, chunk.own)
        book = _Book(store, record_every)
        found = checkpoints.restore((state, watch.carries)) if checkpoints is not None else None
        if found is not None:
            before, ((state, watch.carries), position) = state, found
            _check_same_run(before, state, checkpoints)
        done = int(meshes.fetch(state.step)[0])
        if done > num_steps:
            raise ValueError(f"num_steps is {num_steps}, but {done} steps are already done")
        book.resume(position if found is not None else None)
        if revision is not None:
            chunk.own = watch.own
        saved = done if found is not None else None
        if found is None:
            book.measured(done, watch.measure(state, done, num_steps))
        pace = _Pace(name, done, num_steps, len(state.step), checkpoint_every)

        def decide() -> tuple[int, bool, bool]:
            """Where the next chunk ends, whether to save there, and whether to stop instead."""
            end = min(watch.next(done), pace.next(done, chunk.max_steps), num_steps)
            return end, pace.save(end), terminated.is_set() or hosts.asked_to_stop()

        while True:
            if terminated.is_set():
                hosts.ask_to_stop()
            end, save, stopped = hosts.once(decide)
            if stopped or done == num_steps:
                break
            first, done = done, end
            state, aux, metrics = chunk.run(state, first, done - first)
            if not chunk.in_flight:
                jax.block_until_ready(state)
            watch.fold(aux, done - first)
            book.trained(first, done, metrics)
            book.measured(done, watch.measure(state, done, num_steps))
            if (revised := watch.revise(state, done)) is not None:
                chunk.own = watch.own
                book.measured(done, revised)
            hosts.reached(done)  # what follows waits for the others
            if not pace.known or not chunk.in_flight:
                book.settle()  # to know how long a step takes before more are dispatched
            pace.tick(book.fetched, book.loss)
            if checkpoints is not None and save:
                checkpoints.save(done, (state, watch.carries), book.settle())
                saved = done
        position = book.settle()
        pace.tick(book.fetched, book.loss)
        if checkpoints is not None and saved != done:
            checkpoints.save(done, (state, watch.carries), position)
            checkpoints.wait()
        if stopped:
            log.warning("%s: stopped by SIGTERM at step %d; it can be continued", name, done)
            raise SystemExit(0)
    diverged = meshes.fetch(state.diverged).astype(np.float64)
    book.arrays["diverged"] = np.where(diverged == NEVER, np.inf, diverged)
    return Results(book.columns(), book.arrays, state)


def _check_same_run(given: TrainState, restored: TrainState, checkpoints: Any) -> None:
    """CheckpointError unless what never changes in a run is equal."""
    one, other = (
        jax.tree.leaves(meshes.fetch((jax.random.key_data(state.key), state.hyperparameters)))
        for state in (given, restored)
    )
    if not all(map(np.array_equal, one, other)):
        raise CheckpointError(
            f"the checkpoints in {checkpoints.root} are of a run with other keys or "
            "hyperparameters: give another folder"
        )


def _check(
    state: TrainState,
    stream: Stream,
    num_steps: int,
    probes: Sequence[Probe],
    accumulate: int,
    checkpoint_every: int | None,
    record_every: int,
    revision: Revision | None,
) -> None:
    k = len(state.step)
    if hosts.count() != jax.process_count():
        raise RuntimeError(
            f"jax has {jax.process_count()} processes and dynamics.hosts finds {hosts.count()}: "
            "this jax keeps them elsewhere; use one below 0.13"
        )
    if revision is not None and stream.host is not None:
        raise ValueError(
            f"revision {revision.name!r} needs data that lie on the device, this stream reads them "
            "from the host: use data.stream.resident"
        )
    for leaf in jax.tree.leaves(stream.own):
        if leaf.shape[0] != k:
            raise ValueError(
                f"the stream is for {leaf.shape[0]} replicas, the state has {k}: give both the same"
            )
    if stream.batch_size % accumulate:
        raise ValueError(
            f"accumulate must divide the batch size {stream.batch_size}, got {accumulate}"
        )
    counts = {
        "num_steps": num_steps + 1,
        "checkpoint_every": 1 if checkpoint_every is None else checkpoint_every,
        "record_every": record_every,
    }
    watching = [*probes, *([revision] if revision is not None else [])]
    counts |= {f"every of {p.name!r}": p.every for p in watching if isinstance(p.every, int)}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be a positive number of steps, got {value}")
    names = [one.name for one in watching]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two probes are named {twice[0]!r}: names must differ")


class _Book:
    """Rows and arrays: fetched some chunks after they were dispatched, appended to the store."""

    def __init__(self, store: Recorder | None, record_every: int):
        self._store, self._every = store, record_every
        self._pending: deque[tuple[int, int, dict[str, jax.Array], bool]] = deque()
        self._rows: list[dict[str, np.ndarray]] = []
        self._diverged: set[int] = set()
        self.arrays: dict[str, np.ndarray] = {}
        self.fetched, self.loss = 0, float("nan")  # how far the fetched losses go, and the last

    def resume(self, position: int | None) -> None:
        """Take up the rows and arrays of a checkpoint; None: there is none, start afresh."""
        if self._store is None:
            return
        rows = self._store.rewind(position or 0)
        names = dict.fromkeys(name for row in rows for name in row)
        if rows:
            self._rows = [{n: np.array([r.get(n, np.nan) for r in rows]) for n in names}]
        if position is not None:
            self.arrays = self._store.arrays()

    def trained(self, first: int, last: int, metrics: dict[str, jax.Array]) -> None:
        """The steps first..last-1 were dispatched."""
        self._push(first, last, metrics, True)

    def measured(self, done: int, metrics: dict[str, jax.Array]) -> None:
        """Probes measured the state after ``done`` steps."""
        if metrics:
            self._push(done, done + 1, metrics, False)

    def settle(self) -> int:
        """Fetch and store everything; the position of the live rows on the disk."""
        while self._pending:
            self._retire(*self._pending.popleft())
        return self._store.position() if self._store is not None else 0

    def columns(self) -> dict[str, np.ndarray]:
        """All rows; NaN where a row has no such column."""
        names = dict.fromkeys(name for rows in self._rows for name in rows)

        def column(rows: dict[str, np.ndarray], name: str) -> np.ndarray:
            return rows[name] if name in rows else np.full(len(rows["step"]), np.nan)

        return {n: np.concatenate([column(rows, n) for rows in self._rows]) for n in names}

    def _push(self, first: int, last: int, metrics: dict[str, jax.Array], trained: bool) -> None:
        self._pending.append((first, last, metrics, trained))
        while len(self._pending) > IN_FLIGHT:
            self._retire(*self._pending.popleft())

    def _retire(self, first: int, last: int, metrics: dict[str, jax.Array], trained: bool) -> None:
        values = meshes.fetch(metrics)
        if trained:
            values = {name: value[:, : last - first] for name, value in values.items()}
            self.fetched = last
            self._note(first, values["loss"])
        else:
            for name in [n for n, value in values.items() if value.ndim > 1]:
                self._keep(f"{name}@{first}", values.pop(name))
            values = {name: value[:, None] for name, value in values.items()}
        steps = np.arange(first, last)
        chosen = np.flatnonzero(steps % self._every == 0) if trained else np.array([0])
        if not values or not len(chosen):
            return
        k = len(next(iter(values.values())))
        rows = {
            "step": np.repeat(steps[chosen], k),
            "replica": np.tile(np.arange(k), len(chosen)),
            **{n: v[:, chosen].T.reshape(-1).astype(np.float64) for n, v in values.items()},
        }
        self._rows.append(rows)
        if self._store is not None:
            self._store.append(rows)

    def _keep(self, name: str, value: np.ndarray) -> None:
        self.arrays[name] = value
        if self._store is not None:
            self._store.array(name, value)

    def _note(self, first: int, loss: np.ndarray) -> None:
        """Remember the mean loss, and warn of each replica once when it diverges."""
        last = loss[:, -1]
        self.loss = float(last[np.isfinite(last)].mean()) if np.isfinite(last).any() else np.nan
        for replica in np.flatnonzero(~np.isfinite(loss).all(axis=1)):
            if replica not in self._diverged:
                self._diverged.add(int(replica))
                at = first + int(np.argmin(np.isfinite(loss[replica])))
                log.warning("replica %d diverged: its loss at step %d is not finite", replica, at)


class _Pace:
    """How long chunks are, when to save, and the progress that is logged."""

    def __init__(self, name: str, done: int, num_steps: int, replicas: int, every: int | None):
        self._name, self._num_steps, self._replicas, self._every = name, num_steps, replicas, every
        self._chunk, self._rate, self._fetched = 1, float("nan"), done
        self._last = self._saved = self._said = time.monotonic()

    def next(self, done: int, max_steps: int) -> int:
        """Where the next chunk should end."""
        end = done + min(self._chunk, max_steps)
        return end if self._every is None else min(end, next_due(self._every, done))

    @property
    def known(self) -> bool:
        """Whether the time of a step was measured (the first chunk's is mostly compilation)."""
        return bool(self._rate > 0)  # not while it is NaN

    def tick(self, fetched: int, loss: float) -> None:
        """So many steps are known to be computed: adapt the chunks, report."""
        now, steps = time.monotonic(), fetched - self._fetched
        if not steps:
            return
        rate = steps / max(
            now - self._last, 1e-6
        )  # the first one, with the compilation, is dropped
        if self.known:
            self._rate = 0.7 * self._rate + 0.3 * rate
        else:
            self._rate = rate if self._rate == 0 else 0.0
        self._last, self._fetched = now, fetched
        if self._rate > 0:
            self._chunk = int(np.clip(self._rate * CHUNK_SECONDS, 1, 4 * self._chunk))
        last = fetched == self._num_steps
        if last or (self._rate > 0 and now - self._said > SAY_SECONDS):
            self._said = now
            rate = self._rate or rate
            log.info(
                "%s: step %d of %d, loss %.4g, %d replicas, %.3g steps/s, %.0f s left",
                *(self._name, fetched, self._num_steps, loss, self._replicas),
                *(rate, (self._num_steps - fetched) / rate),
                extra={
                    "progress": {
                        "name": self._name,
                        "done": fetched,
                        "total": self._num_steps,
                        "replicas": self._replicas,
                        "loss": loss,
                        "rate": rate,
                    }
                },
            )

    def save(self, done: int) -> bool:
        """Whether a checkpoint is due."""
        now = time.monotonic()
        if self._every is None:
            due = now - self._saved > CHECKPOINT_SECONDS
        else:
            due = done % self._every == 0
        self._saved = now if due else self._saved
        return due


@contextmanager
def _among_processes() -> Iterator[None]:
    """Of several processes all enter and all leave, or all end: nobody waits for one that fails."""
    hosts.join()
    hosts.entered()
    try:
        yield
    except SystemExit:  # all were asked to stop
        hosts.together(lambda: None)
        hosts.left()
        raise
    except BaseException as error:
        lost = hosts.lost(error)
        hosts.left(lost or error)
        if lost:
            raise lost from error
        raise
    hosts.together(lambda: None)
    hosts.left()


@contextmanager
def _terminated(listen: bool) -> Iterator[threading.Event]:
    """An event that SIGTERM sets, where a handler can be installed."""
    event = threading.Event()
    if not listen or threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)
