"""Several processes of one run: what the first says to all, and how all end when one is lost.

All run the same program on their own devices (``mesh.start`` joins them), so all must decide alike:
what depends on a clock, a file or a signal is decided by the first, ``once``, and heard by the
others. Only the first writes rows, arrays and figures.

A thread of each process gives a sign of life every second and reads those of the others. A process
that failed, fell silent (killed, suspended, cut off) or is far behind ends the others with one
message and status 3, as waiting for it would last for ever: they sit in a collective, which Python
can't interrupt. What was saved stays, and the same command on all hosts continues from there.

Imports no jax: a process that never did is alone.
"""

import atexit
import itertools
import json
import logging
import os
import pickle
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

log = logging.getLogger(__name__)

PIECE = 2**20  # bytes of a message
KEPT = 1000  # answers; nobody is so far behind, as few chunks are in flight
SILENCE = 30.0  # seconds without a sign of life after which a process is lost
LOST = 3  # exit status
GONE = re.compile("gloo|nccl|connection|socket|peer|unavailable|barrier|heartbeat", re.IGNORECASE)

T = TypeVar("T")

_turns = itertools.count()
_mine: dict[str, Any] = {"fits": 0, "step": -1, "failed": "", "ended": False, "cut": False}
_thread: threading.Thread | None = None


class LostError(Exception):
    """Another process of the run is gone, or has not answered."""


def _state() -> Any:
    """Jax's view of the processes; None where jax was never imported."""
    found = sys.modules.get("jax._src.distributed")
    return None if found is None else found.global_state


def count() -> int:
    """The number of processes of this run."""
    state = _state()
    return 1 if state is None else state.num_processes


def index() -> int:
    """Which of them this one is."""
    state = _state()
    return 0 if state is None else state.process_id


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return index() == 0


def patience() -> float:
    """Seconds that processes wait for one that lives but does not arrive: DYNAMICS_PATIENCE."""
    return float(os.environ.get("DYNAMICS_PATIENCE") or 600)


def once(fn: Callable[..., T], *args: Any) -> T:
    """``fn(*args)`` on the first process: its value, or its error, on all. All must call it."""
    if count() == 1:
        return fn(*args)
    number = next(_turns)
    if not is_first():
        value, error = _hear(f"dynamics/once/{number}", 0)
    else:
        value, error = _tried(fn, *args)
        _say(f"dynamics/once/{number}", (value, error))
        if number >= KEPT:
            _state().client.key_value_delete(f"dynamics/once/{number - KEPT}")
    if error is not None:
        raise error
    return value


def together(fn: Callable[..., T], *args: Any) -> T:
    """``fn(*args)`` on every process, each with its own value: an error of one is raised on all.

    Nobody goes on before all are done.
    """
    if count() == 1:
        return fn(*args)
    turn = f"dynamics/together/{next(_turns)}"
    value, error = _tried(fn, *args)
    _say(f"{turn}/{index()}", error)
    errors = [_hear(f"{turn}/{process}", process) for process in range(count())]
    for found in [error, *errors]:
        if found is not None:
            raise found
    return value


def _tried(fn: Callable[..., T], *args: Any) -> tuple[Any, Exception | None]:
    try:
        return fn(*args), None
    except Exception as error:
        return None, error


def _say(key: str, value: Any) -> None:
    try:
        data = pickle.dumps(value)
        pickle.loads(data)
    except Exception:  # an error whose class can't be made of its text alone
        data = pickle.dumps(_plain(value))
    pieces = [data[i : i + PIECE] for i in range(0, len(data), PIECE)]
    client = _state().client
    for i, piece in enumerate(pieces):
        client.key_value_set_bytes(f"{key}/{i}", piece)
    client.key_value_set(f"{key}/pieces", str(len(pieces)))


def _plain(value: Any) -> Any:
    error = value[1] if isinstance(value, tuple) else value
    plain = RuntimeError(f"{type(error).__name__}: {error}")
    return (None, plain) if isinstance(value, tuple) else plain


def _hear(key: str, process: int) -> Any:
    client, wait = _state().client, int(1000 * patience())
    try:
        pieces = int(client.blocking_key_value_get(f"{key}/pieces", wait))
        data = [client.blocking_key_value_get_bytes(f"{key}/{i}", wait) for i in range(pieces)]
    except Exception as error:
        raise LostError(
            f"process {process} of {count()} has not answered process {index()} for "
            f"{patience():g} s ({str(error).splitlines()[0]}): start all again to continue"
        ) from None
    return pickle.loads(b"".join(data))


