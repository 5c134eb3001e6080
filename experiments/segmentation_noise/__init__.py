"""Segmentation from annotations whose outlines are wrong: memorised, or corrected in time.

Images of a large disk and a small square, each annotation eroded or dilated. A network learns the
true outlines first, the large class before the small one, and memorises the wrong ones later. ADELE
finds for each class when that begins and corrects its labels then. Methods are paired: the same
wrong labels, initialisation and order of batches. Predictions in evaluation mode at the images' own
scale; IoU is the mean over disk and square.

Reference: Liu, Liu, Zhu, Shen and Fernandez-Granda 2022, arXiv 2110.03740, on images of our own.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dynamics import models, record, task
from dynamics.data import shapes, sources
from dynamics.data.sources import Splits
from dynamics.record import Recorder, Table
from dynamics.revise import DETECT, Adele
from dynamics.revise.curve import fitted
from dynamics.task.multiscale import multiscale
from dynamics.types import NEVER, Dataset, Results, Task
from experiments import training
from experiments.segmentation_noise.config import (
    Comparison,
    Config,
    Consistency,
    Shapes,
    Study,
    Timing,
)
from experiments.segmentation_noise.measuring import FATES, Fates

__all__ = [
    "Comparison",
    "Config",
    "Consistency",
    "Shapes",
    "Study",
    "Timing",
    "load",
    "run",
    "sweep",
]

TRAINING, NOISE = range(2)  # purposes of the seed
SHOWN = 3  # images of the figure
FOREGROUND = range(1, shapes.NUM_CLASSES)


class Cell(NamedTuple):
    """What differs within a study, beside the seed."""

    method: str
    at: int  # the epoch of the correction: DETECT, a number, or NEVER

    @property
    def consistent(self) -> bool:
        """Cells that are trained over scales are a program of their own."""
        return self.method.endswith("consistency")


def load(config: Config, folder: Path | str | None = None) -> Splits:
    """Images drawn from the data's seed; no folder is read."""
    data = config.data
    n = data.num_train + data.num_test
    drawn = shapes.shapes(data.seed, n=n, noise=data.noise)

    def part(rows: slice) -> Dataset:
        x, y, index = drawn.x[rows], drawn.y[rows], drawn.index[rows]
        return Dataset(x=x, y=y, index=index, mean=drawn.mean, std=drawn.std)

    train, test = part(slice(data.num_train)), part(slice(data.num_train, n))
    return Splits(train, test, "shapes", shapes.NUM_CLASSES)


def run(
    config: Config, data: Splits, mesh: Mesh | None = None, *, store: Path | str | None = None
) -> Table:
    """One point of ``sweep``."""
    return sweep((config,), data, mesh, store=store)[0]


def sweep(
    configs: Sequence[Config],
    data: Splits,
    mesh: Mesh | None = None,
    *,
    store: Path | str | None = None,
) -> list[Table]:
    """The study at every point; points differ in Replica fields only.

    Rows for each (method, at, replica, epoch): ``label_accuracy``, the part of the pixels whose
    label is right; ``train_iou`` and ``test_iou`` with the clean labels; of each foreground class
    c ``iou.c``, the point of its curve, IoU with the labels of the start, and of the pixels of it
    whose label is wrong the parts ``correct.c``, ``memorised.c`` and ``other.c`` (``Fates``);
    ``onset.c``, the epoch of its correction if that is over (infinite before); ``diverged``. ``at``
    is the epoch at which all classes were corrected, nan for detection and none.

    Arrays, a place for each cell (``methods`` or ``at`` in the order of the config, in Timing after
    "ce" and "adele"): ``fit`` f64[M, R, C, 4], the length of the plateau and a, b, c of the curve
    up to the onset (nan: none); of replica 0 and some images, shrunk and grown ones among them,
    ``shown_images``, ``shown_clean`` and ``shown_labels`` [S, h, w], ``shown_corrected`` and
    ``shown_predicted`` [M, S, h, w] at the end. ``index`` i32[N]. ValueError: a batch that is
    larger than the data.
    """
    cells = [len(_cells(point)) * point.study.replicas for point in configs]
    training.check(configs[0].train, data, mesh, sum(cells), 1.0)
    about = {"data": sources.digest(data.train) + sources.digest(data.test), "source": data.name}
    folder = None if store is None else Path(store, "segmentation_noise")

    def compute(points: Sequence[Config], recorder: Recorder | None) -> list[Table]:
        return _tables(points, data, mesh, recorder)

    return record.completed(folder, configs, compute, about)


