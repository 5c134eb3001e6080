"""Fair clocks: sides that take turns in one process, and what their laps say.

A side is a function ``run(lap)`` that works and calls ``lap()`` whenever it has done the same
amount of work as the others do between two calls. Sides run in threads of which one is awake at a
time, A B A B ..., so what else the machine does falls on all of them alike.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import numpy as np

from dynamics import fit
from dynamics.types import PyTree, TrainState

Lap = Callable[[], None]
Side = Callable[[Lap], None]


@dataclass(frozen=True)
class Result:
    """One row of the table; ``ours`` and ``theirs`` are in ``unit``."""

    name: str
    what: str
    ours: float = float("nan")
    theirs: float = float("nan")
    unit: str = ""
    ratio: float = float("nan")  # median over the laps of ours / theirs
    low: float = float("nan")  # its quartiles
    high: float = float("nan")
    goal: float | None = None  # the ratio should be at most this
    compiled: tuple[float, float] | None = None  # seconds before the first lap's end: ours, theirs
    laps: int = 0
    note: str = ""
    skipped: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None where there is none, or nothing was measured."""
        return None if self.goal is None or self.skipped else self.ratio <= self.goal


class _OverError(BaseException):
    """The race is over; the side's frames are unwound."""


class _Turn:
    """One side in its thread."""

    def __init__(self, run: Side):
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._over = False
        self._thread = threading.Thread(target=self._work, args=(run,), daemon=True)
        self._thread.start()

    def take(self) -> float:
        """Seconds of one lap."""
        start = time.perf_counter()
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error
        return time.perf_counter() - start

    def end(self) -> None:
        """Unwind the side where it stands."""
        self._over = True
        self._go.release()
        self._thread.join()

    def _work(self, run: Side) -> None:
        try:
            self._wait()
            run(self._lap)
            raise RuntimeError("a side ended before the race did")
        except BaseException as error:
            self._error = error
        self._done.release()

    def _lap(self) -> None:
        self._done.release()
        self._wait()

    def _wait(self) -> None:
        self._go.acquire()
        if self._over:
            raise _OverError


def race(sides: Mapping[str, Side], laps: int, warm: int = 2) -> dict[str, np.ndarray]:
    """Seconds of ``1 + warm + laps`` turns of each side: the first compiles, ``warm`` are not used.

    Every side must call ``lap`` at least so many times.
    """
    turns = {name: _Turn(run) for name, run in sides.items()}
    try:
        rounds = [{n: turn.take() for n, turn in turns.items()} for _ in range(1 + warm + laps)]
    finally:
        for turn in turns.values():
            turn.end()
    return {name: np.array([r[name] for r in rounds]) for name in sides}


def compare(
    name: str,
    what: str,
    seconds: Mapping[str, np.ndarray],
    ours: str,
    theirs: str,
    *,
    work: tuple[float, float],
    unit: str = "us/step",
    goal: float | None = None,
    warm: int = 2,
    note: str = "",
) -> Result:
    """``ours`` against ``theirs`` of a race whose laps were ``work`` units of each."""
    a = seconds[ours][1 + warm :] / work[0] * 1e6
    b = seconds[theirs][1 + warm :] / work[1] * 1e6
    low, ratio, high = np.quantile(a / b, (0.25, 0.5, 0.75))
    return Result(
        *(name, what, float(np.median(a)), float(np.median(b)), unit),
        *(float(ratio), float(low), float(high), goal),
        compiled=(float(seconds[ours][0]), float(seconds[theirs][0])),
        laps=len(a),
        note=note,
    )


class LapProbe:
    """A StateProbe that waits for the state and calls ``lap``: how ``fit`` takes turns."""

    name = "lap"

    def __init__(self, every: int, laps: int, lap: Lap):
        """A list of steps, so that nothing is due at step 0."""
        self.every = tuple(every * (i + 1) for i in range(laps))
        self._lap = lap

    def start(self, state: TrainState, each: fit.Any) -> PyTree:
        """Nothing is remembered."""
        return ()

    def measure(self, carry: PyTree, state: TrainState, each: fit.Any) -> tuple[PyTree, dict]:
        """The end of a lap is when the parameters are there."""
        jax.block_until_ready(state.params)
        self._lap()
        return carry, {}