# ---- stopping together --------------------------------------------------------------------------


def ask_to_stop() -> None:
    """Tell the first process that this one was asked to end."""
    if count() > 1:
        _state().client.key_value_set("dynamics/stop/asked", str(index()), allow_overwrite=True)


def asked_to_stop() -> bool:
    """Whether a process was: for the first one, which decides."""
    return count() > 1 and bool(_state().client.key_value_dir_get("dynamics/stop"))


def lost(error: BaseException) -> LostError | None:
    """What an error of a collective means if it is that its other end is gone.

    Returns only if that one can't be named: else the watching thread ends this process.
    """
    said = str(error).splitlines()[0][:200] if str(error) else ""
    if count() == 1 or isinstance(error, LostError) or not GONE.search(said):
        return None
    _mine["cut"] = True
    time.sleep(10 * _pause())
    return LostError(
        f"process {index()} of {count()} lost another one of the run ({said}): "
        "start all again to continue from the newest checkpoint"
    )


# ---- signs of life ------------------------------------------------------------------------------


def join() -> None:
    """Begin to give signs of life and to watch for those of the others, once a process."""
    global _thread
    if count() > 1 and _thread is None:
        _thread = threading.Thread(target=_watch, daemon=True, name="signs of life")
        _thread.start()
        atexit.register(_end)


def entered() -> None:
    """A run of steps begins."""
    _mine.update(fits=_mine["fits"] + 1, step=0)


def reached(step: int) -> None:
    """The run is before this step."""
    _mine["step"] = step


def left(error: BaseException | None = None) -> None:
    """The run is done, or failed."""
    _mine.update(step=-1)
    if error is not None and not isinstance(error, SystemExit) and count() > 1:
        said = f"{type(error).__name__}: {str(error)[:200]}"
        _mine["failed"] = f"process {index()} of {count()} failed ({said})"
        _give(0)


def _end() -> None:
    _mine["ended"] = True
    _give(0)
    if _mine["failed"]:  # leaving in order would wait for the others, who are not coming
        _leave()


def _give(number: int) -> None:
    text = json.dumps(_mine | {"number": number})
    try:
        _state().client.key_value_set(f"dynamics/life/{index()}", text, allow_overwrite=True)
    except Exception:  # the others will take it for silence
        log.debug("process %d could not give a sign of life", index())


def _watch() -> None:
    """Ends this process when another is lost."""
    texts: dict[int, tuple[str, float]] = {}
    place, since = (0, -1), time.monotonic()
    for number in itertools.count(1):
        if _mine["ended"]:
            return
        _give(number)
        now, here = time.monotonic(), (_mine["fits"], _mine["step"])
        if here != place:
            place, since = here, now
        try:
            found = dict(_state().client.key_value_dir_get("dynamics/life/"))
        except Exception:  # the first process holds this board: jax ends us if it is gone
            found = {}
        for key, text in found.items():
            process = int(key.rsplit("/", 1)[1])
            if texts.get(process, ("",))[0] != text:
                texts[process] = text, now
        for process, (text, seen) in texts.items():
            if process != index():
                _check(process, json.loads(text), now - seen, now - since)
        time.sleep(_pause())


def _pause() -> float:
    """Seconds between signs of life."""
    return max(1.0, count() / 32)


def _check(process: int, theirs: dict[str, Any], silent: float, waited: float) -> None:
    """Ends this process if that one is lost."""
    inside, why = _mine["step"] >= 0, ""
    behind = (theirs["fits"], theirs["step"]) < (_mine["fits"], _mine["step"])
    if theirs["failed"]:
        why = theirs["failed"]
    elif theirs["ended"]:
        why = "has ended while others were training" if inside else ""
    elif silent > (4 * _pause() if _mine["cut"] else min(SILENCE, patience())):
        why = f"has given no sign of life for {silent:.0f} s: killed, suspended or cut off"
    elif inside and behind and waited > patience():
        why = f"is at step {theirs['step']}, where others have waited for it for {waited:.0f} s"
    if not why:
        return
    _mine["failed"] = why if theirs["failed"] else f"process {process} of {count()} {why}"
    log.error(
        "%s; process %d ends%s. Start all again to continue from the newest checkpoint.",
        *(_mine["failed"], index(), f" at step {_mine['step']}" if inside else ""),
    )
    _give(0)
    _leave()


def _leave() -> None:
    """Ends this process; the first, without whom there is no board, when the others have read."""
    if is_first():
        time.sleep(5 * _pause())
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(LOST)
