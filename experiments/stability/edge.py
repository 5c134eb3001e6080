"""Full-batch training beside the threshold of each optimizer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from dynamics import optim, training
from dynamics.data.stream import whole
from dynamics.probes import Sharpness
from dynamics.record import Findings
from dynamics.training import Trained
from dynamics.types import Task
from experiments.experiment import Job, indices
from experiments.stability.config import Config, Edge

ADAM = optim.Adam(learning_rate=1e-3, second_moment=0.99, epsilon=1e-7)
RULES: dict[str, optim.Optimizer] = {
    "gd": optim.SGD(learning_rate=0.3, momentum=0.0, nesterov=False),
    "control": optim.SGD(learning_rate=0.3, momentum=0.0, nesterov=False),
    "heavy_ball": optim.SGD(learning_rate=0.5, momentum=0.9, nesterov=False),
    "nesterov": optim.SGD(learning_rate=0.2, momentum=0.9),
    "adam": ADAM,
    "rmsprop": dataclasses.replace(ADAM, momentum=0.0),
}
REACHED = 0.98  # of the threshold


def measure(net: Task, job: Job[Config, Edge]) -> Findings:
    """Frames ``edge``, ``rises`` and ``loss`` of full-batch training by each rule.

    ``edge``, for each (rule, replica, step) measured: ``sharpness`` (preconditioned for adam and
    rmsprop) and its ``residual``, ``ratio`` to the threshold, the ``smallest`` eigenvalue,
    ``reached`` (from the first ratio of 0.98 on) and ``loss``; rule ``control`` is gd at a lower
    rate. ``rises``, for each (rule, replica): the part of the steps after which the loss was
    higher, ``before`` the first ratio of 0.98 and ``after``, and the ``step`` of it (null: never).
    ``loss``, for each (rule, replica, step). All say who ``diverged``, the step. Array: ``index``.
    Weights: those at the end, by program.
    """
    study = job.study
    rules = [*study.rules, *(["control"] if "gd" in study.rules else [])]

    def cells(point: Config, study: Edge) -> list[Mapping[str, Any]]:
        return [
            {
                "rule": rule,
                "program": _program(rule),
                **setting(rule, study, point).hyperparameters(),
            }
            for rule in rules
        ]

    weights = {}

    def one(group: pl.DataFrame) -> Trained:
        trained = _trained(group, net, job)
        weights[group["program"][0]] = (trained.members, trained.state)
        return trained

    trained = training.by_program(job.members(cells, study.replicas), "program", one)
    frames = {
        "edge": _edge(trained, study),
        "rises": _rises(trained),
        "loss": trained.rows.select("point", "rule", "replica", "step", "loss", "diverged"),
    }
    return Findings(frames, indices(job.data.train), weights)


def setting(rule: str, study: Edge, point: Config) -> optim.Optimizer:
    """How a rule trains at a point."""
    made = RULES[rule]
    factor = study.scale * (study.control if rule == "control" else 1.0)
    rate = made.learning_rate * factor
    return dataclasses.replace(made, learning_rate=rate, weight_decay=point.weight_decay)


def _program(rule: str) -> str:
    """The name of the program of a rule: rules that differ in numbers alone train together."""
    made = RULES[rule]
    nesterov = isinstance(made, optim.SGD) and made.nesterov
    return type(made).__name__.lower() + "_nesterov" * nesterov


def _trained(group: pl.DataFrame, net: Task, job: Job[Config, Edge]) -> Trained:
    study = job.study
    made = setting(group["rule"][0], study, job.config)
    probe = Sharpness(
        study.every,
        on="train",
        rule=made,
        num_steps=study.steps,
        cold=job.config.cold,
        warm=job.config.warm,
    )
    return training.train(
        group,
        training.keys(group, 0),
        net,
        made,
        whole(job.data.train, len(group)),
        study.steps,
        job.mesh,
        store=job.stage(group["program"][0]),
        name=" ".join(group["rule"].unique(maintain_order=True)),
        probes=[probe],
        data={"train": job.data.train},
        record_every=1,
    )


def _edge(trained: Trained, study: Edge) -> pl.DataFrame:
    """What was measured of each run, where it reached its threshold, and its loss there."""
    found = trained.measured["sharpness"]
    first = found.filter(pl.col("ratio") >= REACHED).group_by("member").agg(first=pl.min("step"))
    last = pl.col("step").clip(upper_bound=study.steps - 1)
    loss = trained.rows.select("member", pl.col("step").alias("at"), "loss")
    return (
        found.join(first, on="member", how="left", maintain_order="left")
        .with_columns(reached=pl.col("step") >= pl.col("first").fill_null(study.steps), at=last)
        .join(loss, on=["member", "at"], how="left", maintain_order="left")
        .rename({"value": "sharpness"})
        .select("point", "rule", "replica", "step", "ratio", "sharpness", "residual", "smallest",
                "reached", "loss", "diverged")
    )  # fmt: skip


def _rises(trained: Trained) -> pl.DataFrame:
    """What the loss of each run did before its threshold was reached, and after.

    Null of a run that diverged.
    """
    sharp, rows = trained.measured["sharpness"], []
    for own in trained.rows.partition_by("member", maintain_order=True):
        member = own.row(0, named=True)
        above = sharp.filter(pl.col("member") == member["member"], pl.col("ratio") >= REACHED)
        higher = np.diff(own["loss"].to_numpy().astype(np.float32)) > 0
        reached = above["step"].min() if len(above) else None
        end = len(own) if reached is None else int(reached)  # pyright: ignore[reportArgumentType]
        row = {name: member[name] for name in ("point", "rule", "replica", "diverged")}
        row |= {"step": reached, "before": None, "after": None}
        whole = member["diverged"] is None
        if whole and end:
            row["before"] = float(higher[:end].mean())
        if whole and end < len(higher):
            row["after"] = float(higher[end:].mean())
        rows.append(row)
    kinds = {"before": pl.Float64, "after": pl.Float64, "diverged": pl.Int64, "step": pl.Int64}
    return pl.DataFrame(rows, infer_schema_length=None).cast(kinds)  # pyright: ignore[reportArgumentType]
