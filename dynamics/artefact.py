"""The state of a population as a thing of its own: how it stands, stored, and loaded again."""

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from dynamics import hosts, record
from dynamics import mesh as meshes
from dynamics.checkpoint import CheckpointError, Checkpoints
from dynamics.types import NEVER, TrainState


def status(state: TrainState) -> Any:
    """How each member of a population stands, a frame: ``member``, ``status``, ``step``.

    ``diverged`` at the first step whose loss, gradient or update was not finite, else ``finished``
    after the last step.
    """
    done, diverged = int(np.max(meshes.fetch(state.step))), meshes.fetch(state.diverged)
    return record.frame(
        [
            {
                "member": k,
                "status": "finished" if step == NEVER else "diverged",
                "step": done if step == NEVER else int(step),
            }
            for k, step in enumerate(diverged)
        ]
    )


def save(folder: Path | str, state: TrainState) -> None:
    """Store a state for ``load``, under the step it is at; what is intact there stays.

    CheckpointError: it can't be written.
    """
    done = int(np.max(meshes.fetch(state.step)))
    with closing(Checkpoints(folder)) as checkpoints:
        if not hosts.once(checkpoints.is_intact, done):
            checkpoints.save(done, {"state": state})


def load(run: Path | str, step: int | None = None, *, like: TrainState | None = None) -> TrainState:
    """The state of a population from a run's newest intact checkpoint, or from that of ``step``.

    ``run`` is a run directory, which may be being written, or a folder of weights in one; nothing
    in it is changed. Probes are not needed and not read. With ``like`` (from ``init``) the state
    has its structure and lies where it does, and can be trained on; without, leaves lie on this
    process's first device, parameters and extras are dicts, tuples and lists (what was something
    else is a dict of its fields), and the optimizer's state is ``()``: enough to score, merge or
    begin anew from. CheckpointError: no such checkpoint, or one of another structure.
    """
    with closing(Checkpoints(run, read_only=True)) as checkpoints:
        if like is not None:
            found = checkpoints.restore({"state": like}, step)
            state = None if found is None else found[0]["state"]
        else:
            fields = checkpoints.raw("state", step)
            state = None if fields is None else TrainState(**{**fields, "opt_state": ()})
    if state is None:
        raise CheckpointError(f"{run} has no checkpoints")
    return state
