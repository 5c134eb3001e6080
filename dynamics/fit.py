"""The only loop over steps: chunks, bounded dispatch, probes, checkpoints, rows."""

import dataclasses
import functools
import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from dynamics import counts, hosts, identity, population, record, step
from dynamics import mesh as meshes
from dynamics.artefact import load, save, status
from dynamics.book import ROWS, Book
from dynamics.checkpoint import CheckpointError, Checkpoints
from dynamics.chunk import Chunk
from dynamics.data.rows import check_classes, class_range
from dynamics.pace import Pace
from dynamics.plan import Planned
from dynamics.record import Recorder
from dynamics.stopping import among_processes, terminated
from dynamics.types import (
    Context,
    Dataset,
    Observer,
    Probe,
    PyTree,
    Results,
    Revision,
    Stream,
    Task,
    TrainState,
)
from dynamics.watch import Watch, each_member

__all__ = ["fit", "init", "load", "save", "status"]

log = logging.getLogger(__name__)


def init(
    task: Task,
    optimizer: optax.GradientTransformation,
    keys: jax.Array,
    hyperparameters: Mapping[str, Any],
    mesh: Mesh,
    rules: meshes.Rules = meshes.TENSOR_PARALLEL,
    *,
    params: PyTree | None = None,
    paths: Mapping[str, str] | None = None,
) -> TrainState:
    """The state of a population, made where it will lie: one member for each of ``keys`` [K].

    A hyperparameter is one number for all members or K of them. With ``params`` members start from
    these in place of the task's own: leaves [K, ...], or [...] for all alike. ``paths`` says which
    of them, path in the task's parameters -> path in those given, of a leaf or of all below
    ("encoder" -> "net/encoder"); the others keep their initialisation. Shapes alone on a mesh of a
    machine that is not here. ValueError: another length or shape, a path that is not there, paths
    without params.
    """
    if jnp.ndim(keys) != 1:
        raise ValueError(
            f"keys must be one for each member, [K], got shape {jnp.shape(keys)}: "
            "jax.random.split(key, K) makes them"
        )
    k = len(keys)
    meshes.check(mesh, k)
    scalars = {}
    for name, value in hyperparameters.items():
        array = np.asarray(value, np.float32)
        if array.shape not in ((), (k,)):
            raise ValueError(f"{name} must be one number or {k}, one a member, got {array.shape}")
        scalars[name] = np.broadcast_to(array, (k,))

    make = functools.partial(_begun, task, optimizer)
    given: dict[str, Any] = {}
    if params is None and paths is not None:
        raise ValueError("paths={...} without params: give the weights that paths are of")
    if params is not None:
        own = jax.eval_shape(make, keys, scalars, given).params
        given = chosen(own, params, paths)
    if meshes.is_elsewhere(mesh):
        shapes = jax.eval_shape(make, keys, scalars, given)
        return meshes.shaped(shapes, mesh, rules, task.layout)
    return _begun_there(task, optimizer, mesh, tuple(rules), keys, scalars, given)


def _begun(
    task: Task, optimizer: Any, keys: jax.Array, scalars: PyTree, given: PyTree
) -> TrainState:
    states = jax.vmap(functools.partial(step.init, task, optimizer))(keys, scalars, given)
    return dataclasses.replace(states, step=jnp.int32(0))  # one clock for all


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _begun_there(
    task: Task,
    optimizer: Any,
    mesh: Mesh,
    rules: meshes.Rules,
    keys: jax.Array,
    scalars: PyTree,
    given: PyTree,
) -> TrainState:
    states = _begun(task, optimizer, keys, scalars, given)
    where = meshes.shardings(states, mesh, rules, task.layout)
    return jax.lax.with_sharding_constraint(states, where)


def chosen(own: PyTree, given: PyTree, paths: Mapping[str, str] | None) -> dict[str, Any]:
    """Path in a population's parameters -> what takes their place, [K, ...], in their type.

    ValueError: a path that is not there, or a shape that does not fit.
    """
    wanted, there = step.named(own), step.named(given)
    sources = {name: name for name in wanted} if paths is None else {}
    if paths is None and (odd := sorted(wanted.keys() ^ there.keys())):
        raise ValueError(
            f"params must have the task's paths, {odd[0]!r} is in one of the two alone: say with "
            "paths={...} which to take"
        )
    for target, source in (paths or {}).items():
        below = {n: source + n[len(target) :] for n in wanted if f"{n}/".startswith(f"{target}/")}
        if not below:
            raise ValueError(f"the task has no parameters at {target!r}, it has {sorted(wanted)}")
        sources |= below
    out = {}
    for name, source in sources.items():
        if source not in there:
            raise ValueError(f"params has nothing at {source!r}, it has {sorted(there)}")
        value, like = there[source], wanted[name]
        if value.shape not in (like.shape, like.shape[1:]):
            raise ValueError(
                f"params at {source!r} must have shape {like.shape[1:]}, or {like.shape} for each "
                f"member its own, got {value.shape}"
            )
        out[name] = jnp.broadcast_to(jnp.asarray(value, like.dtype), like.shape)
    return out


