"""Full-batch training beside the threshold of each optimizer."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from dynamics.data.sources import Splits
from dynamics.data.stream import whole
from dynamics.optim import Train
from dynamics.probes import Sharpness
from dynamics.record import Recorder, Table
from dynamics.types import Task
from experiments import training
from experiments.stability.config import Config, Edge

PLAIN = Train(momentum=0.0, nesterov=False)
ADAM = Train(rule="adam", nesterov=False, learning_rate=1e-3, second_moment=0.99, epsilon=1e-7)
RULES = {
    "gd": dataclasses.replace(PLAIN, learning_rate=0.3),
    "control": dataclasses.replace(PLAIN, learning_rate=0.3),
    "heavy_ball": dataclasses.replace(PLAIN, learning_rate=0.5, momentum=0.9),
    "nesterov": Train(learning_rate=0.2, momentum=0.9),
    "adam": ADAM,
    "rmsprop": dataclasses.replace(ADAM, momentum=0.0),
}
REACHED = 0.98  # of the threshold


def study(
    points: Sequence[Config], net: Task, data: Splits, mesh: Mesh | None, recorder: Recorder | None
) -> list[Table]:
    """Rows of stage ``edge`` for each (rule, replica, step) measured: ``sharpness`` (preconditioned
    for adam and rmsprop) and its ``residual``, ``ratio`` to the threshold, the ``smallest``
    eigenvalue, ``reached`` (from the first ratio of 0.98 on) and ``loss``; rule ``control`` is gd
    at a lower rate. Stage ``rises`` for each (rule, replica): the part of the steps after which the
    loss was higher, ``before`` the first ratio of 0.98 and ``after``, and the ``step`` of it (nan:
    never). Arrays: ``loss_<rule>`` f32[R, steps], ``index``.
    """
    rows: list[list[dict[str, np.ndarray]]] = [[] for _ in points]
    arrays: list[dict[str, np.ndarray]] = [{"index": np.asarray(data.train.index)} for _ in points]
    first = points[0]
    assert isinstance(first.study, Edge)
    rules = [*first.study.rules, *(["control"] if "gd" in first.study.rules else [])]
    for program, group in itertools.groupby(sorted(rules, key=_program), key=_program):
        together = sorted(group, key=rules.index)
        for rule, found in _trained(program, together, points, net, data, mesh, recorder).items():
            for p, (columns, loss) in enumerate(found):
                rows[p] += columns
                arrays[p][f"loss_{rule}"] = loss
    return [
        Table(training.stacked(parts), found) for parts, found in zip(rows, arrays, strict=True)
    ]


def setting(rule: str, point: Config) -> Train:
    """How a rule trains at a point."""
    study = point.study
    assert isinstance(study, Edge)
    made = RULES[rule]
    factor = study.scale * (study.control if rule == "control" else 1.0)
    rate = made.learning_rate * factor
    return dataclasses.replace(made, learning_rate=rate, weight_decay=point.weight_decay)


def _program(rule: str) -> str:
    """Rules that differ in numbers alone train in one population."""
    return RULES[rule].rule + "_nesterov" * RULES[rule].nesterov


def _trained(
    program: str,
    rules: Sequence[str],
    points: Sequence[Config],
    net: Task,
    data: Splits,
    mesh: Mesh | None,
    recorder: Recorder | None,
) -> dict[str, list[tuple[list[dict[str, np.ndarray]], np.ndarray]]]:
    """Of every rule and point: its rows, and the loss of every step [R, steps]."""
    first, study = points[0], points[0].study
    assert isinstance(study, Edge)
    r, n = study.replicas, len(data.train)
    cells = [(rule, p) for rule in rules for p in range(len(points))]
    settings = [dataclasses.replace(setting(rule, points[p]), batch_size=n) for rule, p in cells]
    probe = Sharpness(
        *(net, data.train, study.every, settings[0], study.steps),
        preconditioned=settings[0].rule == "adam",
        cold=first.cold,
        warm=first.warm,
    )
    roots = training.keys([points[p].seed for _, p in cells], r, 0)
    results = training.train(
        *(settings, roots, net, data.train, study.steps, mesh),
        recorder and recorder.stage(program),
        name=" ".join(rules),
        probes=[probe],
        feed=lambda _: whole(data.train, len(roots)),
        record_every=1,
    )
    order = np.lexsort((results.rows["step"], results.rows["replica"]))
    table = {name: values[order] for name, values in results.rows.items()}
    out: dict[str, list[Any]] = {rule: [] for rule in rules}
    for cell, (rule, _) in enumerate(cells):
        mine = [_one(rule, table, cell * r + k, k) for k in range(r)]
        loss = np.stack([found[2] for found in mine])
        out[rule].append(([part for found in mine for part in found[:2]], loss))
    return out


def _one(
    rule: str, table: dict[str, np.ndarray], member: int, replica: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]:
    """What was measured of one run, what its loss did, and the loss of every step."""
    here = table["replica"] == member
    trained = here & ~np.isnan(table["loss"])
    measured = here & ~np.isnan(table["sharpness.residual"])
    loss = table["loss"][trained].astype(np.float32)
    step, ratio = table["step"][measured], table["sharpness.ratio"][measured]
    at = np.flatnonzero(ratio >= REACHED)
    reached = int(step[at[0]]) if len(at) else len(loss)
    higher = np.diff(loss) > 0
    count = len(step)
    columns = {
        "stage": np.full(count, "edge"),
        "rule": np.full(count, rule),
        "replica": np.full(count, replica),
        "step": step.astype(float),
        "ratio": ratio,
        "sharpness": table["sharpness.value"][measured],
        "residual": table["sharpness.residual"][measured],
        "smallest": table["sharpness.smallest"][measured],
        "reached": (step >= reached).astype(float),
        "loss": loss[np.minimum(step, len(loss) - 1).astype(int)],
    }
    rises = {
        "stage": np.array(["rises"]),
        "rule": np.array([rule]),
        "replica": np.array([replica]),
        "step": np.array([float(reached) if len(at) else np.nan]),
        "before": np.array([higher[:reached].mean() if reached else np.nan]),
        "after": np.array([higher[reached:].mean() if reached < len(higher) else np.nan]),
    }
    return columns, rises, loss
