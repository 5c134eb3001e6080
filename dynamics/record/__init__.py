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

from dynamics.record.files import RecordError, Run, Table, write
from dynamics.record.points import completed
from dynamics.record.reading import export, read, read_all, runs
from dynamics.record.writing import Recorder, provenance

__all__ = [
    "RecordError",
    "Recorder",
    "Run",
    "Table",
    "completed",
    "export",
    "provenance",
    "read",
    "read_all",
    "runs",
    "write",
]
