"""The whole spectrum of the Hessian along full-batch gradient descent."""

from collections.abc import Mapping
from typing import Any

from dynamics import training
from dynamics.data.stream import whole
from dynamics.probes import Sharpness, Spectrum
from dynamics.record import Findings
from dynamics.types import Task
from experiments.experiment import Job, indices
from experiments.stability.batches import plain
from experiments.stability.config import Config, Spectra


def measure(net: Task, job: Job[Config, Spectra]) -> Findings:
    """Frame ``spectra``, for each (replica, step) measured, and the densities of the eigenvalues.

    ``trace`` and ``frobenius`` (tr H^2) with their standard errors ``_error``, the ``sharpness``,
    its ``residual``, the ``smallest`` eigenvalue and the ``ratio`` to 2 / eta by Lanczos from one
    vector. Arrays: ``nodes`` and ``weights`` f32[step, replica, vector, node]; ``index``.
    """

    def cells(point: Config, study: Spectra) -> list[Mapping[str, Any]]:
        return [plain(study.learning_rate, point).hyperparameters()]

    study = job.study
    members, made = job.members(cells, study.replicas), plain(study.learning_rate, job.config)
    when = tuple(sorted({step for step in study.measured if step < study.steps} | {study.steps}))
    cold = job.config.cold
    trained = training.train(
        members,
        training.keys(members, 0),
        net,
        made,
        whole(job.data.train, len(members)),
        study.steps,
        job.mesh,
        store=job.stage("spectra"),
        name="spectra",
        probes=[
            Spectrum(when, on="train", k=study.k, num=study.num),
            # so long between measurements nothing is warm
            Sharpness(when, on="train", rule=made, num_steps=study.steps, cold=cold, warm=cold),
        ],
        data={"train": job.data.train},
    )
    sharp = trained.measured["sharpness"].rename({"value": "sharpness"})
    frame = (
        trained.measured["spectrum"]
        .join(
            sharp.select("member", "step", "sharpness", "residual", "smallest", "ratio"),
            on=["member", "step"],
            maintain_order="left",
        )
        .select("point", "replica", "step", "trace", "trace_error", "frobenius",
                "frobenius_error", "sharpness", "residual", "smallest", "ratio", "diverged")
    )  # fmt: skip
    arrays = {
        name: training.unstack(
            trained.arrays["spectrum", name], trained.members, "point", "replica"
        )
        for name in ("nodes", "weights")
    }
    return Findings({"spectra": frame}, arrays | indices(job.data.train))
