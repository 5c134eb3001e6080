"""How a run of steps ends early: by SIGTERM or SIGINT, or together when a process fails."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from dynamics import hosts

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def among_processes() -> Iterator[None]:
    """Of several processes all enter and all leave, or all end: nobody waits for one that fails."""
    hosts.join()
    hosts.entered()
    try:
        yield
    except SystemExit:  # all were asked to stop
        hosts.together(lambda: None)
        hosts.left()
        raise
    except BaseException as error:
        lost = hosts.lost(error)
        hosts.left(lost or error)
        if lost:
            raise lost from error
        raise
    hosts.together(lambda: None)
    hosts.left()


class Request:
    """Whether this process was asked to end, and by which signal."""

    def __init__(self) -> None:
        """Nobody has asked yet."""
        self.by: signal.Signals | None = None

    def is_set(self) -> bool:
        """Whether a signal came."""
        return self.by is not None

    @property
    def name(self) -> str:
        """The signal's name; SIGTERM where it came to another process of the run."""
        return (self.by or signal.SIGTERM).name

    @property
    def status(self) -> int:
        """The exit status of a process that a signal ended, 128 + its number: 143 or 130."""
        return 128 + (self.by or signal.SIGTERM)

    def take(self, number: int, frame: FrameType | None = None) -> None:
        """Note the first signal; the same one again ends the process at once.

        Another one does not: workers hear Ctrl-C from the terminal, and SIGTERM from the launcher.
        """
        if number == self.by:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.by = self.by or signal.Signals(number)


_process = Request()  # what a command was asked, from its beginning on


@contextmanager
def interruptible() -> Iterator[Request]:
    """For a command: the first SIGTERM or SIGINT is a KeyboardInterrupt, the next ends at once.

    A run that is stored ends at its next chunk instead. A first one that a callback swallows is
    heard by the next run that is stored.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        _process.take(number)
        raise KeyboardInterrupt

    with _handled(interrupt):
        try:
            yield _process
        finally:
            _process.by = None


@contextmanager
def terminated(*, listen: bool) -> Iterator[Request]:
    """A request that SIGTERM and SIGINT set, where handlers can be installed."""
    if not listen:
        yield Request()
        return
    request = _process if _process.is_set() else Request()
    with _handled(request.take):
        yield request


@contextmanager
def _handled(handler: Any) -> Iterator[None]:
    """With this handler of both signals, in the main thread; a signal that is ignored stays so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.getsignal(s) for s in SIGNALS}
    heard = [s for s in SIGNALS if before[s] != signal.SIG_IGN]
    for number in heard:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, before[number])
