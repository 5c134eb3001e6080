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

FORMAT = 2  # of a run directory; 1 had one table of rows, with NaN for what was not measured
AGAIN = "restore it from a copy, or remove the run directory to compute it again"


class RecordError(Exception):
    """A run directory that can't be used as asked."""


class Array(NamedTuple):
    """A labelled array: its axes have names, and some of them coordinates."""

    values: np.ndarray
    dims: tuple[str, ...]  # a name for each axis
    coords: Mapping[str, np.ndarray] = {}  # dim -> the label of each place along it

    def at(self, **labels: Any) -> "Array":
        """The part of the array where each dim named has the label given; those dims are gone.

        A dim without coordinates is labelled by its places, 0, 1, ... ValueError: no such dim, no
        such label.
        """
        values, dims = self.values, self.dims
        for dim, label in labels.items():
            if dim not in dims:
                raise ValueError(f"the array has no dim {dim!r}, it has {dims}")
            axis = dims.index(dim)
            marks = self.coords.get(dim, np.arange(values.shape[axis]))
            places = np.flatnonzero(np.asarray(marks) == label)
            if len(places) != 1:
                raise ValueError(
                    f"the array has no {dim} {label!r}, it has {np.asarray(marks).tolist()}"
                )
            values = np.take(values, places[0], axis=axis)
            dims = dims[:axis] + dims[axis + 1 :]
        return Array(values, dims, {d: c for d, c in self.coords.items() if d in dims})

    def among(self, dim: str, labels: Sequence[Any]) -> "Array":
        """The array at these labels of a dim, in their order. ValueError: as ``at``."""
        parts = [self.at(**{dim: label}).values for label in labels]
        values = np.stack(parts, axis=self.dims.index(dim))
        return Array(values, self.dims, {**self.coords, dim: np.asarray(labels)})

    def frame(self, name: str) -> pl.DataFrame:
        """A row for each place: the label along each dim, and the value under ``name``."""
        columns: dict[str, np.ndarray] = {}
        for axis, dim in enumerate(self.dims):
            labels = np.asarray(self.coords.get(dim, np.arange(self.values.shape[axis])))
            rest = [1] * self.values.ndim
            rest[axis] = len(labels)
            columns[dim] = np.broadcast_to(labels.reshape(rest), self.values.shape).ravel()
        return pl.DataFrame({**columns, name: self.values.ravel()})

    def renamed(self, **names: str) -> "Array":
        """The array with other names of dims."""
        dims = tuple(names.get(dim, dim) for dim in self.dims)
        return Array(self.values, dims, {names.get(d, d): c for d, c in self.coords.items()})


class Findings(NamedTuple):
    """What a study leaves behind: frames and labelled arrays by name, and the weights it keeps.

    ``weights`` are states of populations by name, for the experiment to store; a study of several
    points tells them apart by a column ``point`` of a frame and a dim ``point`` of an array.
    """

    frames: dict[str, pl.DataFrame]
    arrays: dict[str, Array] = {}
    weights: dict[str, Any] = {}


class Run(NamedTuple):
    """A run directory, read."""

    path: Path
    fingerprint: str
    config: dict[str, Any]  # nested; ``kind`` names the class of each part
    provenance: dict[str, Any]
    frames: dict[str, pl.DataFrame]
    arrays: dict[str, Array]
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


def check(path: Path, same: bool) -> None:
    """RecordError unless a file is the same as when it was written."""
    if not same:
        raise RecordError(f"{path} was changed after it was written: {AGAIN}")


def asked(path: Path) -> tuple[Any, dict[str, Any]]:
    """The config and the provenance, as they were written. RecordError: of another format."""
    config, made = (path / "config.json").read_bytes(), path / "provenance.json"
    provenance = json.loads(made.read_text())
    if (found := provenance.get("format", 1)) != FORMAT:
        raise RecordError(
            f"{path} has format {found}, this version reads format {FORMAT}: compute it again, in "
            "another folder or after removing it"
        )
    sums = provenance.pop("sums")
    check(made, sums["this"] == digest(json.dumps(provenance).encode()))
    check(path / "config.json", sums["config"] == digest(config))
    return json.loads(config), provenance


class Vouched(NamedTuple):
    """What ``sums.jsonl`` says of a live run."""

    rows: list[list[int]]  # [the byte after them, their CRC-32] of each block of rows
    arrays: dict[str, str]  # file name -> digest


def vouching(what: Any) -> bytes:
    """A line of ``sums.jsonl``: what it says, and the CRC-32 of that."""
    return json.dumps([what, zlib.crc32(json.dumps(what).encode())]).encode() + b"\n"


