"""An experiment: how its points are loaded, checked, run, swept, and stored; a study is a function.

A study is one typed function of a job: it trains tables of members and leaves findings, frames and
labelled arrays in which ``point`` tells the points of a sweep apart. Everything else is here.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import polars as pl
from jax.sharding import Mesh

from dynamics import fit, population, record, training
from dynamics import mesh as meshes
from dynamics.data import sources
from dynamics.data.sources import Splits
from dynamics.record import Array, Findings, Recorder
from dynamics.types import TrainState

C = TypeVar("C")
S = TypeVar("S")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Job(Generic[C, S]):
    """The points of a study that are computed together, and where that happens."""

    points: Sequence[C]  # configs with a field ``study``; they differ in Replica fields only
    data: Any
    mesh: Mesh | None = None
    recorder: Recorder | None = None
    store: Path | None = None  # the folder of all runs

    @property
    def config(self) -> C:
        """The first point: what all of them have in common, and a value of what they have not."""
        return self.points[0]

    @property
    def study(self) -> S:
        """The study of the first point."""
        return self.config.study  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def studies(self) -> list[S]:
        """The study of each point."""
        points: Sequence[Any] = self.points
        return [point.study for point in points]

    def of(self, kind: type[T]) -> "Job[C, T]":
        """The job, as one whose points all have a study of this kind."""
        wrong = [point for point in self.points if not isinstance(Job((point,), None).study, kind)]
        if wrong:
            raise TypeError(f"the job has another study than {kind.__name__}: {wrong[0]}")
        return Job(self.points, self.data, self.mesh, self.recorder, self.store)

    def stage(self, name: str) -> Recorder | None:
        """Where one of several trainings is stored."""
        return self.recorder and self.recorder.stage(name)

    def members(
        self, cells: Callable[[C, S], Iterable[Mapping[str, Any]]], replicas: int
    ) -> pl.DataFrame:
        """The table of a population: a member for each (point, cell, replica).

        ``cells(point, study)`` names what differs within a point beside the seed: any columns, and
        hyperparameters by their names.
        """
        points: Sequence[Any] = self.points
        seeds = [{"seed": point.seed} for point in points]
        studies: Sequence[Any] = [getattr(point, "study", None) for point in points]
        return training.table(seeds, lambda p: cells(points[p], studies[p]), replicas)


@dataclasses.dataclass(frozen=True)
class Experiment(Generic[C]):
    """One experiment, whatever its studies are."""

    name: str
    load: Callable[[C, Path | str | None], Any]  # the data of a point; DataError: what is missing
    study: Callable[[Job[C, Any]], Findings]  # of whose frames with replicas one says who diverged
    check: Callable[[Job[C, Any]], None] = lambda job: (
        None
    )  # ValueError before anything is computed

    def run(
        self, config: C, data: Any, mesh: Mesh | None = None, *, store: Path | str | None = None
    ) -> Findings:
        """The findings of one point."""
        return self.sweep((config,), data, mesh, store=store)[0]

    def sweep(
        self,
        configs: Sequence[C],
        data: Any,
        mesh: Mesh | None = None,
        *,
        store: Path | str | None = None,
    ) -> list[Findings]:
        """The findings of every point, all computed together; points differ in Replica fields only.

        With a ``store`` each is kept under the fingerprint of its config, and its weights beside
        it (``fit.load(run / "weights" / name)``); what is finished there is read. ValueError: sizes
        that don't fit the data or the mesh, before anything is compiled.
        """
        self.check(Job(configs, data, mesh))

        root = None if store is None else Path(store)

        def compute(points: Sequence[C], recorder: Recorder | None) -> list[Findings]:
            found = self.study(Job(points, data, mesh, recorder, root))
            if silent := record.without_status(found.frames):
                raise ValueError(
                    f"{self.name}: frames with replicas must say which of them diverged, in a "
                    f"column 'diverged' of one of {silent}"
                )
            return [of_point(found, p) for p in range(len(points))]

        folder = None if root is None else root / self.name
        return record.completed(folder, configs, compute, about(data), keep)


def about(data: Any) -> dict[str, Any]:
    """What the provenance says of the data."""
    if not isinstance(data, Splits):
        return {"source": "synthetic"}
    return {"data": sources.digest(data.train) + sources.digest(data.test), "source": data.name}


def of_point(findings: Findings, point: int) -> Findings:
    """The findings of one point of a sweep; what has no ``point`` is shared by all.

    An array whose coordinates of ``point`` leave it out is not there.
    """

    def rows(frame: pl.DataFrame) -> pl.DataFrame:
        if "point" not in frame.columns:
            return frame
        return frame.filter(pl.col("point") == point).drop("point")

    arrays = {
        name: array.at(point=point) if "point" in array.dims else array
        for name, array in findings.arrays.items()
        if point in array.coords.get("point", (point,))
    }
    weights = {name: _weights(kept, point) for name, kept in findings.weights.items()}
    return Findings({n: rows(f) for n, f in findings.frames.items()}, arrays, weights)


def _weights(kept: tuple[pl.DataFrame, TrainState], point: int) -> tuple[pl.DataFrame, TrainState]:
    members, state = kept
    here = np.flatnonzero(members["point"].to_numpy() == point)
    return members.filter(pl.col("point") == point).drop("point"), population.take(state, here)


def keep(home: Path, findings: Findings) -> None:
    """Store the weights of findings in a run directory, for ``fit.load``."""
    for name, (_, state) in findings.weights.items():
        fit.save(home / "weights" / name, state)


def indices(dataset: Any, name: str = "index") -> dict[str, Array]:
    """The place in its file of every example of a dataset, as an array to store."""
    return {name: Array(np.asarray(dataset.file_row), ("example",))}


def check_mesh(mesh: Mesh | None, members: int, batch_size: int | None = None) -> None:
    """ValueError unless the mesh, if there is one, takes the population and its batches."""
    if mesh is not None:
        meshes.check(mesh, members, batch_size)
