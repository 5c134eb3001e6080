"""Runs read, and tables given away."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from dynamics.record.files import (
    RecordError,
    Run,
    asked,
    finished,
    frame,
    live,
    reading,
    stored_arrays,
    write,
)


def read(path: Path | str) -> Run:
    """A run directory, finished or not; a last half-written row is dropped.

    RecordError: no run there, or one that was damaged.
    """
    path = Path(path)
    for name in ("config.json", "provenance.json"):
        if not (path / name).is_file():
            raise RecordError(f"{path} holds no run: it has no {name}")
    done = (path / "done.json").is_file()
    with reading(path):
        config, provenance = asked(path)
        if done:
            frames, files = finished(path)
        else:
            rows, files = live(path)
            frames = {name: frame(some) for name, some in rows.items()}
        return Run(path, path.name, config, provenance, frames, stored_arrays(path, files), done)


def runs(root: Path | str, experiment: str) -> list[Path]:
    """The finished runs of an experiment, the newest last."""
    found = Path(root, experiment).glob("*/done.json")
    return [done.parent for done in sorted(found, key=lambda p: (p.stat().st_mtime_ns, str(p)))]


def read_all(paths: Sequence[Path | str], name: str) -> pl.DataFrame:
    """The frame ``name`` of many runs in one, each with its config flattened into ``config.*``.

    ValueError: a run has no such frame.
    """
    frames = []
    for path in paths:
        run = read(path)
        if name not in run.frames:
            raise ValueError(f"{path} has no frame {name!r}, it has {sorted(run.frames)}")
        values = {f"config.{k}": v for k, v in _flat(run.config).items()}
        columns = [pl.lit(v).alias(k) for k, v in ({"run": run.fingerprint} | values).items()]
        frames.append(run.frames[name].with_columns(columns))
    return pl.concat(frames, how="diagonal_relaxed") if frames else pl.DataFrame()


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


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, inner in value.items():
        nested = isinstance(inner, dict)
        out |= _flat(inner, f"{prefix}{name}.") if nested else {prefix + name: inner}
    return out
