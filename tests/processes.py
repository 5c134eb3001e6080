"""One process of a run of several: ``python tests/processes.py FOLDER R D M STEPS``.

The environment says which one it is (``mesh.start``). The run has probes of every kind, its batches
come from the host, its parameters lie in parts; what this process was given at the end goes to
``FOLDER.<process>.npz``. With SLEEPER=<process> in the environment that one stays behind for ever.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPLICAS, EVERY = 4, 20


class Sleeper:
    """A probe that never comes back."""

    name, every = "sleeper", (2 * EVERY,)

    def start(self, context: Any, state: Any) -> tuple:
        return ()

    def measure(self, context: Any, carry: tuple, state: Any) -> tuple[tuple, dict]:
        from dynamics import hosts

        while os.environ.get("SLEEPER") == str(hosts.index()):
            time.sleep(1)
        return carry, {}


def trained(folder: Path, shape: Sequence[int], steps: int) -> dict[str, Any]:
    """The run on the devices of all processes: its frames, arrays, and what was trained."""
    import jax
    import numpy as np
    import tiny

    from dynamics import mesh, record
    from dynamics.data.stream import streamed
    from dynamics.probes import AreaUnderMargin, Evaluate, Memorisation
    from dynamics.record import Array, Findings

    p, where = tiny.problem("mlp", steps), mesh.make(*shape)
    labels = np.tile(np.roll(p.data.y, 1), (REPLICAS, 1))
    probes = (
        Evaluate(20, batch_size=40),
        AreaUnderMargin(len(p.data), 20),
        Memorisation(20, labels, p.data.y, batch_size=40),
        Sleeper(),
    )

    def compute(points: Sequence[str], recorder: record.Recorder | None) -> list[Findings]:
        keys = jax.random.split(jax.random.key(0), REPLICAS)
        found = tiny.run(
            *(p, where, REPLICAS),
            stream=streamed(p.data, tiny.BATCH, keys, labels=labels),
            store=recorder,
            rules=mesh.FULLY_SHARDED,
            checkpoint_every=EVERY,
            probes=probes,
        )
        assert found.state is not None
        leaves = jax.tree.leaves(mesh.fetch((found.state.params, found.state.opt_state)))
        arrays = {".".join(key): array for key, array in found.arrays.items()}
        arrays |= {
            f"leaf{i}": Array(x, tuple(f"axis_{axis}" for axis in range(x.ndim)))
            for i, x in enumerate(leaves)
        }
        return [Findings({"rows": found.rows} | found.measured, arrays)]

    (findings,) = record.completed(folder, ("run",), compute, {"data": "made up"})
    columns = {
        f"{name}.{column}": frame[column].to_numpy()
        for name, frame in findings.frames.items()
        for column in frame.columns
    }
    return columns | {name: array.values for name, array in findings.arrays.items()}


def main(folder: Path, shape: Sequence[int], steps: int) -> None:
    import logging

    import numpy as np

    from dynamics import hosts, mesh

    logging.basicConfig(level=logging.WARNING)
    mesh.start()
    np.savez(f"{folder}.{hosts.index()}.npz", **trained(folder, shape, steps))


def start(
    folder: Path, count: int, devices: int, shape: Sequence[int], steps: int, patience: float = 60
) -> list[subprocess.Popen]:
    """The processes of a run, each with its log at ``FOLDER.<process>.log``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    words = [sys.executable, __file__, str(folder), *map(str, shape), str(steps)]
    found = []
    for process in range(count):
        own = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        own |= {"DYNAMICS_PATIENCE": str(patience)}
        if count > 1:
            own |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
            own |= {"JAX_PROCESS_ID": str(process)}
        with open(f"{folder}.{process}.log", "w") as log:
            environment = os.environ | own | {"DYNAMICS_CACHE": "off"}
            found.append(subprocess.Popen(words, env=environment, stdout=log, stderr=log))
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), list(map(int, sys.argv[2:5])), int(sys.argv[5]))
