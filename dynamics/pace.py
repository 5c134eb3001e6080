"""How long chunks of a run are, when it is saved, and the progress that is logged."""

import logging
import time

import numpy as np

from dynamics.watch import next_due

log = logging.getLogger(__name__)

CHUNK_SECONDS = 0.25  # what a chunk should take: signals and the progress line wait for its end
CHECKPOINT_SECONDS = 60.0
SAY_SECONDS = 0.2


class Pace:
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
        rate = steps / max(now - self._last, 1e-6)
        if self.known:
            self._rate = 0.7 * self._rate + 0.3 * rate
        else:
            self._rate = rate if self._rate == 0 else 0.0  # the first one has the compilation in it
        self._last, self._fetched = now, fetched
        if self._rate > 0:
            self._chunk = int(np.clip(self._rate * CHUNK_SECONDS, 1, 4 * self._chunk))
        last = fetched == self._num_steps
        if last or (self._rate > 0 and now - self._said > SAY_SECONDS):
            self._said = now
            rate = self._rate or rate
            log.info(
                "%s: step %d of %d, loss %.4g, %d members, %.3g steps/s, %.0f s left",
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
