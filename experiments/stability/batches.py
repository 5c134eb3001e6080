"""SGD of several batch sizes: what its noise leaves of the sharpness."""

from collections.abc import Mapping
from typing import Any

import polars as pl

from dynamics import optim, training
from dynamics.data.stream import stream
from dynamics.probes import BatchSharpness, Sharpness
from dynamics.record import Findings
from dynamics.training import Trained
from dynamics.types import Task
from experiments.experiment import Job, indices
from experiments.stability.config import Batches, Config


def measure(net: Task, job: Job[Config, Batches]) -> Findings:
    """Frame ``batches``, for each (size, replica, step) measured, all times eta / 2.

    ``ratio``, the sharpness of all examples; ``batch_sharpness``, ``interaction`` and ``noise``
    (``probes.BatchSharpness``); and ``averaged``, whether among the last of them. Array: ``index``.
    """

    def cells(point: Config, study: Batches) -> list[Mapping[str, Any]]:
        return [
            {"size": size, **plain(study.learning_rate, point).hyperparameters()}
            for size in study.sizes
        ]

    def one(group: pl.DataFrame) -> Trained:
        return _trained(group, net, job)

    study = job.study
    trained = training.by_program(job.members(cells, study.replicas), "size", one)
    half = pl.col("learning_rate") / 2
    frame = (
        trained.measured["sharpness"]
        .join(
            trained.measured["batch"].select("member", "step", "value", "interaction", "noise"),
            on=["member", "step"],
            suffix="_batch",
            maintain_order="left",
        )
        .select(
            "point",
            "size",
            "replica",
            "step",
            "ratio",
            "diverged",
            averaged=pl.col("step") > study.steps - study.averaged * study.every,
            batch_sharpness=pl.col("value_batch") * half,
            interaction=pl.col("interaction") * half,
            noise=pl.col("noise") * half,
        )
    )
    return Findings({"batches": frame}, indices(job.data.train))


def plain(learning_rate: float, point: Config) -> optim.SGD:
    """SGD without momentum at a rate, with the weight decay of a point."""
    return optim.SGD(
        learning_rate=learning_rate,
        momentum=0.0,
        nesterov=False,
        weight_decay=point.weight_decay,
    )


def _trained(group: pl.DataFrame, net: Task, job: Job[Config, Batches]) -> Trained:
    study = job.study
    size, made = int(group["size"][0]), plain(study.learning_rate, job.config)
    roots = training.keys(group, 0)
    return training.train(
        group,
        roots,
        net,
        made,
        stream(job.data.train, size, roots),
        study.steps,
        job.mesh,
        store=job.stage(str(size)),
        name=f"batch {size}",
        probes=[
            Sharpness(
                study.every,
                on="train",
                rule=made,
                num_steps=study.steps,
                cold=job.config.cold,
                warm=job.config.warm,
            ),
            BatchSharpness(study.every, on="train", batch_size=size),
        ],
        data={"train": job.data.train},
    )
