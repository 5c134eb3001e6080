"""A network picks its own hardest examples while it trains, once or again and again.

Departs from scores averaged over independent runs on purpose: each replica scores with itself
alone, which costs one forward pass of the data for each choice. Reference: Attendu and Corbeil
2023, arXiv 2306.03208, who re-score by EL2N in this way when fine-tuning language models.
"""

from collections.abc import Sequence

import jax
import numpy as np

from dynamics import scores
from dynamics.data.sources import Splits
from dynamics.optim import Train
from dynamics.probes import Evaluate, Score
from dynamics.record import Table
from dynamics.types import Results
from experiments import training
from experiments.data_diet import scoring
from experiments.data_diet.config import Config, Rescoring
from experiments.data_diet.retraining import SHARED
from experiments.data_diet.scoring import Job

METHODS = ("full", "random", "random_again", "once", "again")  # what is chosen at each choice


def rescore(job: Job) -> list[Table]:
    """Rows for each (method, epoch, replica): accuracy at every choice and at the end.

    ``once`` keeps the hardest at the end of the warm-up, ``again`` anew at every choice; ``random``
    and ``random_again`` draw instead. ``overlap`` is the part of the new choice that was in the
    one before (nan where there was none before or after).
    """
    banks, points, data = job.banks(), job.points, job.data
    study, n = points[0].study, len(data.train)
    assert isinstance(study, Rescoring)
    first, r = points[0], study.replicas
    bounds = choices(first.train, study, data)
    net = training.net_of(first.model, data)
    roots = training.keys(job.seeds, r, scoring.RETRAINING)
    roots = jax.numpy.repeat(roots.reshape(len(points), 1, r), len(METHODS), axis=1).reshape(-1)
    labels = np.repeat([bank["labels"] for bank in banks], len(METHODS) * r, axis=0)
    count, members = round(study.kept * n), len(points) * len(METHODS) * r
    rows = np.tile(np.arange(n, dtype=np.int32), (members, 1))
    sizes, state, tables = np.full(members, n, np.int32), None, []
    for i, end in enumerate(bounds):
        last = end == bounds[-1]
        probes = [
            Evaluate(net, data.test, (end,)),
            Score(scores.el2n, net, data.train, (end,), "el2n", labels),
        ]
        results = training.train(
            *(job.settings, roots, net, data.train, end, job.mesh, job.stage(f"until {end}")),
            name="rescore",
            total=bounds[-1],
            start=state,
            probes=probes[: 1 if last else 2],
            labels=labels,
            rows=rows,
            sizes=sizes,
        )
        state, before = results.state, (rows, sizes)
        if not last:
            rows, sizes = _choose(results.arrays[f"el2n.score@{end}"], before, count, points, r, i)
        tables.append(_columns(results, end, before, None if last else (rows, sizes), data, first))
    return _tables(tables, banks, points, r)


def choices(train: Train, study: Rescoring, data: Splits) -> list[int]:
    """The steps after which subsets are chosen, and the last step.

    ValueError: choices that are no step apart.
    """
    spans = (study.epochs, study.warmup, study.every)
    total, warm, every = (training.steps(train, data, epochs) for epochs in spans)
    if min(warm, every) < 1 or warm >= total:
        raise ValueError(
            "study.warmup, study.every and what follows the warm-up must be at least a step long, "
            f"got {study.warmup:g}, {study.every:g} and {study.epochs - study.warmup:g} epochs of "
            f"{len(data.train) // train.batch_size} steps"
        )
    return [*range(warm, total, every), total]


def _choose(
    el2n: np.ndarray, before: tuple, count: int, points: Sequence[Config], r: int, i: int
) -> tuple[np.ndarray, np.ndarray]:
    """The rows and sizes of every replica after choice ``i``."""
    rows, sizes = before[0].copy(), before[1].copy()
    n = rows.shape[1]
    for k in range(len(rows)):
        method, replica = METHODS[k // r % len(METHODS)], k % r
        seed = points[k // (r * len(METHODS))].seed
        if method == "full" or (i > 0 and method in ("random", "once")):
            continue
        if method in ("random", "random_again"):
            draw = np.random.SeedSequence([seed, scoring.RANDOM, replica, i]).generate_state(1)[0]
            kept = scores.random(n, count, seed=int(draw))
        else:
            own = el2n[k] if np.isfinite(el2n[k]).all() else np.zeros(n)
            kept = scores.keep(own, count, "highest", seed=seed)
        rows[k, :count], sizes[k] = kept, count
    return rows, sizes


def _columns(
    results: Results, end: int, before: tuple, after: tuple | None, data: Splits, first: Config
) -> dict[str, np.ndarray]:
    """What was measured at a choice, and how much of the choice was in the one before."""
    overlap = np.full(len(before[1]), np.nan)
    if after is not None:
        for k, (a, m, b, count) in enumerate(zip(*before, *after, strict=True)):
            if m < len(a):
                overlap[k] = len(np.intersect1d(a[:m], b[:count])) / count
    per = len(data.train) // first.train.batch_size
    epoch = np.full(len(overlap), end / per)
    tested = training.tested_at(results, end)
    return tested | {"kept": before[1], "overlap": overlap, "epoch": epoch}


def _tables(parts: list[dict], banks: list, points: Sequence[Config], r: int) -> list[Table]:
    members = len(METHODS) * r
    tables = []
    for p, bank in enumerate(banks):
        here = slice(p * members, (p + 1) * members)
        columns = {name: np.concatenate([part[name][here] for part in parts]) for name in parts[0]}
        columns = {
            "stage": np.full(members * len(parts), "rescoring"),
            "method": np.tile(np.repeat(METHODS, r), len(parts)),
            "replica": np.tile(np.arange(r), len(METHODS) * len(parts)),
        } | columns
        tables.append(Table(columns, {name: bank[name] for name in SHARED}))
    return tables