def labels(config: Config, data: Splits, replica: int) -> shapes.NoisyMasks:
    """The annotations that a replica is given, the same for every method."""
    seed = int(np.random.SeedSequence([config.seed, NOISE, replica]).generate_state(1)[0])
    return shapes.outlines(np.asarray(data.train.y), seed, iterations=config.data.iterations)


def _cells(point: Config) -> list[Cell]:
    study = point.study
    if isinstance(study, Timing):
        return [Cell("ce", NEVER), Cell("adele", DETECT), *(Cell("at", at) for at in study.at)]
    when = {"early": 1, "late": max(1, round(study.late * point.epochs))}
    when |= {"adele": DETECT, "adele_consistency": DETECT}
    return [Cell(method, when.get(method, NEVER)) for method in study.methods]


def _tables(
    points: Sequence[Config], data: Splits, mesh: Mesh | None, recorder: Recorder | None
) -> list[Table]:
    found: list[dict[Cell, Any]] = [{} for _ in points]
    for consistent in (False, True):
        chosen = [cell for cell in _cells(points[0]) if cell.consistent == consistent]
        if chosen:
            parts = _trained(consistent, points, chosen, data, mesh, recorder)
            for own, part in zip(found, parts, strict=True):
                own |= part
    tables = []
    for point, own in zip(points, found, strict=True):
        columns = [own[cell][0] for cell in _cells(point)]
        arrays = [own[cell][1] for cell in _cells(point)]
        rows = {name: np.concatenate([one[name] for one in columns]) for name in columns[0]}
        stacked = {name: np.stack([one[name] for one in arrays]) for name in arrays[0]}
        tables.append(Table(rows, stacked | _shared(point, data)))
    return tables


def _trained(
    consistent: bool,
    points: Sequence[Config],
    cells: Sequence[Cell],
    data: Splits,
    mesh: Mesh | None,
    recorder: Recorder | None,
) -> list[dict[Cell, Any]]:
    """Every replica of every cell as one population: the rows and arrays of each point's cells."""
    first, r, c = points[0], points[0].study.replicas, len(cells)
    per = training.steps(first.train, data, 1)
    net = task.of_dataset(models.make(first.model, data.num_classes), data.train)
    several = over_scales(first, net)
    given = np.stack([labels(p, data, k).labels for p in points for _ in cells for k in range(r)])
    when = np.full((len(given), data.num_classes), NEVER, np.int32)
    when[:, 1:] = np.tile(np.repeat([cell.at for cell in cells], r), len(points))[:, None]
    roots = training.keys([p.seed for p in points], r, TRAINING).reshape(len(points), 1, r)
    adele: Any = Adele(
        *(net, data.train, data.num_classes, 1, first.epochs, per),
        detection=first.detection,
        correction=first.correction,
        repeat=first.repeat,
        among=first.among,
        when=when,
        predictor=several,
        clean=np.asarray(data.train.y),
    )
    name = "over scales" if consistent else "plain"
    results = training.train(
        *([p.train for p in points], jax.numpy.repeat(roots, c, axis=1).reshape(-1)),
        *(several if consistent else net, data.train, per * first.epochs, mesh),
        recorder and recorder.stage(name),
        name=name,
        scalars={"consistency": np.repeat([p.consistency.weight for p in points], c * r)},
        probes=[Fates(net, data.train, data.test, given, per, per * first.epochs)],
        revision=adele,
        labels=given,
    )
    out = []
    for p, point in enumerate(points):
        places = [np.arange((p * c + i) * r, (p * c + i + 1) * r) for i in range(c)]
        out.append(
            {
                cell: (
                    _rows(results, cell, here, point),
                    _arrays(results, here, per, point, shown(labels(point, data, 0))),
                )
                for cell, here in zip(cells, places, strict=True)
            }
        )
    return out


