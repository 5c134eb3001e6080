"""SGD of several batch sizes: what its noise leaves of the sharpness."""

from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from dynamics.data.sources import Splits
from dynamics.optim import Train
from dynamics.probes import BatchSharpness, Sharpness
from dynamics.record import Recorder, Table
from dynamics.types import Task
from experiments import training
from experiments.stability.config import Batches, Config, Spectra

MEASURES = {
    "sharpness.ratio": "ratio",
    "batch.value": "batch_sharpness",
    "batch.interaction": "interaction",
    "batch.noise": "noise",
}


def study(
    points: Sequence[Config], net: Task, data: Splits, mesh: Mesh | None, recorder: Recorder | None
) -> list[Table]:
    """Rows of stage ``batches`` for each (size, replica, step) measured, all times eta / 2:
    ``ratio``, the sharpness of all examples, ``batch_sharpness``, ``interaction`` and ``noise``
    (``probes.BatchSharpness``), and ``averaged``, whether among the last of them. Array: ``index``.
    ValueError: a size above the number of examples.
    """
    first, rows = points[0], [[] for _ in points]
    study = first.study
    assert isinstance(study, Batches)
    if max(study.sizes) > len(data.train):
        raise ValueError(
            f"study.sizes must be at most the {len(data.train)} examples, got {max(study.sizes)}"
        )
    r = study.replicas
    roots = training.keys([point.seed for point in points], r, 0)
    for size in study.sizes:
        settings = [plain(point, size) for point in points]
        results = training.train(
            *(settings, roots, net, data.train, study.steps, mesh),
            recorder and recorder.stage(str(size)),
            name=f"batch {size}",
            probes=[
                Sharpness(
                    *(net, data.train, study.every, settings[0], study.steps),
                    cold=first.cold,
                    warm=first.warm,
                ),
                BatchSharpness(net, data.train, size, study.every),
            ],
        )
        table = results.rows
        there = ~np.isnan(table["sharpness.residual"])
        for p, point in enumerate(points):
            here = there & (table["replica"] // r == p)
            rows[p].append(_columns(table, here, point, size, r))
    index = np.asarray(data.train.index)
    return [Table(training.stacked(parts), {"index": index}) for parts in rows]


def plain(point: Config, size: int) -> Train:
    """SGD of batches of a size, at the rate of the study of a point."""
    assert isinstance(point.study, Batches | Spectra)
    return Train(
        momentum=0.0,
        nesterov=False,
        learning_rate=point.study.learning_rate,
        weight_decay=point.weight_decay,
        batch_size=size,
    )


def _columns(
    table: dict[str, np.ndarray], here: np.ndarray, point: Config, size: int, r: int
) -> dict[str, np.ndarray]:
    study = point.study
    assert isinstance(study, Batches)
    step = table["step"][here]
    count = len(step)
    columns = {
        "stage": np.full(count, "batches"),
        "size": np.full(count, size),
        "replica": table["replica"][here] % r,
        "step": step.astype(float),
        "averaged": (step > study.steps - study.averaged * study.every).astype(float),
    }
    for name, short in MEASURES.items():
        factor = 1.0 if short == "ratio" else study.learning_rate / 2
        columns[short] = table[name][here] * factor
    return columns
