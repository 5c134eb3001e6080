"""A run directory: what was asked, what made it, what came out. Imports no jax.

::

    <folder>/<fingerprint>/  config.json  provenance.json
                             rows.jsonl (live) -> rows.parquet (finished)
                             arrays/<name>.npz  checkpoints/  checksums/  done.json

Everything but the live rows is written under a temporary name and renamed, so a directory is
readable whatever happened to the process that wrote it. ``done.json`` is written last.
"""

import datetime
import importlib.metadata
import io
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import polars as pl

from dynamics import config as configs
from dynamics import hosts

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

    RecordError: no run there.
    """
    path = Path(path)
    for name in ("config.json", "provenance.json"):
        if not (path / name).is_file():
            raise RecordError(f"{path} holds no run: it has no {name}")
    done = (path / "done.json").is_file()
    if done:
        rows = pl.read_parquet(path / "rows.parquet")
    else:
        rows = pl.DataFrame(_columns(_live_rows(path)))
    return Run(
        path=path,
        fingerprint=path.name,
        config=json.loads((path / "config.json").read_text()),
        provenance=json.loads((path / "provenance.json").read_text()),
        rows=rows,
        arrays=_read_arrays(path, _done_arrays(path) if done else None),
        done=done,
    )


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
    for group in sorted(folder.glob(GROUP + "*/config.json")):
        names = [configs.fingerprint(point) for point in json.loads(group.read_text())]
        if set(missing) <= set(names) <= set(points):
            return names
    return []


def _remove_finished_groups(folder: Path) -> None:
    """Remove the directories of groups all of whose points are stored.

    So does any other process that stores points there, at the same time.
    """
    for group in folder.glob(GROUP + "*"):
        try:
            points = json.loads((group / "config.json").read_text())
        except FileNotFoundError:
            continue
        if all((folder / configs.fingerprint(p) / "done.json").is_file() for p in points):
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

        One run at a time may write a directory. RecordError: it holds another config's run.
        """
        self.path, self._config, self._about = Path(path), config, about
        self._rows = self.path / "rows.jsonl"
        hosts.once(self._open)

    def _open(self) -> None:
        text = configs.to_json(self._config)
        (self.path / "arrays").mkdir(parents=True, exist_ok=True)
        for left in self.path.rglob(".*.tmp"):
            left.unlink()
        if (self.path / "config.json").is_file():
            if (self.path / "config.json").read_text() != text:
                raise RecordError(f"{self.path} holds a run of another config: give another folder")
        write(self.path / "config.json", text)
        write(self.path / "provenance.json", json.dumps(provenance(self._about or {}), indent=1))
        if self._rows.is_file():  # drop the half row of a killed process
            content = self._rows.read_bytes()
            os.truncate(self._rows, content.rfind(b"\n") + 1)

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
        with self._rows.open("a") as f:
            f.write("".join([line % row for row in zip(*texts, strict=True)]))

    def position(self) -> int:
        """The bytes of live rows that are safely on the disk."""
        if not hosts.is_first():
            return 0
        with self._rows.open("ab") as f:
            os.fsync(f.fileno())
            return f.tell()

    def rewind(self, position: int) -> list[dict[str, Any]]:
        """Drop the live rows past ``position``; returns the rest. RecordError: fewer are there."""
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
        if self._rows.exists():
            os.truncate(self._rows, position)
        return _live_rows(self.path)

    def array(self, name: str, value: np.ndarray) -> None:
        """One array, readable from the moment this returns."""
        if not hosts.is_first():
            return
        buffer = io.BytesIO()
        np.savez(buffer, value=value)
        write(self.path / "arrays" / f"{name}.npz", buffer.getvalue())

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays stored so far."""
        return hosts.once(_read_arrays, self.path)

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
        write(self.path / "done.json", json.dumps(done))
        self._rows.unlink(missing_ok=True)
        for stored in (self.path / "arrays").glob("*.npz"):
            if stored.stem not in table.arrays:
                stored.unlink()
        shutil.rmtree(self.path / "stages", ignore_errors=True)


def write(path: Path, content: str | bytes) -> None:
    """A whole file or none: a temporary name, then rename."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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


def _live_rows(path: Path) -> list[dict[str, Any]]:
    """The complete lines of rows.jsonl."""
    file = path / "rows.jsonl"
    if not file.is_file():
        return []
    lines = file.read_bytes().split(b"\n")[:-1]  # what follows the last newline is half a row
    return [json.loads(line) for line in lines]


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Rows to columns; a row without a column has NaN there, or "" in a column of strings."""
    names = dict.fromkeys(name for row in rows for name in row)
    strings = {name for row in rows for name, value in row.items() if isinstance(value, str)}
    return {
        name: np.array([row.get(name, "" if name in strings else float("nan")) for row in rows])
        for name in names
    }


def _done_arrays(path: Path) -> set[str]:
    """The names of the arrays a finished run has; a killed process may have left others."""
    return set(json.loads((path / "done.json").read_text())["arrays"])


def _read_arrays(path: Path, names: set[str] | None = None) -> dict[str, np.ndarray]:
    out = {}
    for file in sorted((path / "arrays").glob("*.npz")):
        if names is None or file.stem in names:
            with np.load(file) as stored:
                out[file.stem] = stored["value"]
    return out


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, inner in value.items():
        nested = isinstance(inner, dict)
        out |= _flat(inner, f"{prefix}{name}.") if nested else {prefix + name: inner}
    return out
