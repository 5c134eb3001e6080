"""Fair clocks: sides that take turns in one process, and what their laps say.

A side is a function ``run(lap)`` that works and calls ``lap()`` whenever it has done the same
amount of work again. Sides run in threads of which one is awake at a time, A B A B ..., so what
else the machine does falls on all of them alike; ``Race.busy`` says how much that was.
"""

import os
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.plain import Lap, Side
from dynamics.types import Context, PyTree, TrainState

WARM = 2  # laps after the first, which compiles, that are not used either


@dataclass(frozen=True)
class Result:
    """One row of the table; ``ours`` and ``theirs`` are in ``unit``."""

    name: str
    what: str
    ours: float = float("nan")
    theirs: float = float("nan")
    unit: str = ""
    ratio: float = float("nan")  # the median over the rounds of ours / theirs
    low: float = float("nan")  # its quartiles
    high: float = float("nan")
    goal: float | None = None  # the ratio should be at most this
    compiled: tuple[float, float] | None = None  # seconds of the first lap: ours, theirs
    rounds: int = 0
    busy: float = float("nan")  # cores that other processes used meanwhile
    note: str = ""
    skipped: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None where there is none, or nothing was measured."""
        return None if self.goal is None or self.skipped else self.ratio <= self.goal


class Race(NamedTuple):
    """Seconds of every lap of each side."""

    seconds: dict[str, np.ndarray]
    busy: float

    def each(self, side: str, work: float) -> np.ndarray:
        """Seconds per unit of work, of the laps that count."""
        return self.seconds[side][1 + WARM :] / work

    def fastest(self, *sides: str) -> str:
        """The side with the shortest median lap."""
        return min(sides, key=lambda side: float(np.median(self.each(side, 1))))

    def compare(
        self, name: str, what: str, ours: tuple[str, float], theirs: tuple[str, float], **more: Any
    ) -> Result:
        """Microseconds per unit of work of two sides, each given as (name, work a lap)."""
        a, b = self.each(*ours) * 1e6, self.each(*theirs) * 1e6
        low, ratio, high = (float(q) for q in np.quantile(a / b, (0.25, 0.5, 0.75)))
        first = (float(self.seconds[ours[0]][0]), float(self.seconds[theirs[0]][0]))
        more = {"unit": "us/step", "compiled": first, "rounds": len(a), "busy": self.busy} | more
        medians = (float(np.median(a)), float(np.median(b)))
        return Result(name, what, *medians, ratio=ratio, low=low, high=high, **more)


def race(sides: Mapping[str, Side], rounds: int) -> Race:
    """``1 + WARM + rounds`` turns of each side, which must call ``lap`` at least so often."""
    turns = {name: _Turn(run) for name, run in sides.items()}
    others = _Others()
    try:
        laps = [{n: turn.take() for n, turn in turns.items()} for _ in range(1 + WARM + rounds)]
    finally:
        for turn in turns.values():
            turn.end()
    return Race({name: np.array([lap[name] for lap in laps]) for name in sides}, others.cores())


class OverError(BaseException):
    """Unwinds a side when the race is over."""


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
            raise OverError


class _Others:
    """The processor time of other processes since it was made, where /proc/stat is."""

    def __init__(self) -> None:
        self._start = self._now()

    def cores(self) -> float:
        """Cores in use by others, on average."""
        total, mine, clock = np.subtract(self._now(), self._start)
        return float((total - mine) / clock)

    def _now(self) -> tuple[float, float, float]:
        stat = Path("/proc/stat")
        if not stat.exists():
            return float("nan"), 0.0, time.perf_counter()
        user, nice, system, _, _, irq, soft, steal = map(int, stat.read_text().split()[1:9])
        total = (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")
        return total, time.process_time(), time.perf_counter()


class LapProbe:
    """A StateProbe that waits for the parameters and calls ``lap``: how ``fit`` takes turns."""

    name = "lap"

    def __init__(self, every: int, laps: int, lap: Lap):
        """A list of steps, so that nothing is due at step 0."""
        self.every: int | Collection[int] = tuple(every * (i + 1) for i in range(laps))
        self._last = every * laps
        self._lap = lap

    def start(self, context: Context, state: TrainState) -> PyTree:
        """Nothing is remembered."""
        return ()

    def measure(self, context: Context, carry: PyTree, state: TrainState) -> tuple[PyTree, dict]:
        """The end of a lap; after the last one, fit may end by itself and close its files."""
        jax.block_until_ready(state.params)
        try:
            self._lap()
        except OverError:
            if int(state.step) < self._last:
                raise
        return carry, {}
