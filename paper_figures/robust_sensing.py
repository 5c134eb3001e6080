"""A matrix from measurements of which many are wrong: sub-gradients beside squares.

The error in the end against the scale of the start, for a factor of as many columns as the rank and
of more.

Reference: Ma and Fattahi 2022, arXiv 2202.08788.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from dynamics import record, statistics
from dynamics.statistics import Claim, Scale, bootstrap
from paper_figures import draw as drawing
from paper_figures import reading
from paper_figures.curves import curve, rows_of
from paper_figures.draw import Look
from paper_figures.reading import Said

EXPERIMENT = "stability_theory"
STUDY = "Robust"
PRESET = "default"
TOGETHER = ()

PAPER = "Ma & Fattahi 2022, arXiv 2202.08788"
OURS = f"ours, after {PAPER}"
METHODS = {"absolute": "sub-gradients", "square": "squares"}
COLORS = {"absolute": "#0072B2", "square": "#D55E00"}

FOUND = Said("From a small start sub-gradients find the matrix, superfluous columns or not.", PAPER)
SCALE = Said("With superfluous columns the error falls with the scale of the start.", PAPER)
EXACT = Said("With as many columns as the rank the scale of the start does not matter.", OURS)
SQUARES = Said("Gradient descent on squares ends at another matrix.", PAPER)
FITS = Said("... because that one fits the measurements better than the truth does.", OURS)


class Study(NamedTuple):
    """What is drawn of a run, checked."""

    errors: reading.Cells  # by method, columns and scale
    loss: reading.Cells
    truth: reading.Cells
    columns: tuple[int, ...]
    scales: tuple[float, ...]
    scale: Scale

    def over(self, method: str, columns: int) -> np.ndarray:
        """f64[R, scales]."""
        return np.stack([self.errors.of(method, columns, s) for s in self.scales], axis=1)


def draw(
    runs: Sequence[record.Run], folder: Path | str, *, name: str = "robust_sensing"
) -> tuple[dict[str, Path], list[Claim]]:
    """Write the figure of one run; its files, and its claims.

    ValueError: the run lacks something, named.
    """
    run = reading.only(runs)
    study = _study(run)
    claims = _claims(study, name)
    with drawing.style("half"):
        fig = drawing.figure("half", height=2.6)
        rows = _errors(fig.subplots(), study)
        drawing.caption(fig, _caption(study))
        paths = drawing.save(
            *(fig, folder, name),
            table=reading.table(rows),
            claims=claims,
            fingerprints=[run.fingerprint],
        )
    return paths, claims


def measure(runs: Sequence[record.Run], *, figure: str = "robust_sensing") -> list[Claim]:
    """The claims alone, nothing drawn or written."""
    return _claims(_study(reading.only(runs)), figure)


def _study(run: record.Run) -> Study:
    """Everything the figure needs from the run, or one ValueError that says what it lacks."""
    by = ("method", "columns", "scale")
    errors, loss, truth = (
        reading.cells(run, *by, of=name, within=(0.0, np.inf), times=1.0)
        for name in ("error", "loss", "truth")
    )
    columns = tuple(int(k) for k in reading.value(run, "study", "columns"))
    scales = tuple(float(s) for s in reading.value(run, "study", "scales"))
    names = ("dim", "rank", "measurements", "outliers")
    dim, rank, m, outliers = (reading.number(run, "study", name) for name in names)
    study = Study(
        *(errors, loss, truth, columns, scales),
        scale=reading.scale_of(
            run,
            f"a matrix of rank {rank:g} and size {dim:g}, {m:,g} measurements, "
            f"{reading.percent(outliers)} of them wrong",
        ),
    )
    for method in METHODS:
        for k in columns:
            study.over(method, k)
    return study


def _claims(study: Study, figure: str) -> list[Claim]:
    made = reading.judging(figure, study.scale, study.errors.replicas, "")
    least, most = study.columns[0], study.columns[-1]
    wide, exact = (np.log10(study.over("absolute", k)) for k in (most, least))
    small, large = study.scales[0], study.scales[-1]
    cell = ("square", most, small)
    return [
        made(bootstrap(wide[:, 0]), f"log10 of the error of {most} columns from scale {small:g}",
             FOUND, at_most=-3.0),
        made(statistics.paired(wide[:, -1], wide[:, 0]),
             f"{most} columns: log10 of the error, scale {large:g} - {small:g}", SCALE,
             at_least=1.0),
        made(statistics.paired(exact[:, -1], exact[:, 0]),
             f"{least} columns: log10 of the error, scale {large:g} - {small:g}", EXACT,
             control=True, at_most=0.5),
        made(bootstrap(study.errors.of(*cell)), f"squares: error of {most} columns", SQUARES,
             control=True, at_least=0.5),
        made(statistics.paired(study.loss.of(*cell), study.truth.of(*cell)),
             "squares: its mean loss - the truth's", FITS, control=True, at_most=0.0),
    ]  # fmt: skip


def _errors(axes: Axes, study: Study) -> list[dict[str, Any]]:
    rows = []
    for method, text in METHODS.items():
        for k, marker, line in zip(study.columns, "os^D", ("--", "-", "-.", ":"), strict=False):
            name = f"{text}, {k} columns"
            values = np.log10(study.over(method, k))
            look = Look(COLORS[method], marker, line)
            found = curve(axes, study.scales, values, look, name)
            rows += rows_of("a", f"{name}, log10", study.scales, found, len(values))
    axes.set_xscale("log")
    axes.set_xlabel("scale of the start")
    axes.set_ylabel("$\\log_{10}\\;||UU^T - M||$")
    axes.grid(True, axis="y")
    axes.legend(loc="center left", fontsize=6)
    return rows


def _caption(study: Study) -> str:
    seeds = reading.count(study.errors.replicas, "paired seed")
    return (
        f"{study.scale[0].upper()}{study.scale[1:]}; bands are 95 % intervals of the mean over "
        f"{seeds}."
    )
