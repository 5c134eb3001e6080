"""Many points, each under the fingerprint of its config: computed once, alone or together."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from dynamics import config as configs
from dynamics import hosts
from dynamics.record.files import AGAIN, Findings, RecordError, asked, reading, writing
from dynamics.record.lock import fcntl
from dynamics.record.reading import read
from dynamics.record.writing import Recorder, still_marked

log = logging.getLogger(__name__)

GROUP = "group-"  # begins the name of a directory in which several points are computed

T = TypeVar("T")


def finished(folder: Path, points: Sequence[Any]) -> bool:
    """Whether all points have their ``done.json`` in a folder."""
    return all((folder / configs.fingerprint(point) / "done.json").is_file() for point in points)


@contextmanager
def alone(folder: Path, points: Sequence[Any], *, wait: bool) -> Iterator[bool]:
    """True in a context in which no other process computes the points; without ``wait``, or False.

    A lock on one byte for each point of the empty file ``<folder>/locks``, which ends with the
    process, however it ends. Finished points need none, and of several processes of one run the
    first holds for all. Not to be nested for one folder: a process has all its locks or none.
    """
    if fcntl is None or not hosts.is_first() or finished(folder, points):
        yield True
        return
    folder.mkdir(parents=True, exist_ok=True)
    places = sorted({int(configs.fingerprint(point), 16) >> 2 for point in points})
    with (folder / "locks").open("ab") as file:
        for place in places:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
            except (BlockingIOError, PermissionError):
                if not wait:
                    yield False
                    return
                log.info("waiting for another process that computes in %s", folder)
                fcntl.lockf(file, fcntl.LOCK_EX, 1, place)
            except OSError as error:
                log.warning("%s has no locks: start nothing else in it (%s)", folder, error)
                break
        yield True


def completed(
    folder: Path | str | None,
    points: Sequence[T],
    compute: Callable[[Sequence[T], "Recorder | None"], Sequence[Findings]],
    about: Mapping[str, Any],
    keep: Callable[[Path, Findings], None] = lambda home, findings: None,
) -> list[Findings]:
    """The findings of each point: read if its directory is finished, else computed and stored.

    ``compute`` gets the missing points together, and the recorder of the directory they are
    computed in: the point's own, or one for the group that is removed when all are stored.
    ``about`` goes into the provenance; its ``data``, the hash of the data, must be that of a
    finished run. ``keep(home, findings)`` stores weights in a point's directory before it is marked
    done. RecordError: other data.
    """
    if folder is None:
        return list(compute(points, None))
    names = [configs.fingerprint(point) for point in points]
    homes = [Path(folder, name) for name in names]
    todo = [points[i] for i in hosts.once(_to_compute, Path(folder), points, names, about)]
    if todo:
        group = GROUP + configs.fingerprint(tuple(todo))
        alone = len(todo) == 1
        home = Path(folder, configs.fingerprint(todo[0]) if alone else group)
        recorder = Recorder(home, todo[0] if alone else tuple(todo), about)
        for point, found in zip(todo, compute(todo, recorder), strict=True):
            home = Path(folder, configs.fingerprint(point))
            if not hosts.once((home / "done.json").is_file):
                point_recorder = Recorder(home, point, about)
                keep(home, found)
                point_recorder.finish(found)
    hosts.once(_remove_finished_groups, Path(folder))
    return [hosts.once(_stored, home) for home in homes]


def _to_compute(
    folder: Path, points: Sequence[T], names: Sequence[str], about: Mapping[str, Any]
) -> list[int]:
    """Which points are to be computed together: none, or all that a begun group has."""
    for name in names:
        still_marked(folder / name)
        _same_data(folder / name, about)
    missing = [name for name in names if not (folder / name / "done.json").is_file()]
    if not missing:
        return []
    todo = _begun_group(folder, names, missing) or missing
    if len(todo) > 1:
        chosen = tuple(points[names.index(name)] for name in todo)
        _same_data(folder / (GROUP + configs.fingerprint(chosen)), about)
    return [names.index(name) for name in todo]


def _stored(home: Path) -> Findings:
    run = read(home)
    return Findings(run.frames, run.arrays)


def _begun_group(folder: Path, points: Sequence[str], missing: Sequence[str]) -> list[str]:
    """The points, in its order, of a killed group that all missing ones were computed in."""
    for group in sorted(folder.glob(GROUP + "*/provenance.json")):
        if not (group.parent / "config.json").is_file():
            raise RecordError(f"{group.parent} has lost its config.json: {AGAIN}")
        with reading(group.parent):
            found = asked(group.parent)[0]
        names = [configs.fingerprint(point) for point in found]
        if set(missing) <= set(names) <= set(points):
            return names
    return []


def _remove_finished_groups(folder: Path) -> None:
    """Remove the directories of groups all of whose points are stored.

    So does any other process that stores points there, at the same time.
    """
    for group in folder.glob(GROUP + "*"):
        try:
            text = (group / "config.json").read_text()
        except FileNotFoundError:
            continue
        with reading(group):
            points = json.loads(text)
        if all((folder / configs.fingerprint(p) / "done.json").is_file() for p in points):
            with writing(group), suppress(FileNotFoundError):
                (group / "provenance.json").unlink(missing_ok=True)  # what is left is no group
                shutil.rmtree(group)


def _same_data(home: Path, about: Mapping[str, Any]) -> None:
    """RecordError if a run was begun or finished on other data than those at hand."""
    if not (home / "provenance.json").is_file():
        return
    with reading(home):
        then = json.loads((home / "provenance.json").read_text()).get("data")
    if then != about.get("data"):
        raise RecordError(
            f"{home} was computed on other data (hash {then}, now {about.get('data')}): "
            "bring the data back, or give another --runs folder"
        )
