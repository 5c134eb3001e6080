"""What comes with the steps: the order of examples, checkpoints, and the start of a process."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import sides
from benchmarks.measure import Race, Result, race
from benchmarks.plain import Side
from benchmarks.sides import Job
from dynamics import mesh as meshes
from dynamics import pace
from dynamics.data.rows import take
from dynamics.data.stream import sampled
from dynamics.record import Recorder
from dynamics.types import Batch, Dataset, Key, PyTree, Stream


def order(quick: bool) -> list[Result]:
    """The keyed order inside a step, beside no order and beside a sort."""
    job, rounds = sides.digits(), 1 if quick else 15
    n, b = len(job.data), job.batch_size
    steps = 8 if quick else 2000
    changes = {"feistel": _same, "file": _in_file_order, "sort": _sort_each_step}
    found = _race_orders(job, changes, steps, rounds)
    what = f"fit with the Feistel order / {{}}: {n} examples, batch {b}"
    ours = ("feistel", steps)
    out = [
        found.compare("order", what.format("rows in file order"), ours, ("file", steps)),
        found.compare(
            *("order_sort", what.format("a permutation every step"), ours, ("sort", steps)),
            goal=1.0,
        ),
    ]
    job = sides.mnist()
    n, b, steps = len(job.data), job.batch_size, 1 if quick else 40
    found = _race_orders(job, changes, steps, rounds)
    what = f"fit with the Feistel order / {{}}: {n} examples, batch {b}"
    out.append(
        found.compare(
            *("order_sort_mnist", what.format("a permutation every step")),
            *(("feistel", steps), ("sort", steps)),
            goal=1.0,
            note=_epoch(found, steps, n, b),
        )
    )
    return out


def _race_orders(job: Job, changes: dict, steps: int, rounds: int) -> Race:
    return race(
        {
            name: sides.through_fit(job, meshes.make(), steps, rounds, change=change)
            for name, change in changes.items()
        },
        rounds,
    )


def _epoch(found: Race, steps: int, n: int, b: int) -> str:
    """What one permutation an epoch would cost a step, and what the Feistel order does."""
    permute = jax.jit(lambda key: jax.random.permutation(key, n))
    key, seconds = jax.random.key(0), []
    for _ in range(6):
        start = time.perf_counter()
        permute(key).block_until_ready()
        seconds.append(time.perf_counter() - start)
    once = np.median(seconds[1:]) / (n // b) * 1e6
    here = np.median(found.each("feistel", steps) - found.each("file", steps)) * 1e6
    return f"a step: Feistel {here:.0f} us, a permutation an epoch {once:.0f} us"


def _same(stream: Stream) -> Stream:
    return stream


def _in_file_order(stream: Stream) -> Stream:
    def batch(shared: Dataset, own: PyTree, fed: PyTree, key: Key, step: jax.Array) -> Batch:
        first = (step % (len(shared) // stream.batch_size)) * stream.batch_size
        return take(shared, first + jnp.arange(stream.batch_size))

    return stream._replace(batch=batch)


def _sort_each_step(stream: Stream) -> Stream:
    def batch(shared: Dataset, own: PyTree, fed: PyTree, key: Key, step: jax.Array) -> Batch:
        size, n = stream.batch_size, len(shared)
        rows = jax.random.permutation(jax.random.fold_in(key, step // (n // size)), n)
        first = (step % (n // size)) * size
        return take(shared, jax.lax.dynamic_slice(rows, (first,), (size,)).astype(jnp.int32))

    return stream._replace(batch=batch)


def importance(quick: bool) -> list[Result]:
    """Examples drawn in proportion, with their weights, beside each once an epoch."""
    job, steps, rounds = sides.mnist(), 2 if quick else 100, 1 if quick else 21
    p = np.random.default_rng(0).dirichlet(np.ones(len(job.data)))[None]

    def drawn(stream: Stream) -> Stream:
        return sampled(job.data, stream.batch_size, 1, p)

    found = _race_orders(job, {"sampled": drawn, "resident": _same}, steps, rounds)
    what = f"fit with data.stream.sampled / with resident: {job.net()}"
    ours, theirs = ("sampled", steps), ("resident", steps)
    return [found.compare("sampled", what, ours, theirs, goal=1.1, note=job.about)]


def checkpoint(quick: bool) -> list[Result]:
    """Rows and checkpoints on a disk beside neither."""
    jobs = {"mnist": (sides.mnist(), 1, 100), "digits": (sides.digits(), 32, 128)}
    return [r for name, job in jobs.items() for r in _checkpoint(name, *job, quick)]


def checkpoint_direct(quick: bool) -> list[Result]:
    """A checkpoint about every ten seconds, six times as often as fit makes them."""
    steps, rounds = (2, 1) if quick else (3500, 3)
    found = _race_stores(sides.mnist(), 1, steps, rounds, {"neither": 0, "saves": steps})
    what = "1 x MNIST's net, fit with a checkpoint every ~10 s / without a store"
    row = found.compare("checkpoint_direct", what, ("saves", 1e6), ("neither", 1e6), unit="s a lap")
    return [row]


def _checkpoint(name: str, job: Job, k: int, steps: int, quick: bool) -> list[Result]:
    steps, rounds = (4, 1) if quick else (steps, 31)
    every = {"neither": 0, "rows": 10**9, "saves": steps}
    found = _race_stores(job, k, steps, rounds, every)
    what = f"{k} x {job.about}, fit with a store / without: "
    work, lap = 1e6, {"unit": "s a lap", "note": f"{steps} steps a lap"}  # a unit is 1e-6 laps
    without = ("neither", work)
    rows = found.compare(f"rows_{name}", what + "rows only", ("rows", work), without, **lap)
    saves = found.compare(f"save_{name}", what + "a save a lap", ("saves", work), without, **lap)
    held = found.each("saves", 1) - found.each("rows", 1)
    a_minute = found.each("rows", 1) / found.each("neither", 1) + held / pace.CHECKPOINT_SECONDS
    low, ratio, high = (float(q) for q in np.quantile(a_minute, (0.25, 0.5, 0.75)))
    note = f"rows as below; a save holds the run up for {np.median(held) * 1e3:.0f} ms in all"
    whole = Result(
        *(f"checkpoint_{name}", what + "a checkpoint a minute"),
        *(60 * ratio, 60.0, "s a minute", ratio, low, high, 1.02),
        **{"rounds": len(held), "busy": found.busy, "note": note},
    )
    return [whole, rows, saves]


def _race_stores(job: Job, k: int, steps: int, rounds: int, every: dict[str, int]) -> Race:
    """Fits with a checkpoint every so many steps; 0 is without a store."""
    mesh = meshes.for_population(k)
    with tempfile.TemporaryDirectory() as folder:

        def side(name: str, interval: int) -> Side:
            options = {}
            if interval:
                store = Recorder(Path(folder, name), sides.RULE)
                options = {"store": store, "checkpoint_every": interval}
            return sides.through_fit(job, mesh, steps, rounds, replicas=k, **options)

        return race({name: side(name, interval) for name, interval in every.items()}, rounds)


def startup(quick: bool) -> list[Result]:
    """A new process to its first step, without and with the programs of the one before."""
    cold, warm, plain = [], [], []
    for _ in range(1 if quick else 5):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(_first_step("fit", cache))
            warm.append(_first_step("fit", cache))
            _first_step("bare", cache)
            plain.append(_first_step("bare", cache))

    def seconds(starts: list[dict]) -> np.ndarray:
        return np.array([start["seconds"] for start in starts])

    def row(name: str, what: str, a: list[dict], b: list[dict], note: str) -> Result:
        low, ratio, high = (
            float(q) for q in np.quantile(seconds(a) / seconds(b), (0.25, 0.5, 0.75))
        )
        medians = (float(np.median(seconds(a))), float(np.median(seconds(b))))
        return Result(name, what, *medians, "s", ratio, low, high, rounds=len(a), note=note)

    def counted(name: str, what: str, a: float, b: float, unit: str, goal: float) -> Result:
        return Result(name, what, a, b, unit, a / b, a / b, a / b, goal, rounds=len(cold))

    again, first = max(s["compiled"] for s in warm), max(s["compiled"] for s in cold)
    traces = max(s["traces"] for s in cold + warm)
    what = "process start to first step, digits: "
    return [
        row("start", what + "fit, programs cached / not", warm, cold, _parts(warm, cold)),
        row("start_bare", what + "fit / bare scan, both cached", warm, plain, _parts(warm, plain)),
        counted("compiled", "programs compiled by a second / first process", again, first, "", 0.0),
        counted("traces", "times fit traces the loss / a bare jit does", traces, 1, "traces", 2.0),
    ]


def _parts(*starts: list[dict]) -> str:
    imports = [np.median([s["imports"] for s in some]) for some in starts]
    return "of which imports " + " and ".join(f"{i:.1f} s" for i in imports)


def _first_step(what: str, cache: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.first_step", what, repr(time.time())]
    settings = {"DYNAMICS_CACHE": cache, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
