"""What SGD's noise leaves of the sharpness, and what other measures say, against the batch size,
all in units of the threshold 2 / eta of plain gradient descent.

Reference: the suppression by small batches is that of Cohen et al. 2021, arXiv 2103.00065, appendix
G; batch sharpness: Andreyev & Beneventano 2024, arXiv 2412.20553; on our data and model. Means of
the last measurements; bars are 95 % intervals over seeds.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from dynamics import record, statistics
from dynamics.statistics import Claim, Scale
from paper_figures import draw as drawing
from paper_figures import panels, reading
from paper_figures.draw import Look
from paper_figures.reading import Cells, Said, row

EXPERIMENT = "stability"
STUDY = "Batches"
PRESET = "digits"
TOGETHER = ()

PAPER = "Cohen et al. 2021, arXiv 2103.00065"
BATCH = "Andreyev & Beneventano 2024, arXiv 2412.20553"
MEASURES = {
    "ratio": ("sharpness of all examples", Look("#0072B2", "o")),
    "batch_sharpness": ("batch sharpness", Look("#D55E00", "s")),
    "interaction": ("interaction-aware sharpness", Look("#009E73", "^")),
    "noise": ("gradient-noise interaction", Look("#777777", "x", "--")),
}
LOWER = Said("The smaller the batch, the lower the sharpness that SGD ends at.", PAPER)
FULL = Said("A batch of all examples ends at 2 / eta.", PAPER)
HOVERS = Said("Batch sharpness, not the sharpness, is at 2 / eta for small batches.", BATCH)


class Study(NamedTuple):
    """What is drawn of a run, checked."""

    cells: dict[str, Cells]  # measure -> by size, averaged over the last measurements
    sizes: tuple[float, ...]
    scale: Scale
    rate: float


def draw(
    runs: Sequence[record.Run], folder: Path | str, *, name: str = "stability_batches"
) -> tuple[dict[str, Path], list[Claim]]:
    """Write the figure of one run; its files, and its claims. ValueError: it lacks something."""
    run = reading.only(runs)
    study = _study(run)
    claims = _claims(study, name)
    with drawing.style("half"):
        fig = drawing.figure("half", height=2.9)
        axes = fig.subplots()
        axes.axhline(1, color="#000000", ls=":", lw=0.8)
        rows: list[dict[str, Any]] = []
        for measure, (label, look) in MEASURES.items():
            cells = study.cells[measure]
            found = [statistics.bootstrap(cells.of(size)) for size in study.sizes]
            panels.line(axes, study.sizes, found, label, look=look)
            rows += [
                row("a", label, s, e, cells.replicas)
                for s, e in zip(study.sizes, found, strict=True)
            ]
        axes.set_xscale("log", base=2)
        axes.set_xticks(study.sizes, [f"{size:g}" for size in study.sizes])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("batch size")
        axes.set_ylabel(r"in units of $2/\eta$")
        axes.grid(True, axis="y")
        panels.legend(fig, axes, ncols=2)
        seeds = reading.count(study.cells["ratio"].replicas, "seed")
        drawing.caption(
            fig, f"{study.scale}; plain SGD at {study.rate:g}, {seeds} on the same data."
        )
        paths = drawing.save(
            *(fig, folder, name),
            table=reading.table(rows),
            claims=claims,
            fingerprints=[run.fingerprint],
        )
    return paths, claims


def measure(runs: Sequence[record.Run], *, figure: str = "stability_batches") -> list[Claim]:
    """The claims alone, nothing drawn or written."""
    return _claims(_study(reading.only(runs)), figure)


def _study(run: record.Run) -> Study:
    """Everything the figure needs from the run, or one ValueError that says what it lacks."""
    last = reading.frame(run).filter(pl.col("averaged"))
    mean = last.group_by("size", "replica").mean() if len(last) else last
    cells = {
        name: reading.cells(run, "size", rows=mean, of=name, within=(-1e6, 1e6), times=1.0)
        for name in MEASURES
    }
    sizes = cells["ratio"].places()
    if len(sizes) < 2:
        raise ValueError(f"{reading.where(run)} needs two batch sizes or more, got {sizes}")
    rate = reading.number(run, "study", "learning_rate")
    return Study(cells, sizes, reading.scale(run), rate)


def _claims(study: Study, figure: str) -> list[Claim]:
    made = reading.judging(figure, study.scale, study.cells["ratio"].replicas, "of 2 / eta")
    sharpness, first, last = study.cells["ratio"], study.sizes[0], study.sizes[-1]
    order = np.array([sharpness.of(size) for size in study.sizes])
    least = statistics.bootstrap(np.diff(order, axis=0).min(axis=0))
    off = statistics.bootstrap(np.abs(sharpness.of(last) - 1))
    away = statistics.bootstrap(np.abs(study.cells["batch_sharpness"].of(first) - 1))
    fell = sharpness.paired((last,), (first,))
    return [
        made(fell, f"sharpness, batch {last:g} - {first:g}", LOWER, at_least=0.2),
        made(least, "least rise from one size to the next", LOWER, at_least=0.0),
        made(away, f"|batch sharpness - 1|, batch {first:g}", HOVERS, at_most=0.1),
        made(off, f"|sharpness - 1|, batch {last:g}", FULL, control=True, at_most=0.05),
    ]
