"""A run directory: what was asked, what made it, what came out. Imports no jax.

::

    <folder>/<fingerprint>/  config.json  provenance.json (with the format of the directory)
                             rows.jsonl, sums.jsonl (live) -> frames/<name>.parquet (finished)
                             arrays/<name>.npz  weights/<name>/  checkpoints/  checksums/  done.json
                             lock (while a process has it)

Everything but the live rows is written under a temporary name and renamed, so a directory is
readable whatever happened to the process that wrote it. ``done.json`` is written last. What is read
is what was written or a RecordError: ``sums.jsonl`` vouches for itself, live rows and arrays,
``provenance.json`` for itself and the config, ``done.json`` for itself and the final frames and
arrays. Weights are checkpoints and have checksums of their own. One process writes a directory.
"""

from dynamics.record.files import (
    FORMAT,
    Array,
    Findings,
    RecordError,
    Run,
    asked,
    frame,
    over_steps,
    stacked,
    write,
)
from dynamics.record.points import alone, completed, finished
from dynamics.record.reading import export, read, read_all, runs
from dynamics.record.seeds import SCORED, Seeds, all_diverged, seeds, without_status
from dynamics.record.writing import Recorder, named, provenance

__all__ = [
    "FORMAT",
    "SCORED",
    "Array",
    "Findings",
    "RecordError",
    "Recorder",
    "Run",
    "Seeds",
    "all_diverged",
    "alone",
    "asked",
    "completed",
    "export",
    "finished",
    "frame",
    "named",
    "over_steps",
    "provenance",
    "read",
    "read_all",
    "runs",
    "seeds",
    "stacked",
    "without_status",
    "write",
]
