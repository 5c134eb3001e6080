"""What a person sees while a run goes on: one line on a terminal, a line now and then elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS = 10.0  # between plain lines


@contextmanager
def shown(everything: bool = True) -> Iterator[None]:
    """Show the progress and the warnings that ``dynamics`` logs, on the standard error.

    Of several processes the first shows ``everything``, the others errors alone.
    """
    logger = logging.getLogger("dynamics")
    console = Console(stderr=True)
    handler = _Line(console) if everything and console.is_terminal else _Plain()
    handler.setLevel(logging.INFO if everything else logging.ERROR)
    level, logger.propagate = logger.level, False
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        handler.close()
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = True


@contextmanager
def line() -> Iterator[Callable[[str], None]]:
    """A function that shows a text in the place of the one before; elsewhere, each new one."""
    console, last = Console(stderr=True), ""

    def say(text: str) -> None:
        nonlocal last
        if text != last:
            print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr)
        last = text

    if not console.is_terminal:
        yield say
        return
    with console.status("") as status:
        yield status.update


class _Line(logging.Handler):
    """One progress line a stage; other records are printed above it."""

    def __init__(self, console: Console):
        super().__init__()
        self._others = RichHandler(console=console, show_path=False, show_time=False)
        self._bar = Progress(
            TextColumn("{task.description:<8}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TextColumn("{task.fields[replicas]} members"),
            TextColumn("{task.fields[rate]:.3g} steps/s"),
            TextColumn("loss {task.fields[loss]:.4g}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._tasks: dict[str, int] = {}
        self._bar.start()

    def emit(self, record: logging.LogRecord) -> None:
        found = getattr(record, "progress", None)
        if found is None:
            self._others.emit(record)
            return
        fields = {"replicas": found["replicas"], "rate": found["rate"], "loss": found["loss"]}
        if found["name"] not in self._tasks:
            self._tasks[found["name"]] = self._bar.add_task(
                found["name"], total=found["total"], **fields
            )
        task = self._tasks[found["name"]]
        self._bar.update(task, completed=found["done"], **fields)  # pyright: ignore

    def close(self) -> None:
        self._bar.stop()
        super().close()


class _Plain(logging.StreamHandler):
    """Plain lines; of progress, at most one in SECONDS and the last of each stage."""

    def __init__(self):
        super().__init__(sys.stderr)
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        self._last = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        found = getattr(record, "progress", None)
        if found is not None and found["done"] < found["total"]:
            if time.monotonic() - self._last < SECONDS:
                return
            self._last = time.monotonic()
        super().emit(record)