def fit(
    task: Task,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    stream: Stream,
    num_steps: int,
    mesh: Mesh,
    *,
    probes: Sequence[Probe] = (),
    data: Mapping[str, Dataset] = {},
    revision: Revision | None = None,
    store: Recorder | None = None,
    rules: meshes.Rules = meshes.TENSOR_PARALLEL,
    how: population.How | None = None,
    accumulate: int = 1,
    gradient: step.Gradient = step.BACKWARD,
    observers: Sequence[Observer] = (),
    checkpoint_every: int | None = None,
    record_every: int = 1,
    name: str = "fit",
) -> Results:
    """Train the population ``state`` until it has done ``num_steps`` steps.

    ``rows``: one for each (step, member) with the loss of that step before its update, at every
    ``record_every``-th step. ``measured[probe]``: one for each member and step that the probe was
    due at, with its scalars of the state after ``step`` updates (always at the last step, too,
    unless the probe lists its steps). ``arrays[probe, metric]``: what is no scalar, with dims
    ``step``, ``member`` and the probe's own. ``status``: a row for each member, ``finished`` or
    ``diverged``, and the step: that whose loss, gradient or update was not finite. A member that
    diverged at step t has training rows of the steps before t and measurements up to t; arrays
    hold what its frozen weights gave.

    With a ``store`` the run is continued from its newest checkpoint and saved every
    ``checkpoint_every`` steps (about every minute if None), at the end, and on SIGTERM or SIGINT
    (Ctrl-C), which then raise SystemExit of 143 or 130; a second signal ends the process at once.
    Results with and without a store are equal, as are those of an
    undisturbed run and of one killed and continued on the same mesh, bit for bit. CheckpointError:
    the store holds a run of anything else, other data, batches, probes, or another step.

    On a GPU the bits are equal with XLA_FLAGS=--xla_gpu_deterministic_ops=true. Rows are also kept
    in memory, steps / record_every x K of them.

    ``data`` are the data sets that probes look at, by name. A ``revision`` changes what the batches
    are made from (the stream's ``own``) while training.

    ``gradient`` and ``observers`` are the step's (``step.make``): another estimate of the gradient,
    and what reads it, as columns ``<observer>.<metric>`` of the rows.

    ``how`` overrides ``population.choose``. The state passed in stays valid. Cost: one gradient
    evaluation of the batch for each step and replica; the task's loss is traced twice. ValueError,
    before anything is compiled, for sizes that don't fit together and labels that are no classes of
    the network. ``plan.Planned`` on a mesh of a machine that is not here (``mesh.topology``): it
    can compile the run for it; nothing is run.
    """
    meshes.check(mesh, population.size(state), stream.batch_size // accumulate)
    _check(
        task,
        state,
        stream,
        num_steps,
        [*probes, *observers],
        accumulate,
        checkpoint_every,
        record_every,
        revision,
    )
    made = functools.partial(
        Chunk,
        task,
        optimizer,
        stream=stream,
        mesh=mesh,
        rules=rules,
        how=how,
        accumulate=accumulate,
        gradient=gradient,
        observers=observers,
    )
    if meshes.is_elsewhere(mesh):
        chunk = functools.partial(made, state)
        raise Planned(chunk, state, task, probes, data, num_steps, stream.batch_size)
    checkpoints = Checkpoints(store.path) if store is not None else None
    saving = nullcontext() if checkpoints is None else closing(checkpoints)  # whatever happens
    watching = [*probes, *([] if revision is None else [revision])]
    with among_processes(), saving, terminated(listen=store is not None) as asked:
        chunk = made(state)
        for part, held in data.items():
            aux, of = chunk.program.aux, f"labels of the data set {part!r}"
            check_classes(class_range(held.y), aux.logits, aux.y, of)
        state = chunk.program.laid(state)
        each = each_member(mesh, chunk.program.how)
        context = Context(task, each, mesh, data, chunk.program.convolves)
        watch = Watch(probes, state, context, chunk.program.how, revision, chunk.own)
        book = Book(store, record_every, {p.name: getattr(p, "dims", ()) for p in watching})
        found, same = None, None
        if checkpoints is not None:
            counts = {"batch size": stream.batch_size, "accumulate": accumulate}
            counts["record_every"] = record_every
            same = identity.of_run(state, stream, chunk.program.jaxpr, watching, counts, data)
            like = {"state": state, "probes": watch.carries}
            found = checkpoints.restore(like, check=functools.partial(_same, checkpoints, same))
        position = None
        if found is not None:
            position = found[1]["position"]
            state, watch.carries = found[0]["state"], found[0]["probes"]
        done = int(meshes.fetch(state.step))
        if done > num_steps:
            raise ValueError(f"num_steps is {num_steps}, but {done} steps are already done")
        book.resume(position)
        if revision is not None:
            chunk.own = watch.own
        saved = done if found is not None else None
        if found is None:
            book.measured(done, watch.measure(state, done, num_steps), state.diverged.copy())
        pace = Pace(name, done, num_steps, population.size(state), checkpoint_every)

        def decide() -> tuple[int, bool, bool]:
            """Where the next chunk ends, whether to save there, and whether to stop instead."""
            end = min(watch.next(done), pace.next(done, chunk.max_steps), num_steps)
            return end, pace.save(end), asked.is_set() or hosts.asked_to_stop()

        while True:
            if asked.is_set():
                hosts.ask_to_stop()
            end, due, stopped = hosts.once(decide)
            if stopped or done == num_steps:
                break
            first, done = done, end
            state, aux, metrics = chunk.run(state, first, done - first)
            if not chunk.in_flight:
                jax.block_until_ready(state)
            diverged = state.diverged.copy()  # the next chunk takes the state
            watch.fold(aux, done - first)
            book.trained(first, done, metrics, diverged)
            book.measured(done, watch.measure(state, done, num_steps), diverged)
            if (revised := watch.revise(state, done)) is not None:
                chunk.own = watch.own
                book.measured(done, revised, diverged)
            hosts.reached(done)  # what follows waits for the others
            if not pace.known or not chunk.in_flight:
                book.settle()  # to know how long a step takes before more are dispatched
            pace.tick(book.fetched, book.loss)
            if checkpoints is not None and due:
                _save(checkpoints, done, state, watch, book.settle(), same)
                saved = done
        position = book.settle()
        pace.tick(book.fetched, book.loss)
        if checkpoints is not None and saved != done:
            _save(checkpoints, done, state, watch, position, same)
            checkpoints.wait()
        if stopped:
            log.warning("%s: stopped by %s at step %d; it can be continued", name, asked.name, done)
            raise SystemExit(asked.status)
    frames = book.frames()
    return Results(frames.pop(ROWS), frames, book.arrays(), status(state), state)


def _save(
    checkpoints: Checkpoints, done: int, state: TrainState, watch: Watch, position: Any, made: Any
) -> None:
    items = {"state": state, "probes": watch.carries}
    checkpoints.save(done, items, {"position": position, "identity": made})


def _same(checkpoints: Checkpoints, now: Mapping[str, Any], note: Any) -> None:
    """CheckpointError unless the checkpoint was made by the same run."""
    if words := identity.difference(note["identity"], now):
        raise CheckpointError(
            f"{checkpoints.folder} holds another run: {words}. Give another folder, or call it "
            "with what it was begun with"
        )


def _check(
    task: Task,
    state: TrainState,
    stream: Stream,
    num_steps: int,
    probes: Sequence[Any],
    accumulate: int,
    checkpoint_every: int | None,
    record_every: int,
    revision: Revision | None,
) -> None:
    k = population.size(state)
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
                f"the stream is for {leaf.shape[0]} members, the state has {k}: give both the same"
            )
    if len({task.num_examples, stream.num_examples} - {None}) > 1:
        raise ValueError(
            f"the task has tables for {task.num_examples} examples, the stream's dataset has "
            f"{stream.num_examples}: make the task for the dataset it is trained on"
        )
    counts.check(accumulate=accumulate)
    if stream.batch_size % accumulate:
        raise ValueError(
            f"accumulate must divide the batch size {stream.batch_size}, got {accumulate}"
        )
    counts.check(0, num_steps=num_steps)
    counts.check(checkpoint_every=checkpoint_every, record_every=record_every)
    watching = [*probes, *([revision] if revision is not None else [])]
    for p in watching:
        name, every = f"every of {p.name!r}", getattr(p, "every", None)
        if isinstance(every, Collection):
            for at in every:
                counts.check(0, **{name: at})
        else:
            counts.check(**{name: every})
    names = [record.named(one.name) for one in watching]
    if ROWS in names:
        raise ValueError(f"a probe may not be named {ROWS!r}: the training steps' rows are")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two probes are named {twice[0]!r}: names must differ")
