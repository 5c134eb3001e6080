"""A run directory: what was asked, what made it, what came out. Imports no jax.

::

    <folder>/<fingerprint>/  config.json  provenance.json
                             rows.jsonl, sums.jsonl (live) -> rows.parquet (finished)
                             arrays/<name>.npz  checkpoints/  checksums/  done.json

Everything but the live rows is written under a temporary name and renamed, so a directory is
readable whatever happened to the process that wrote it. ``done.json`` is written last. What is read
is what was written or a RecordError: ``sums.jsonl`` vouches for the live rows, ``provenance.json``
for itself and the config, ``done.json`` for the final rows, and an array's file for the array.
"""

import datetime
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import polars as pl

from dynamics import config as configs
from dynamics import hosts

AGAIN = "restore it from a copy, or remove the run directory to compute it again"
GROUP = "group-"  # begins the name of a directory in which several points are computed
PACKAGES = ("training-dynamics", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

T = TypeVar("T")


class RecordError(Exception):
    """A run directory that can't be used as asked."""


class Table(NamedTuple):
    """What a study leaves behind: rows as equally long columns, arrays by name."""

    rows: dict[str, np.ndarray]
    arrays: dict[str, np.ndarray]


class Run(NamedTuple):
    """A run directory, read."""

    path: Path
    fingerprint: str
    config: dict[str, Any]  # nested; ``kind`` names the class of each part
    provenance: dict[str, Any]
    rows: pl.DataFrame
    arrays: dict[str, np.ndarray]
    done: bool


def read(path: Path | str) -> Run:
    """A run directory, finished or not; a last half-written row is dropped.

    RecordError: no run there, or one that was damaged.
    """
    path = Path(path)
    for name in ("config.json", "provenance.json"):
        if not (path / name).is_file():
            raise RecordError(f"{path} holds no run: it has no {name}")
    done = (path / "done.json").is_file()
    with _reading(path):
        config, provenance = _asked(path)
        rows, names = _done(path) if done else _live(path)
        table = rows if isinstance(rows, pl.DataFrame) else pl.DataFrame(_columns(rows))
        return Run(path, path.name, config, provenance, table, _read_arrays(path, names), done)


def runs(root: Path | str, experiment: str) -> list[Path]:
    """The finished runs of an experiment, the newest last."""
    found = Path(root, experiment).glob("*/done.json")
    return [done.parent for done in sorted(found, key=lambda p: (p.stat().st_mtime_ns, str(p)))]


def read_all(paths: Sequence[Path | str]) -> pl.DataFrame:
    """The rows of many runs in one table, each with its config flattened into ``config.*``."""
    frames = []
    for path in paths:
        run = read(path)
        values = {f"config.{k}": v for k, v in _flat(run.config).items()}
        columns = [pl.lit(v).alias(k) for k, v in ({"run": run.fingerprint} | values).items()]
        frames.append(run.rows.with_columns(columns))
    return pl.concat(frames, how="diagonal_relaxed") if frames else pl.DataFrame()


def completed(
    folder: Path | str | None,
    points: Sequence[T],
    compute: Callable[[Sequence[T], "Recorder | None"], Sequence[Table]],
    about: Mapping[str, Any],
) -> list[Table]:
    """The table of each point: read if its directory is finished, else computed and stored.

    ``compute`` gets the missing points together, and the recorder of the directory they are
    computed in: the point's own, or one for the group that is removed when all are stored.
    ``about`` goes into the provenance; its ``data``, the hash of the data, must be that of a
    finished run. RecordError if it isn't.
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
        tables = compute(todo, recorder)
        for point, table in zip(todo, tables, strict=True):
            home = Path(folder, configs.fingerprint(point))
            if not hosts.once((home / "done.json").is_file):
                Recorder(home, point, about).finish(table)
    hosts.once(_remove_finished_groups, Path(folder))
    return [hosts.once(_stored, home) for home in homes]


def _to_compute(
    folder: Path, points: Sequence[T], names: Sequence[str], about: Mapping[str, Any]
) -> list[int]:
    """Which points are to be computed together: none, or all that a begun group has."""
    for name in names:
        _same_data(folder / name, about)
    missing = [name for name in names if not (folder / name / "done.json").is_file()]
    if not missing:
        return []
    todo = _begun_group(folder, names, missing) or missing
    if len(todo) > 1:
        chosen = tuple(points[names.index(name)] for name in todo)
        _same_data(folder / (GROUP + configs.fingerprint(chosen)), about)
    return [names.index(name) for name in todo]


def _stored(home: Path) -> Table:
    return _table(read(home))


def _begun_group(folder: Path, points: Sequence[str], missing: Sequence[str]) -> list[str]:
    """The points, in its order, of a killed group that all missing ones were computed in."""
    for group in sorted(folder.glob(GROUP + "*/provenance.json")):
        if not (group.parent / "config.json").is_file():
            raise RecordError(f"{group.parent} has lost its config.json: {AGAIN}")
        with _reading(group.parent):
            found = _asked(group.parent)[0]
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
        with _reading(group):
            points = json.loads(text)
        if all((folder / configs.fingerprint(p) / "done.json").is_file() for p in points):
            (group / "provenance.json").unlink(missing_ok=True)  # first: what is left is no group
            shutil.rmtree(group, ignore_errors=True)


def _table(run: Run) -> Table:
    """The table as it was given to be stored: numpy strings, columns that can be written to."""

    def column(values: pl.Series) -> np.ndarray:
        text = values.dtype == pl.String
        return np.array(values.to_list()) if text else values.to_numpy().copy()

    return Table({name: column(run.rows[name]) for name in run.rows.columns}, run.arrays)


def _same_data(home: Path, about: Mapping[str, Any]) -> None:
    """RecordError if a run was begun or finished on other data than those at hand."""
    if not (home / "provenance.json").is_file():
        return
    with _reading(home):
        then = json.loads((home / "provenance.json").read_text()).get("data")
    if then != about.get("data"):
        raise RecordError(
            f"{home} was computed on other data (hash {then}, now {about.get('data')}): "
            "bring the data back, or give another --runs folder"
        )


class Recorder:
    """Writes one run directory; of several processes the first does, and all must call it."""

    def __init__(self, path: Path | str, config: Any, about: Mapping[str, Any] | None = None):
        """Opens or makes the directory; what a killed process left half-written is removed.

        One run at a time may write a directory. RecordError: it holds another config's run, or
        can't be written.
        """
        self.path, self._config, self._about = Path(path), config, about
        self._rows, self._sums = self.path / "rows.jsonl", self.path / "sums.jsonl"
        self._end: int | None = None  # of the live rows that are vouched for
        hosts.once(self._open)

    def _open(self) -> None:
        finished = (self.path / "rows.parquet").exists() and not self._rows.exists()
        if finished and not (self.path / "done.json").exists():
            raise RecordError(f"{self.path} was finished and has lost its done.json: {AGAIN}")
        with _writing(self.path):
            (self.path / "arrays").mkdir(parents=True, exist_ok=True)
            for left in self.path.rglob(".*.tmp"):
                left.unlink()
        text = configs.to_json(self._config)
        if not (self.path / "config.json").is_file():
            with _writing(self.path):
                self._rows.touch()
                self._sums.touch()
        elif (self.path / "config.json").read_bytes() != text.encode():
            raise RecordError(
                f"{self.path} holds a run of another config, or its config.json was changed: "
                "give another folder"
            )
        if self._sums.is_file():  # drop the half line of a killed process
            os.truncate(self._sums, self._sums.read_bytes().rfind(b"\n") + 1)
        write(self.path / "config.json", text)
        made = json.loads(json.dumps(provenance(self._about or {})))
        made |= {"sums": {"config": _hash(text.encode()), "this": _hash(json.dumps(made).encode())}}
        write(self.path / "provenance.json", json.dumps(made, indent=1))

    def stage(self, name: str) -> "Recorder":
        """A directory in this one for a part of the run, which goes when the run is finished."""
        return Recorder(self.path / "stages" / name, self._config, self._about)

    def append(self, columns: Mapping[str, np.ndarray]) -> None:
        """Rows at the end of the live table; NaN stands for what a row does not have."""
        if not hosts.is_first():
            return
        texts = [_texts(np.asarray(values)) for values in columns.values()]
        names = [json.dumps(name).replace("%", "%%") for name in columns]
        line = "{" + ", ".join(f"{name}: %s" for name in names) + "}\n"
        data = "".join([line % row for row in zip(*texts, strict=True)]).encode()
        end = self._end
        if end is None or end != self._rows.stat().st_size:  # drop what a killed process left
            end = self._vouched()[-1][0]
            os.truncate(self._rows, end)
        with _writing(self._rows), self._rows.open("ab") as f:
            f.write(data)
        self._vouch([end + len(data), zlib.crc32(data)])
        self._end = end + len(data)

    def position(self) -> int:
        """The bytes of live rows that are safely on the disk."""
        if not hosts.is_first():
            return 0
        for file in (self._sums, self._rows):
            with _writing(file), file.open("ab") as f:
                os.fsync(f.fileno())
        return self._rows.stat().st_size

    def rewind(self, position: int) -> list[dict[str, Any]]:
        """Drop the live rows past ``position``; returns the rest.

        RecordError: fewer are there, or others than were written.
        """
        return hosts.once(self._rewind, position)

    def _rewind(self, position: int) -> list[dict[str, Any]]:
        size = self._rows.stat().st_size if self._rows.exists() else 0
        if (self.path / "done.json").is_file():
            raise RecordError(f"{self.path} holds a finished run: read() it")
        if size < position:
            raise RecordError(
                f"{self._rows} has {size} bytes, the checkpoint was made with {position}: "
                "rows were lost; remove the run directory to start over"
            )
        kept = [sums for sums in self._vouched() if sums[0] <= position] if position else []
        if position and kept[-1][0] != position:
            raise RecordError(f"{self._sums} has lost what vouches for the rows: {AGAIN}")
        arrays = _sums(self.path)[1] if position else []
        lines = [json.dumps(sums) + "\n" for sums in [*kept[1:], *arrays]]
        write(self._sums, "".join(lines))  # first: rows that nothing vouches for are dropped
        with _writing(self._rows):
            self._rows.touch()
            os.truncate(self._rows, position)
        self._end = position
        with _reading(self.path):
            return _live(self.path)[0]

    def _vouched(self) -> list[list[int]]:
        with _reading(self.path):
            return [[0, 0], *_sums(self.path)[0]]

    def _vouch(self, what: Any) -> None:
        with _writing(self._sums), self._sums.open("ab") as f:
            f.write(json.dumps(what).encode() + b"\n")

    def array(self, name: str, value: np.ndarray) -> None:
        """One array, readable from the moment this returns."""
        if not hosts.is_first():
            return
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:  # as numpy does, but dated 1980 by any clock
            with file.open(zipfile.ZipInfo("value.npy"), "w", force_zip64=True) as f:
                np.lib.format.write_array(f, np.asanyarray(value), allow_pickle=False)
        write(self.path / "arrays" / f"{name}.npz", buffer.getvalue())
        self._vouch(name)

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays stored so far."""
        return hosts.once(self._arrays)

    def _arrays(self) -> dict[str, np.ndarray]:
        with _reading(self.path):
            return _read_arrays(self.path, set(_sums(self.path)[1]))

    def finish(self, table: Table) -> None:
        """Store the final table and mark the directory done; the live rows give way to it."""
        hosts.once(self._finish, table)

    def _finish(self, table: Table) -> None:
        for name, value in table.arrays.items():
            self.array(name, value)
        buffer = io.BytesIO()
        pl.DataFrame(table.rows).write_parquet(buffer)
        write(self.path / "rows.parquet", buffer.getvalue())
        done = {"finished": _now(), "arrays": sorted(table.arrays)}
        done |= {"rows": _hash(buffer.getvalue())}
        write(self.path / "done.json", json.dumps(done))
        self._rows.unlink(missing_ok=True)
        self._sums.unlink(missing_ok=True)
        for stored in (self.path / "arrays").glob("*.npz"):
            if stored.stem not in table.arrays:
                stored.unlink()
        shutil.rmtree(self.path / "stages", ignore_errors=True)


def write(path: Path, content: str | bytes) -> None:
    """A whole file or none: a temporary name, then rename. RecordError: it can't be written."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _writing(path):
        with temporary.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)


def export(
    folder: Path | str, name: str, columns: Mapping[str, np.ndarray], about: Mapping[str, Any]
) -> list[Path]:
    """A table as NAME.npz and NAME.parquet, and NAME.json that says what it is; their paths.

    Each appears whole or not at all. ValueError: columns of different lengths.
    """
    lengths = {column: len(values) for column, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the columns of a table must be equally long, got {lengths}")
    packed, table = io.BytesIO(), io.BytesIO()
    np.savez(packed, **columns)  # pyright: ignore[reportArgumentType]
    pl.DataFrame(dict(columns)).write_parquet(table)
    contents = {"npz": packed.getvalue(), "parquet": table.getvalue()}
    text = json.dumps({"name": name, "columns": list(columns), **about}, indent=1)
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths = [Path(folder, f"{name}.{suffix}") for suffix in (*contents, "json")]
    for path, content in zip(paths, [*contents.values(), text], strict=True):
        write(path, content)
    return paths


def provenance(about: Mapping[str, Any]) -> dict[str, Any]:
    """What made a result: code, versions, machine, command, time; and ``about``."""
    here = Path(__file__).parent
    return {
        "started": _now(),
        "command": sys.argv,
        "git": _git(here, "rev-parse", "HEAD"),
        "dirty": _git(here, "diff", "HEAD"),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "versions": {name: _version(name) for name in PACKAGES},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        **about,
    }


def _git(where: Path, *command: str) -> str | None:
    try:
        done = subprocess.run(["git", *command], cwd=where, capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _texts(values: np.ndarray) -> list[str]:
    """Each value as JSON; numbers in one call for all, a third of the time of one for each."""
    if values.dtype.kind in "biuf" and values.size:
        return json.dumps(values.tolist())[1:-1].split(", ")
    return [json.dumps(value) for value in values.tolist()]


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """RecordError for a full disk or a missing permission, which often don't say where."""
    try:
        yield
    except OSError as error:
        raise RecordError(
            f"{path} can't be written ({error.strerror}): see to the space and the permissions "
            "there and start again"
        ) from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """RecordError for whatever the readers of the formats say to damaged files."""
    try:
        yield
    except (RecordError, PermissionError):
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {str(error)[:200]}"
        raise RecordError(f"{path} is damaged ({why}): {AGAIN}") from error


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _check(path: Path, same: bool) -> None:
    if not same:
        raise RecordError(f"{path} was changed after it was written: {AGAIN}")


def _asked(path: Path) -> tuple[Any, dict[str, Any]]:
    """The config and the provenance, as they were written."""
    config, made = (path / "config.json").read_bytes(), path / "provenance.json"
    provenance = json.loads(made.read_text())
    sums = provenance.pop("sums", None)
    if sums is not None:  # runs of earlier versions have none
        _check(made, sums["this"] == _hash(json.dumps(provenance).encode()))
        _check(path / "config.json", sums["config"] == _hash(config))
    return json.loads(config), provenance


def _sums(path: Path) -> tuple[list[list[int]], list[str]]:
    """What vouches for live rows, [the byte after them, their CRC-32] each; the arrays stored."""
    if not (path / "sums.jsonl").is_file():
        raise RecordError(f"{path} has lost its sums.jsonl: {AGAIN}")
    lines = (path / "sums.jsonl").read_bytes().split(b"\n")[:-1]  # the last one may be half a line
    found = [json.loads(line) for line in lines]
    rows = [line for line in found if isinstance(line, list)]
    return rows, list(dict.fromkeys(line for line in found if isinstance(line, str)))


def _live(path: Path) -> tuple[list[dict[str, Any]], set[str]]:
    """The rows so far, and the names of the arrays; what comes after them was not completed."""
    sums, arrays = _sums(path)
    file = path / "rows.jsonl"
    if not file.is_file():
        raise RecordError(f"{path} has lost its rows.jsonl: {AGAIN}")
    content, start = file.read_bytes(), 0
    for end, crc in sums:
        _check(file, len(content) >= end and zlib.crc32(content[start:end]) == crc)
        start = end
    return [json.loads(line) for line in content[:start].splitlines()], set(arrays)


def _done(path: Path) -> tuple[pl.DataFrame, set[str]]:
    """The final rows, and the names of the arrays; a killed process may have left others."""
    done, rows = json.loads((path / "done.json").read_text()), (path / "rows.parquet").read_bytes()
    _check(path / "rows.parquet", done.get("rows", _hash(rows)) == _hash(rows))
    return pl.read_parquet(io.BytesIO(rows)), set(done["arrays"])


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Rows to columns; a row without a column has NaN there, or "" in a column of strings."""
    names = dict.fromkeys(name for row in rows for name in row)
    strings = {name for row in rows for name, value in row.items() if isinstance(value, str)}
    return {
        name: np.array([row.get(name, "" if name in strings else float("nan")) for row in rows])
        for name in names
    }


def _read_arrays(path: Path, names: set[str]) -> dict[str, np.ndarray]:
    out = {}
    for name in sorted(names):
        file = path / "arrays" / f"{name}.npz"
        if not file.is_file():
            raise RecordError(f"{path} has lost its arrays/{file.name}: {AGAIN}")
        with _reading(file), zipfile.ZipFile(file) as stored:
            value = stored.read("value.npy")  # the whole of it, so that its CRC-32 is compared
            out[name] = np.lib.format.read_array(io.BytesIO(value))
    return out


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, inner in value.items():
        nested = isinstance(inner, dict)
        out |= _flat(inner, f"{prefix}{name}.") if nested else {prefix + name: inner}
    return out