def over_scales(config: Config, net: Task) -> Task:
    """The task over several scales, which also says what labels are corrected to."""
    c = config.consistency
    return multiscale(net, scales=c.scales, rho=c.rho, per=c.per, cross_entropy=c.cross_entropy)


def _column(results: Results, name: str, here: np.ndarray) -> np.ndarray:
    """f64[R, E]: what was measured after every epoch."""
    rows = results.rows
    kept = (rows["step"] > 0) & ~np.isnan(rows["adele.active" if name[0] == "a" else "fates.test"])
    return rows[name][kept].reshape(-1, len(results.arrays["diverged"])).T[here]


def _rows(results: Results, cell: Cell, here: np.ndarray, point: Config) -> dict[str, np.ndarray]:
    r, epochs = len(here), point.epochs
    columns = {"train_iou": "fates.train", "test_iou": "fates.test"}
    columns |= {"label_accuracy": "adele.label_accuracy"}
    for c in FOREGROUND:
        columns |= {f"{fate}.{c}": f"fates.{fate}.{c}" for fate in FATES}
        columns |= {f"{name}.{c}": f"adele.{name}.{c}" for name in ("iou", "onset")}
    found = {name: _column(results, its, here).reshape(-1) for name, its in columns.items()}
    stage = type(point.study).__name__.lower()
    at = cell.at if cell.method in ("at", "early", "late") else np.nan
    return {
        "stage": np.full(r * epochs, stage),
        "method": np.full(r * epochs, cell.method),
        "at": np.full(r * epochs, at, np.float64),
        "replica": np.repeat(np.arange(r), epochs),
        "epoch": np.tile(np.arange(1.0, epochs + 1), r),
        "diverged": np.repeat(results.arrays["diverged"][here], epochs),
    } | found


def _arrays(
    results: Results, here: np.ndarray, per: int, point: Config, images: np.ndarray
) -> dict[str, np.ndarray]:
    last = per * point.epochs
    fits = np.full((len(here), len(FOREGROUND), 4), np.nan)
    for i, c in enumerate(FOREGROUND):
        curves = _column(results, f"adele.iou.{c}", here)
        onsets = _column(results, f"adele.onset.{c}", here)[:, -1]
        for k, (curve, onset) in enumerate(zip(curves, onsets, strict=True)):
            until = int(onset) if np.isfinite(onset) else point.epochs
            found = fitted(curve[:until], point.detection)
            fits[k, i] = np.nan if found is None else (found[0], *found[1])
    return {
        "fit": fits,
        "shown_corrected": results.arrays[f"adele.labels@{last}"][here[0], images],
        "shown_predicted": results.arrays[f"fates.predicted@{last}"][here[0], images],
    }


def _shared(point: Config, data: Splits) -> dict[str, np.ndarray]:
    noisy = labels(point, data, 0)
    images = shown(noisy)
    return {
        "index": np.asarray(data.train.index),
        "shown_images": np.asarray(data.train.x)[images],
        "shown_clean": noisy.clean[images],
        "shown_labels": noisy.labels[images],
    }


def shown(noisy: shapes.NoisyMasks) -> np.ndarray:
    """i64[S]: the first images to show, shrunk and grown ones in turn while there are both."""
    grown = (noisy.labels > 0).sum(axis=(1, 2)) > (noisy.clean > 0).sum(axis=(1, 2))
    turn = np.where(grown, np.cumsum(grown), np.cumsum(~grown))
    return np.lexsort((grown, turn))[:SHOWN]
