"""One run directory, while it is computed."""

import datetime
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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from dynamics import config as configs
from dynamics import hosts
from dynamics.record.files import (
    AGAIN,
    RecordError,
    Table,
    digest,
    live,
    reading,
    stored_arrays,
    vouched_for,
    write,
    writing,
)

PACKAGES = ("training-dynamics", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


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
        with writing(self.path):
            (self.path / "arrays").mkdir(parents=True, exist_ok=True)
            for left in self.path.rglob(".*.tmp"):
                left.unlink()
        text = configs.to_json(self._config)
        if not (self.path / "config.json").is_file():
            with writing(self.path):
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
        made |= {
            "sums": {"config": digest(text.encode()), "this": digest(json.dumps(made).encode())}
        }
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
        with writing(self._rows), self._rows.open("ab") as f:
            f.write(data)
        self._vouch([end + len(data), zlib.crc32(data)])
        self._end = end + len(data)

    def position(self) -> int:
        """The bytes of live rows that are safely on the disk."""
        if not hosts.is_first():
            return 0
        for file in (self._sums, self._rows):
            with writing(file), file.open("ab") as f:
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
        arrays = vouched_for(self.path)[1] if position else []
        lines = [json.dumps(sums) + "\n" for sums in [*kept[1:], *arrays]]
        write(self._sums, "".join(lines))  # first: rows that nothing vouches for are dropped
        with writing(self._rows):
            self._rows.touch()
            os.truncate(self._rows, position)
        self._end = position
        with reading(self.path):
            return live(self.path)[0]

    def _vouched(self) -> list[list[int]]:
        with reading(self.path):
            return [[0, 0], *vouched_for(self.path)[0]]

    def _vouch(self, what: Any) -> None:
        with writing(self._sums), self._sums.open("ab") as f:
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
        with reading(self.path):
            return stored_arrays(self.path, set(vouched_for(self.path)[1]))

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
        done |= {"rows": digest(buffer.getvalue())}
        write(self.path / "done.json", json.dumps(done))
        self._rows.unlink(missing_ok=True)
        self._sums.unlink(missing_ok=True)
        for stored in (self.path / "arrays").glob("*.npz"):
            if stored.stem not in table.arrays:
                stored.unlink()
        shutil.rmtree(self.path / "stages", ignore_errors=True)


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
