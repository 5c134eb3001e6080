"""The rows and arrays of a run: fetched some chunks after they were dispatched, then stored."""

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dynamics import mesh as meshes
from dynamics import record
from dynamics.chunk import IN_FLIGHT
from dynamics.record import Array, Recorder
from dynamics.types import NEVER

log = logging.getLogger(__name__)

ROWS = "rows"  # the frame of the training steps; the others are named by their probes
COLUMNS = ("step", "member")  # of every frame, before its own

Metrics = Mapping[str, jax.Array]


class _Pending(NamedTuple):
    """What was dispatched and not yet fetched."""

    frame: str
    first: int  # the steps first..last-1
    last: int
    metrics: Metrics
    diverged: jax.Array  # i32[K]: of the state after them


class Book:
    """The frames and arrays of a run, in memory and in the store if there is one."""

    def __init__(
        self, store: Recorder | None, record_every: int, dims: Mapping[str, tuple[str, ...]]
    ):
        """``dims`` name the axes that the arrays of a probe have after the member axis."""
        self._store, self._every, self._dims = store, record_every, dims
        self._pending: deque[_Pending] = deque()
        self._frames: dict[str, list[Any]] = {}  # blocks of rows; a first one without says what of
        self._columns: dict[str, list[str]] = {}
        self._arrays: dict[tuple[str, str], dict[int, Array]] = {}
        self._warned: set[int] = set()
        self.fetched, self.loss = 0, float("nan")  # how far the fetched losses go, and the last
        self._head(ROWS, ["loss"])

    def resume(self, position: Mapping[str, Any] | None) -> None:
        """Take up the rows and arrays of a checkpoint; None: there is none, start afresh."""
        if self._store is None:
            return
        rows = self._store.rewind(position and position["store"])
        if position is None:
            return
        for name, columns in position["columns"].items():
            self._head(name, columns)
        for name, some in rows.items():
            self._frames[name].append(record.frame(some))
        for probe, metric, step, value in self._store.pieces():
            self._arrays.setdefault((probe, metric), {})[step] = value

    def trained(self, first: int, last: int, metrics: Metrics, diverged: jax.Array) -> None:
        """The steps first..last-1 were dispatched; metrics are [K, steps]."""
        self._push(_Pending(ROWS, first, last, metrics, diverged))

    def measured(self, done: int, found: Mapping[str, Metrics], diverged: jax.Array) -> None:
        """Probes measured the state after ``done`` steps; metrics are [K, ...]."""
        for probe, metrics in found.items():
            if metrics:
                self._push(_Pending(probe, done, done + 1, metrics, diverged))

    def settle(self) -> dict[str, Any]:
        """Fetch and store everything; where the rows and arrays then end, for ``resume``."""
        while self._pending:
            self._retire(self._pending.popleft())
        if self._store is None:
            return {}
        return {"store": self._store.position(), "columns": self._columns}

    def frames(self) -> dict[str, Any]:
        """The frame of the training rows and that of each probe that measured scalars."""
        return {name: record.stacked(parts) for name, parts in self._frames.items()}

    def arrays(self) -> dict[tuple[str, str], Array]:
        """(probe, metric) -> what it measured, with dims step, member and the probe's own."""
        return {key: record.over_steps(list(some.items())) for key, some in self._arrays.items()}

    def _push(self, pending: _Pending) -> None:
        self._pending.append(pending)
        while len(self._pending) > IN_FLIGHT:
            self._retire(self._pending.popleft())

    def _retire(self, pending: _Pending) -> None:
        name, first, last, metrics, _ = pending
        values, diverged = meshes.fetch((dict(metrics), pending.diverged))
        steps = np.arange(first, last)
        if name == ROWS:
            values = {metric: value[:, : last - first] for metric, value in values.items()}
            self.fetched = last
            self._note(values["loss"], diverged)
            kept = (steps[:, None] % self._every == 0) & (steps[:, None] < diverged[None, :])
        else:
            for metric in [n for n, value in values.items() if value.ndim > 1]:
                self._keep(name, metric, first, values.pop(metric))
            values = {metric: value[:, None] for metric, value in values.items()}
            kept = steps[:, None] <= diverged[None, :]
        if not values:
            return
        self._head(name, list(values))
        at, member = np.nonzero(kept)  # a diverged member has no rows of what came after
        if not len(at):
            return
        rows = {"step": steps[at], "member": member}
        rows |= {n: v.T[at, member].astype(np.float64) for n, v in values.items()}
        self._frames[name].append(rows)
        if self._store is not None:
            self._store.append(name, rows)

    def _head(self, name: str, metrics: Sequence[str]) -> None:
        """Begin a frame with a block of no rows, so that it is there whatever diverges."""
        known = self._columns.get(name, [])
        if set(metrics) <= set(known):
            return
        self._columns[name] = [*known, *(m for m in metrics if m not in known)]
        none = {column: np.zeros(0, np.int64) for column in COLUMNS}
        none |= {metric: np.zeros(0) for metric in self._columns[name]}
        self._frames[name] = [none, *self._frames.get(name, [])[1:]]

    def _keep(self, probe: str, metric: str, step: int, value: np.ndarray) -> None:
        own = self._dims.get(probe, ())
        axes = range(value.ndim - 1)
        dims = ("member", *(own[i] if i < len(own) else f"axis_{i}" for i in axes))
        before = self._arrays.setdefault((probe, metric), {})
        for one in before.values():
            if one.values.shape != value.shape:
                raise ValueError(
                    f"{metric!r} of probe {probe!r} must keep its shape {one.values.shape}, got "
                    f"{value.shape} at step {step}"
                )
            break
        before[step] = Array(value, dims)
        if self._store is not None:
            self._store.measured(probe, metric, step, before[step])

    def _note(self, loss: np.ndarray, diverged: np.ndarray) -> None:
        """Remember the mean loss, and warn of each member once when it diverges."""
        last = loss[:, -1][(diverged == NEVER) & np.isfinite(loss[:, -1])]
        self.loss = float(last.mean()) if len(last) else float("nan")
        for member in np.flatnonzero(diverged != NEVER):
            if member not in self._warned:
                self._warned.add(int(member))
                at = int(diverged[member])
                what = "its loss, gradient or update at step %d is not finite"
                log.warning(f"member %d diverged: {what}", member, at)