def vouched_for(path: Path) -> Vouched:
    """What vouches for live rows and arrays."""
    file, found = path / "sums.jsonl", Vouched([], {})
    if not file.is_file():
        raise RecordError(f"{path} has lost its sums.jsonl: {AGAIN}")
    for line in file.read_bytes().split(b"\n")[:-1]:  # the last one may be half a line
        what = json.loads(line)[0]
        check(file, vouching(what) == line + b"\n")
        if isinstance(what, dict):
            found.arrays.update(what)
        else:
            found.rows.append(what)
    return found


def live(path: Path) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """The rows so far of each frame, and the array files; what comes after was not completed."""
    sums, arrays = vouched_for(path)
    file = path / "rows.jsonl"
    if not file.is_file():
        raise RecordError(f"{path} has lost its rows.jsonl: {AGAIN}")
    content, start = file.read_bytes(), 0
    for end, crc in sums:
        check(file, len(content) >= end and zlib.crc32(content[start:end]) == crc)
        start = end
    rows: dict[str, list[dict[str, Any]]] = {}
    for line in content[:start].splitlines():
        frame, row = json.loads(line)
        rows.setdefault(frame, []).append(row)
    return rows, arrays


def finished(path: Path) -> tuple[dict[str, pl.DataFrame], dict[str, str]]:
    """The final frames, and the array files; a killed process may have left others."""
    done, frames = json.loads((path / "done.json").read_text()), {}
    check(path / "done.json", done.pop("this") == digest(json.dumps(done).encode()))
    for name, wanted in done["frames"].items():
        file = path / "frames" / f"{name}.parquet"
        if not file.is_file():
            raise RecordError(f"{path} has lost its frames/{file.name}: {AGAIN}")
        content = file.read_bytes()
        check(file, digest(content) == wanted)
        frames[name] = pl.read_parquet(io.BytesIO(content))
    return frames, done["arrays"]


def frame(rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """A frame of rows; null where a row has no such column."""
    return pl.DataFrame(list(rows), infer_schema_length=None)


def stacked(parts: Sequence[Mapping[str, Any] | pl.DataFrame]) -> pl.DataFrame:
    """A frame of blocks of rows, one after the other; null where a block has no such column."""
    frames = [
        part if isinstance(part, pl.DataFrame) else pl.DataFrame(dict(part)) for part in parts
    ]
    return pl.concat(frames, how="diagonal")


def packed(value: Array, about: Mapping[str, Any] | None = None) -> bytes:
    """An array as the bytes of an npz file, with its dims, coordinates and ``about`` as JSON."""
    if len(value.dims) != np.ndim(value.values):
        raise ValueError(f"an array of shape {np.shape(value.values)} has dims {value.dims}")
    labels = {name: np.asarray(some) for name, some in value.coords.items()}
    coords = {name: [some.dtype.str, some.tolist()] for name, some in labels.items()}
    text = json.dumps({"dims": list(value.dims), "coords": coords, **(about or {})})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:  # as numpy does, but dated 1980 by any clock
        file.writestr(zipfile.ZipInfo("about.json"), text)
        with file.open(zipfile.ZipInfo("value.npy"), "w", force_zip64=True) as f:
            np.lib.format.write_array(f, np.asanyarray(value.values), allow_pickle=False)
    return buffer.getvalue()


def unpacked(path: Path, name: str, wanted: str) -> tuple[Array, dict[str, Any]]:
    """The array of a file of a run and what is said of it, checked against its digest."""
    file = path / "arrays" / name
    if not file.is_file():
        raise RecordError(f"{path} has lost its arrays/{name}: {AGAIN}")
    content = file.read_bytes()
    check(file, digest(content) == wanted)
    with zipfile.ZipFile(io.BytesIO(content)) as stored:
        about = json.loads(stored.read("about.json"))
        value = np.lib.format.read_array(io.BytesIO(stored.read("value.npy")))
    dims, coords = tuple(about.pop("dims")), about.pop("coords")
    return Array(value, dims, {n: np.array(c, dtype) for n, (dtype, c) in coords.items()}), about


def stored_arrays(path: Path, files: Mapping[str, str]) -> dict[str, Array]:
    """The arrays of these files by name; what was measured at several steps has a dim ``step``."""
    found: dict[str, Array] = {}
    pieces: dict[tuple[str, str], list[tuple[int, Array]]] = {}
    for name, wanted in sorted(files.items()):
        value, about = unpacked(path, name, wanted)
        if "step" in about:
            key = about["probe"], about["metric"]
            pieces.setdefault(key, []).append((about["step"], value))
        else:
            found[about["name"]] = value
    return found | {".".join(key): over_steps(parts) for key, parts in pieces.items()}


def over_steps(parts: Sequence[tuple[int, Array]]) -> Array:
    """Arrays measured at several steps as one, with a first dim ``step`` that rises."""
    steps, values = zip(*sorted(parts, key=lambda part: part[0]), strict=True)
    whole = np.stack([value.values for value in values])
    return Array(whole, ("step", *values[0].dims), {"step": np.array(steps), **values[0].coords})
