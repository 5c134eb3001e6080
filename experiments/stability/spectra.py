"""The whole spectrum of the Hessian along full-batch gradient descent."""

from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from dynamics.data.sources import Splits
from dynamics.data.stream import whole
from dynamics.probes import Sharpness, Spectrum
from dynamics.record import Recorder, Table
from dynamics.types import Task
from experiments import training
from experiments.stability import batches
from experiments.stability.config import Config, Spectra

MEASURES = {
    "spectrum.trace": "trace",
    "spectrum.trace_error": "trace_error",
    "spectrum.frobenius": "frobenius",
    "spectrum.frobenius_error": "frobenius_error",
    "sharpness.value": "sharpness",
    "sharpness.residual": "residual",
    "sharpness.smallest": "smallest",
    "sharpness.ratio": "ratio",
}


def study(
    points: Sequence[Config], net: Task, data: Splits, mesh: Mesh | None, recorder: Recorder | None
) -> list[Table]:
    """Rows of stage ``spectra`` for each (replica, step) measured: ``trace`` and ``frobenius``
    (tr H^2) with their standard errors ``_error``, the ``sharpness``, its ``residual``, the
    ``smallest`` eigenvalue and the ``ratio`` to 2 / eta by Lanczos from one vector. Arrays:
    ``steps`` i32[T]; ``nodes`` and ``weights`` f32[T, R, num, k], the density of the eigenvalues;
    ``index``.
    """
    first, study = points[0], points[0].study
    assert isinstance(study, Spectra)
    r, n = study.replicas, len(data.train)
    settings = [batches.plain(point, n) for point in points]
    measured = tuple(
        sorted({step for step in study.measured if step < study.steps} | {study.steps})
    )
    roots = training.keys([point.seed for point in points], r, 0)
    results = training.train(
        *(settings, roots, net, data.train, study.steps, mesh),
        recorder and recorder.stage("spectra"),
        name="spectra",
        probes=[
            Spectrum(net, data.train, measured, k=study.k, num=study.num),
            Sharpness(
                *(net, data.train, measured, settings[0], study.steps),
                cold=first.cold,
                warm=first.cold,  # so long between measurements nothing is warm
            ),
        ],
        feed=lambda _: whole(data.train, len(roots)),
    )
    there = ~np.isnan(results.rows["spectrum.trace"])
    table = {name: values[there] for name, values in results.rows.items()}
    points_of = {
        name: np.stack([results.arrays[f"spectrum.{name}@{step}"] for step in measured])
        for name in ("nodes", "weights")
    }
    out = []
    for p in range(len(points)):
        here = table["replica"] // r == p
        rows = {
            "stage": np.full(here.sum(), "spectra"),
            "replica": table["replica"][here] % r,
            "step": table["step"][here].astype(float),
            **{short: table[name][here] for name, short in MEASURES.items()},
        }
        arrays = {name: values[:, p * r : (p + 1) * r] for name, values in points_of.items()}
        arrays |= {"steps": np.array(measured, np.int32), "index": np.asarray(data.train.index)}
        out.append(Table(rows, arrays))
    return out
