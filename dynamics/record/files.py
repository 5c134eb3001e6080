"""The files of a run directory: written whole, read as they were written or refused."""

import hashlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

AGAIN = "restore it from a copy, or remove the run directory to compute it again"


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


def write(path: Path, content: str | bytes) -> None:
    """A whole file or none: a temporary name, then rename. RecordError: it can't be written."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        with temporary.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """RecordError for a full disk or a missing permission, which often don't say where."""
    try:
        yield
    except OSError as error:
        raise RecordError(
            f"{path} can't be written ({error.strerror}): see to the space and the permissions "
            "there and start again"
        ) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """RecordError for whatever the readers of the formats say to damaged files."""
    try:
        yield
    except (RecordError, PermissionError):
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {str(error)[:200]}"
        raise RecordError(f"{path} is damaged ({why}): {AGAIN}") from error


def digest(data: bytes) -> str:
    """BLAKE2b, 16 bytes in hexadecimal."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _check(path: Path, same: bool) -> None:
    if not same:
        raise RecordError(f"{path} was changed after it was written: {AGAIN}")


def asked(path: Path) -> tuple[Any, dict[str, Any]]:
    """The config and the provenance, as they were written."""
    config, made = (path / "config.json").read_bytes(), path / "provenance.json"
    provenance = json.loads(made.read_text())
    sums = provenance.pop("sums", None)
    if sums is not None:  # runs of earlier versions have none
        _check(made, sums["this"] == digest(json.dumps(provenance).encode()))
        _check(path / "config.json", sums["config"] == digest(config))
    return json.loads(config), provenance


def vouched_for(path: Path) -> tuple[list[list[int]], list[str]]:
    """What vouches for live rows, [the byte after them, their CRC-32] each; the arrays stored."""
    if not (path / "sums.jsonl").is_file():
        raise RecordError(f"{path} has lost its sums.jsonl: {AGAIN}")
    lines = (path / "sums.jsonl").read_bytes().split(b"\n")[:-1]  # the last one may be half a line
    found = [json.loads(line) for line in lines]
    rows = [line for line in found if isinstance(line, list)]
    return rows, list(dict.fromkeys(line for line in found if isinstance(line, str)))


def live(path: Path) -> tuple[list[dict[str, Any]], set[str]]:
    """The rows so far, and the names of the arrays; what comes after them was not completed."""
    sums, arrays = vouched_for(path)
    file = path / "rows.jsonl"
    if not file.is_file():
        raise RecordError(f"{path} has lost its rows.jsonl: {AGAIN}")
    content, start = file.read_bytes(), 0
    for end, crc in sums:
        _check(file, len(content) >= end and zlib.crc32(content[start:end]) == crc)
        start = end
    return [json.loads(line) for line in content[:start].splitlines()], set(arrays)


def finished(path: Path) -> tuple[pl.DataFrame, set[str]]:
    """The final rows, and the names of the arrays; a killed process may have left others."""
    done, rows = json.loads((path / "done.json").read_text()), (path / "rows.parquet").read_bytes()
    _check(path / "rows.parquet", done.get("rows", digest(rows)) == digest(rows))
    return pl.read_parquet(io.BytesIO(rows)), set(done["arrays"])


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Rows to columns; a row without a column has NaN there, or "" in a column of strings."""
    names = dict.fromkeys(name for row in rows for name in row)
    strings = {name for row in rows for name, value in row.items() if isinstance(value, str)}
    return {
        name: np.array([row.get(name, "" if name in strings else float("nan")) for row in rows])
        for name in names
    }


def stored_arrays(path: Path, names: set[str]) -> dict[str, np.ndarray]:
    """The arrays of these names."""
    out = {}
    for name in sorted(names):
        file = path / "arrays" / f"{name}.npz"
        if not file.is_file():
            raise RecordError(f"{path} has lost its arrays/{file.name}: {AGAIN}")
        with reading(file), zipfile.ZipFile(file) as stored:
            value = stored.read("value.npy")  # the whole of it, so that its CRC-32 is compared
            out[name] = np.lib.format.read_array(io.BytesIO(value))
    return out
