"""One run directory, while it is computed."""

import datetime
import importlib.metadata
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dynamics import config as configs
from dynamics import hosts
from dynamics.record.files import (
    AGAIN,
    FORMAT,
    Array,
    Findings,
    RecordError,
    asked,
    check,
    digest,
    live,
    packed,
    reading,
    unpacked,
    vouched_for,
    vouching,
    write,
    writing,
)
from dynamics.record.lock import Lock, locked

PACKAGES = ("training-dynamics", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Recorder:
    """Writes one run directory; of several processes the first does, and all must call it."""

    def __init__(self, path: Path | str, config: Any, about: Mapping[str, Any] | None = None):
        """Opens or makes the directory; what a killed process left half-written is removed.

        It is this process's until it is finished, or the recorder or the process is gone.
        RecordError: another process has it, it holds another config's run, or can't be written.
        ValueError: an entry of the config or of ``about`` that JSON can't hold; nothing is made.
        """
        self.path, self._config = Path(path), config
        self._about = configs.to_dict(about or {}, "about")
        configs.to_json(config)
        self._rows, self._sums = self.path / "rows.jsonl", self.path / "sums.jsonl"
        self._end: int | None = None  # of the live rows that are vouched for
        self._lock: Lock | None = None
        hosts.once(self._open)

    def _open(self) -> None:
        still_marked(self.path)
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = locked(self.path)
        if (self.path / "config.json").is_file() and (self.path / "provenance.json").is_file():
            with reading(self.path):
                asked(self.path)  # as it was written, and of this format
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
        made = json.loads(json.dumps({"format": FORMAT, **provenance(self._about)}))
        made |= {
            "sums": {"config": digest(text.encode()), "this": digest(json.dumps(made).encode())}
        }
        write(self.path / "provenance.json", json.dumps(made, indent=1))

    def stage(self, name: str) -> "Recorder":
        """A directory in this one for a part of the run, which goes when the run is finished."""
        return Recorder(self.path / "stages" / named(name), self._config, self._about)

    def append(self, frame: str, columns: Mapping[str, np.ndarray]) -> None:
        """Rows at the end of a live frame, from columns of equal lengths."""
        if not hosts.is_first():
            return
        texts = [_texts(np.asarray(values)) for values in columns.values()]
        start, *names = (json.dumps(name).replace("%", "%%") for name in (frame, *columns))
        line = f"[{start}, {{" + ", ".join(f"{name}: %s" for name in names) + "}]\n"
        data = "".join([line % row for row in zip(*texts, strict=True)]).encode()
        if not data:
            return
        end = self._end
        if end is None or end != self._rows.stat().st_size:  # drop what a killed process left
            end = self._vouched()[-1][0]
            os.truncate(self._rows, end)
        with writing(self._rows), self._rows.open("ab") as f:
            f.write(data)
        self._vouch([end + len(data), zlib.crc32(data)])
        self._end = end + len(data)

    def position(self) -> dict[str, int]:
        """Where the live rows and arrays end that are safely on the disk, for ``rewind``."""
        if not hosts.is_first():
            return {}
        for file in (self._sums, self._rows):
            with writing(file), file.open("ab") as f:
                os.fsync(f.fileno())
        sums = self._sums.read_bytes()
        return {"rows": self._rows.stat().st_size, "sums": len(sums), "crc": zlib.crc32(sums)}

    def rewind(self, position: Mapping[str, int] | None) -> dict[str, list[dict[str, Any]]]:
        """Drop the live rows and arrays past a ``position`` (None: all); the rows of each frame.

        RecordError: fewer are there, or others than were written.
        """
        return hosts.once(self._rewind, position)

    def _rewind(self, position: Mapping[str, int] | None) -> dict[str, list[dict[str, Any]]]:
        if (self.path / "done.json").is_file():
            raise RecordError(f"{self.path} holds a finished run: read() it")
        wanted = position or {"rows": 0, "sums": 0, "crc": 0}
        files = {self._sums: wanted["sums"], self._rows: wanted["rows"]}  # first what vouches
        for file, bytes_then in files.items():
            size = file.stat().st_size if file.exists() else 0
            if size < bytes_then:
                raise RecordError(
                    f"{file} has {size} bytes, the checkpoint was made with {bytes_then}: "
                    f"rows were lost; {AGAIN}"
                )
        if position:
            same = zlib.crc32(self._sums.read_bytes()[: wanted["sums"]]) == wanted["crc"]
            check(self._sums, same)
        for file, bytes_then in files.items():
            with writing(file):
                file.touch()
                os.truncate(file, bytes_then)
        self._end = wanted["rows"]
        with reading(self.path):
            return live(self.path)[0]

    def _vouched(self) -> list[list[int]]:
        with reading(self.path):
            return [[0, 0], *vouched_for(self.path).rows]

    def _vouch(self, what: Any) -> None:
        with writing(self._sums), self._sums.open("ab") as f:
            f.write(vouching(what))

    def measured(self, probe: str, metric: str, step: int, value: Array) -> None:
        """An array that a probe measured at a step, readable from the moment this returns."""
        if not hosts.is_first():
            return
        file = f"{named(probe)},{named(metric)},{step}.npz"  # a comma is in no name
        content = packed(value, {"probe": probe, "metric": metric, "step": int(step)})
        write(self.path / "arrays" / file, content)
        self._vouch({file: digest(content)})

    def pieces(self) -> list[tuple[str, str, int, Array]]:
        """(probe, metric, step, array) of what ``measured`` stored so far."""
        return hosts.once(self._pieces)

    def _pieces(self) -> list[tuple[str, str, int, Array]]:
        with reading(self.path):
            found = [unpacked(self.path, *item) for item in vouched_for(self.path).arrays.items()]
        return [(a["probe"], a["metric"], a["step"], value) for value, a in found]

    def finish(self, findings: Findings) -> None:
        """Store the frames and arrays and mark the directory done; live rows give way to them."""
        hosts.once(self._finish, findings)

    def _finish(self, findings: Findings) -> None:
        done: dict[str, Any] = {"finished": _now(), "frames": {}, "arrays": {}}
        for name in ("frames", "arrays"):
            with writing(self.path):
                (self.path / name).mkdir(exist_ok=True)
        for name, value in findings.arrays.items():
            content, file = packed(value, {"name": name}), f"{named(name)}.npz"
            write(self.path / "arrays" / file, content)
            done["arrays"][file] = digest(content)
        for name, frame in findings.frames.items():
            buffer = io.BytesIO()
            frame.write_parquet(buffer)
            write(self.path / "frames" / f"{named(name)}.parquet", buffer.getvalue())
            done["frames"][name] = digest(buffer.getvalue())
        done["this"] = digest(json.dumps(done).encode())
        write(self.path / "done.json", json.dumps(done))
        self._rows.unlink(missing_ok=True)
        self._sums.unlink(missing_ok=True)
        for stored in (self.path / "arrays").glob("*.npz"):
            if stored.name not in done["arrays"]:
                stored.unlink()
        shutil.rmtree(self.path / "stages", ignore_errors=True)
        if self._lock is not None:
            self._lock.release()


def still_marked(path: Path) -> None:
    """RecordError if a run was finished there and has lost its mark: it is not computed again."""
    finished = (path / "frames").exists() and not (path / "rows.jsonl").exists()
    if finished and not (path / "done.json").exists():
        raise RecordError(f"{path} was finished and has lost its done.json: {AGAIN}")


def named(name: str) -> str:
    """The name, if a file may have it; ValueError if not."""
    if not re.fullmatch(r"[\w@+-][\w.@+-]*", name):
        raise ValueError(
            "a frame, probe, array or stage must be named by letters, digits and _ . @ + - (no . "
            f"first), got {name!r}"
        )
    return name


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
