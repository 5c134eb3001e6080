"""One process at a time writes a run directory: a lock that ends with it, however it ends."""

import os
import platform
import weakref
from pathlib import Path

from dynamics.record.files import RecordError

try:
    import fcntl
except ModuleNotFoundError:  # no such locks on this system
    fcntl = None

NAME = "lock"


class Lock:
    """A directory is this process's while one of these for it is alive and not released."""

    def __init__(self, file: Path, handle: int):
        """``handle`` is the open, locked file."""
        self._file, self._handle = file, handle
        self._closing = weakref.finalize(self, os.close, handle)

    @property
    def holds(self) -> bool:
        """Whether it does; not if the directory was removed."""
        return self._closing.alive and os.fstat(self._handle).st_nlink > 0

    def release(self) -> None:
        """Let others have the directory."""
        if self._closing.alive:
            self._file.unlink(missing_ok=True)
            self._closing()


_held: "weakref.WeakValueDictionary[Path, Lock]" = weakref.WeakValueDictionary()


def is_locked(path: Path) -> bool:
    """Whether this process has the lock of a directory."""
    mine = _held.get(path.resolve() / NAME)
    return mine is not None and mine.holds


def locked(path: Path) -> Lock | None:
    """The lock of a run directory, this process's own if it has one already.

    None where the file system has no locks. OSError: the file can't be made. RecordError: another
    process has it.
    """
    file = path.resolve() / NAME
    if is_locked(path):
        return _held[file]
    handle = _taken(file)
    if handle is None:
        return None
    os.truncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {platform.node()}".encode())
    lock = _held[file] = Lock(file, handle)
    return lock


def _taken(file: Path) -> int | None:
    """The open file, locked; None where there are no locks."""
    while fcntl is not None:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.read(handle, 200).decode(errors="replace") or "another process"
            os.close(handle)
            raise RecordError(
                f"{file.parent} is being written by {who}: wait until that has ended, or give "
                "another folder"
            ) from None
        except OSError:
            os.close(handle)
            return None
        if os.fstat(handle).st_nlink:  # not removed between the two calls by the one who had it
            return handle
        os.close(handle)
    return None
