"""How a run of steps ends early: asked to by SIGTERM, or together when a process fails."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dynamics import hosts


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


@contextmanager
def terminated(*, listen: bool) -> Iterator[threading.Event]:
    """An event that SIGTERM sets, where a handler can be installed."""
    event = threading.Event()
    if not listen or threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)
