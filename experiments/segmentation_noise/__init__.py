"""Segmentation from annotations whose outlines are wrong: memorised, or corrected in time.

Images of a large disk and a small square, each annotation eroded or dilated. A network learns the
true outlines first, the large class before the small one, and memorises the wrong ones later. ADELE
finds for each class when that begins and corrects its labels then. Methods are paired: the same
wrong labels, initialisation and order of batches. Predictions in evaluation mode at the images' own
scale; IoU is the mean over disk and square.

Reference: Liu, Liu, Zhu, Shen and Fernandez-Granda 2022, arXiv 2110.03740, on images of our own.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from dynamics import models, task, training
from dynamics.data import shapes
from dynamics.data.rows import subset
from dynamics.data.sources import Splits
from dynamics.record import Array, Findings
from dynamics.revise import DETECT, Adele
from dynamics.revise.curve import fitted
from dynamics.task.multiscale import multiscale
from dynamics.training import Trained
from dynamics.types import NEVER, Task
from experiments.experiment import Experiment, Job, check_mesh, indices
from experiments.segmentation_noise.config import (
    Comparison,
    Config,
    Consistency,
    Shapes,
    Study,
    Timing,
)
from experiments.segmentation_noise.measuring import FATES, Fates

__all__ = ["EXPERIMENT", "Comparison", "Config", "Consistency", "Shapes", "Study", "Timing", "load",
           "run", "sweep"]  # fmt: skip

TRAINING, NOISE = range(2)  # purposes of the seed
SHOWN = 3  # images of the figure
FOREGROUND = range(1, shapes.NUM_CLASSES)


def load(config: Config, folder: Path | str | None = None) -> Splits:
    """Images drawn from the data's seed; no folder is read."""
    data = config.data
    drawn = shapes.shapes(data.seed, n=data.num_train + data.num_test, noise=data.noise)
    train, test = (
        subset(drawn, part) for part in (slice(data.num_train), slice(data.num_train, None))
    )
    return Splits(train, test, "shapes", shapes.NUM_CLASSES)


def study(job: Job[Config, Study]) -> Findings:
    """Frame ``comparison`` or ``timing``, for each (method, at, replica, epoch).

    ``label_accuracy``, the part of the pixels whose label is right; ``train_iou`` and ``test_iou``
    with the clean labels; of each foreground class c ``iou.c``, the point of its curve, IoU with
    the labels of the start, and of the pixels of it whose label is wrong the parts ``correct.c``,
    ``memorised.c`` and ``other.c`` (``Fates``); ``onset.c``, the epoch of its correction, null
    before; ``diverged``, the step. ``at`` is the epoch at which all classes were corrected, null
    for detection and none.

    Arrays, whose ``cell`` is the method, of Timing with its epoch ("at 5"): ``fit`` f64[cell,
    replica, class, parameter], the length of the ``plateau`` and a, b, c of the curve up to the
    onset (nan: none); of replica 0 and some images, shrunk and grown ones among them,
    ``shown_images``, ``shown_clean`` and ``shown_labels`` [image, y, x], ``shown_corrected`` and
    ``shown_predicted`` [cell, image, y, x] at the end. ``index`` i32[example].
    """
    members = job.members(cells, job.study.replicas)
    trained = training.by_program(members, "program", lambda group: _trained(group, job))
    frame = _epochs(trained, training.steps(job.config.train, job.data, 1.0))
    arrays = {"fit": _fits(frame, members, job.config), **_shown(trained, members, job)}
    columns = [name for name in frame.columns if name != "member"]
    name = type(job.config.study).__name__.lower()
    return Findings({name: frame.select(columns)}, arrays | indices(job.data.train))


def cells(point: Config, study: Study) -> list[Mapping[str, Any]]:
    """What a study compares: ``when`` labels are corrected, at an epoch, DETECT, or NEVER.

    What is trained over scales is a program of its own.
    """
    match study:
        case Timing(at=epochs):
            found = [("ce", NEVER), ("adele", DETECT), *(("at", epoch) for epoch in epochs)]
        case Comparison():
            when = {"early": 1, "late": max(1, round(study.late * point.epochs))}
            when |= {"adele": DETECT, "adele_consistency": DETECT}
            found = [(method, when.get(method, NEVER)) for method in study.methods]
    return [
        {
            "cell": f"at {when}" if method == "at" else method,
            "method": method,
            "program": "over_scales" if method.endswith("consistency") else "plain",
            "at": None if when in (DETECT, NEVER) else when,
            "when": when,
            "consistency": point.consistency.weight,
            **point.train.optimizer.hyperparameters(),
        }
        for method, when in found
    ]


