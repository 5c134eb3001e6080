"""One process to its first step: ``python -m benchmarks.first_step fit|bare STARTED``.

Prints a line of JSON: seconds since STARTED (Unix time), of which imports; programs compiled and
taken from the cache; how often the loss was traced.
"""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable

import jax
import numpy as np


class _DoneError(Exception):
    """The first step is there."""


def main(what: str, started: float) -> None:
    """Train one step; ``fit`` or ``bare``."""
    side = {"fit": _fit, "bare": _bare}[what]
    traces = Counter()
    run = side(traces)
    imports, events = time.time() - started, Counter()
    jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
    try:
        run(_done)
    except _DoneError:
        seconds = time.time() - started
    else:
        raise RuntimeError("no step was done")
    cached = events["/jax/compilation_cache/cache_hits"]
    compiled = events["/jax/compilation_cache/compile_requests_use_cache"] - cached
    counts = {"compiled": compiled, "cached": cached, "traces": traces["loss"]}
    print(json.dumps({"seconds": seconds, "imports": imports, **counts}))


def _done() -> None:
    raise _DoneError


def _fit(traces: Counter) -> Callable:
    from benchmarks import sides
    from dynamics import mesh, models

    mesh.start()
    job = sides.Job(sides.noise(1347, 8, 8), models.MLP(width=128, depth=2), 64, "noise")
    net = job.task()

    def loss(*args):
        traces["loss"] += 1
        return net.loss(*args)

    return sides.through_fit(job, mesh.make(), 1, 1, net=net._replace(loss=loss))


def _bare(traces: Counter) -> Callable:
    from benchmarks import plain

    jax.config.update("jax_compilation_cache_dir", os.environ["DYNAMICS_CACHE"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    x = np.zeros((1347, 8, 8), np.uint8)
    job = plain.Plain(x, np.zeros(1347, np.int32), 128.0, 74.0, 64, widths=(128, 128))
    return plain.scan(job, 8)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