def _trained(group: pl.DataFrame, job: Job[Config, Study]) -> Trained:
    """The members of one program, trained and measured after every epoch."""
    config, data, program = job.config, job.data, group["program"][0]
    per, clean = training.steps(config.train, data, 1.0), np.asarray(data.train.y)
    last, roots = per * config.epochs, training.keys(group, TRAINING)
    net = task.of_dataset(models.make(config.model, data.num_classes), data.train)
    several = over_scales(config, net)
    given = [labels(job.points[p], data, r).labels for p, r in group["point", "replica"].rows()]
    given = np.stack(given)
    when = np.full((len(group), data.num_classes), NEVER, np.int32)
    when[:, 1:] = group["when"].to_numpy()[:, None]
    adele = Adele(
        data.num_classes,
        every=1,
        epochs=config.epochs,
        parts=per,
        detection=config.detection,
        correction=config.correction,
        repeat=config.repeat,
        among=config.among,
        when=when,
        watched=net,
        predictor=several,
        clean=clean,
    )
    return training.train(
        group,
        roots,
        several if program == "over_scales" else net,
        config.train.optimizer,
        training.batches(config.train, data.train, roots, labels=given),
        last,
        job.mesh,
        scalars={"consistency": 0.0},
        store=job.stage(program),
        name=program,
        probes=[Fates(net, per, given, last)],
        data={"train": data.train, "test": data.test},
        revision=adele,
    )


def over_scales(config: Config, net: Task) -> Task:
    """The task over several scales, which also says what labels are corrected to."""
    c = config.consistency
    return multiscale(net, scales=c.scales, rho=c.rho, per=c.per, cross_entropy=c.cross_entropy)


def labels(config: Config, data: Splits, replica: int) -> shapes.NoisyMasks:
    """The annotations that a replica is given, the same for every method."""
    seed = int(np.random.SeedSequence([config.seed, NOISE, replica]).generate_state(1)[0])
    return shapes.outlines(np.asarray(data.train.y), seed, iterations=config.data.iterations)


def _epochs(trained: Trained, per: int) -> pl.DataFrame:
    """A row for each (member, epoch), null where there is nothing to take a part of."""
    on = ["member", "step"]
    found = trained.measured["adele"].join(trained.measured["fates"], on=on, how="left")
    numbers = pl.col(pl.Float64)
    by_class = [f"{name}.{c}" for c in FOREGROUND for name in (*FATES, "iou", "onset")]
    return found.select(
        "member",
        "point",
        "method",
        pl.col("at").cast(pl.Int64),
        "replica",
        pl.col("step").alias("epoch") // per,
        "diverged",
        pl.col("train").alias("train_iou"),
        pl.col("test").alias("test_iou"),
        "label_accuracy",
        *by_class,
    ).with_columns(pl.when(numbers.is_finite()).then(numbers))


def _fits(frame: pl.DataFrame, members: pl.DataFrame, config: Config) -> Array:
    """The curve that fits each class of each member up to its correction."""
    names = np.array(["plateau", "a", "b", "c"])
    values = np.full((len(members), len(FOREGROUND), len(names)), np.nan)
    for k, member in enumerate(members["member"]):
        own = frame.filter(pl.col("member") == member).sort("epoch")
        for i, c in enumerate(FOREGROUND):
            until = own.filter(pl.col("epoch") <= pl.col(f"onset.{c}").max().fill_null(NEVER))
            found = fitted(until[f"iou.{c}"].to_numpy(), config.detection)
            if found is not None:
                values[k, i] = found[0], *found[1]
    coords = {"member": members["member"].to_numpy(), "class": np.array(FOREGROUND)}
    array = Array(values, ("member", "class", "parameter"), {**coords, "parameter": names})
    return training.unstack(array, members, "point", "cell", "replica")


def _shown(trained: Trained, members: pl.DataFrame, job: Job[Config, Study]) -> dict[str, Array]:
    """Images with their labels, and what the first replica made of them."""
    noisy = [labels(point, job.data, 0) for point in job.points]
    images, x = [shown(one) for one in noisy], np.asarray(job.data.train.x)
    given = {
        "images": [x[rows] for rows in images],
        "clean": [one.clean[rows] for one, rows in zip(noisy, images, strict=True)],
        "labels": [one.labels[rows] for one, rows in zip(noisy, images, strict=True)],
    }
    dims = ("image", "y", "x")
    found = {f"shown_{n}": Array(np.stack(v), ("point", *dims)) for n, v in given.items()}
    first = members.filter(pl.col("replica") == 0)
    for name, key in (("corrected", ("adele", "labels")), ("predicted", ("fates", "predicted"))):
        (last,) = trained.arrays[key].coords["step"]
        own = training.unstack(trained.arrays[key].at(step=last), first, "point", "cell")
        values = [part[:, rows] for part, rows in zip(own.values, images, strict=True)]
        found[f"shown_{name}"] = Array(np.stack(values), ("point", "cell", *dims), own.coords)
    return found


def shown(noisy: shapes.NoisyMasks) -> np.ndarray:
    """i64[S]: the first images to show, shrunk and grown ones in turn while there are both."""
    grown = (noisy.labels > 0).sum(axis=(1, 2)) > (noisy.clean > 0).sum(axis=(1, 2))
    turn = np.where(grown, np.cumsum(grown), np.cumsum(~grown))
    return np.array(sorted(range(len(turn)), key=lambda i: (turn[i], grown[i]))[:SHOWN])


def check(job: Job[Config, Study]) -> None:
    """ValueError unless the points of a job suit their data and mesh."""
    config = job.config
    programs = [cell["program"] for cell in cells(config, config.study)]
    for program in set(programs):
        count = len(job.points) * programs.count(program) * config.study.replicas
        check_mesh(job.mesh, count, config.train.batch_size)
    training.check_batch(config.train, job.data)


EXPERIMENT = Experiment("segmentation_noise", load, study, check)
run, sweep = EXPERIMENT.run, EXPERIMENT.sweep
