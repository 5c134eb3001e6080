"""What figures share: reading a run, and the words for what was read.

Whatever a run lacks is one ValueError that names the run and the thing. A seed of which any member
diverged is left out of every frame and array, so no number of a diverged network is ever drawn or
claimed, and all means of a figure are over the same seeds.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from dynamics import record, statistics
from dynamics.statistics import Claim, Estimate, Paired, Scale

TABLE = ("panel", "series", "index", "x", "y", "low", "high", "seeds")  # of a figure's csv

Key = tuple[Any, ...]


class Said(NamedTuple):
    """What a paper says, in our words; or what we measure beside it: ``OURS``."""

    statement: str
    paper: str


class Cells(NamedTuple):
    """One number for each replica of each cell: (method, fraction) -> replica -> accuracy."""

    where: str
    by: tuple[str, ...]  # the columns that a key holds
    values: dict[Key, dict[int, float]]

    @property
    def replicas(self) -> int:
        """How many; the same in every cell."""
        return len(next(iter(self.values.values())))

    def has(self, *key: Any) -> bool:
        """Whether there are rows of the cell."""
        return key_of(key) in self.values

    def of(self, *key: Any) -> np.ndarray:
        """f64[R]: the numbers of one cell, by replica."""
        if (found := self.values.get(key_of(key))) is None:
            raise ValueError(f"{self.where} has no rows for {self._text(key_of(key))}")
        return np.array([found[replica] for replica in sorted(found)])

    def estimate(self, *key: Any) -> Estimate:
        """Mean and 95 % interval of one cell."""
        return statistics.bootstrap(self.of(*key))

    def paired(self, a: Key, b: Key) -> Paired:
        """Differences a - b over paired replicas."""
        return statistics.paired(self.of(*a), self.of(*b))

    def places(self, **equal: Any) -> tuple[Any, ...]:
        """The values, rising, of the last column of ``by`` where the others are ``equal``."""
        wanted = tuple(_plain(equal[name]) for name in self.by[:-1])
        found = {key[-1] for key in self.values if key[:-1] == wanted and key[-1] is not None}
        return tuple(sorted(found))

    def _text(self, key: Key) -> str:
        return _text(self.by, key)


def where(run: record.Run) -> str:
    """How an error names the run."""
    return f"{run.path.parent.name} run {run.fingerprint}"


def only(runs: Sequence[record.Run]) -> record.Run:
    """The one run of a figure that shows no runs together."""
    if len(runs) != 1:
        raise ValueError(f"this figure is of one run, got {[run.fingerprint for run in runs]}")
    return runs[0]


def seeds(run: record.Run) -> record.Seeds:
    """The seeds of the run. ValueError: there are too few that are whole to measure anything."""
    found = record.seeds(run.frames)
    if found.lost and len(found.whole) < 2:
        raise ValueError(f"{where(run)}: not measured: {found}")
    return found


def frame(run: record.Run, name: str | None = None, *, whole: bool = True) -> pl.DataFrame:
    """A frame of the run: that named like its study, or another; the rows of its whole seeds.

    ``whole=False``: all rows, for a figure in which who diverged is what is measured.
    """
    wanted = str(value(run, "study", "kind")).lower() if name is None else name
    if wanted not in run.frames:
        raise ValueError(f"{where(run)} has no frame {wanted!r}, but {sorted(run.frames)}")
    found = run.frames[wanted]
    if not whole or "replica" not in found.columns or wanted == record.SCORED:
        return found
    lost = seeds(run).lost
    return found.filter(~pl.col("replica").is_in(lost)) if lost else found


def columns(
    run: record.Run, *names: str, rows: pl.DataFrame | None = None
) -> list[tuple[Any, ...]]:
    """The rows of the run's study, or those given of them, as tuples of the named columns."""
    rows = frame(run) if rows is None else rows
    for name in names:
        if name not in rows.columns:
            raise ValueError(f"{where(run)} has no column {name!r} in its rows: {rows.columns}")
    if not len(rows):
        raise ValueError(f"{where(run)} has no rows of its study")
    return rows.select(names).rows()


def cells(
    run: record.Run,
    *by: str,
    rows: pl.DataFrame | None = None,
    of: str = "test_accuracy",
    within: tuple[float, float] = (0.0, 1.0),
    times: float = 100.0,
) -> Cells:
    """Column ``of``, ``times`` a factor, for each replica of each combination of ``by``.

    Of the rows of the run's study, or of those given. A key holds floats rounded to six places and
    None where a row has no such column. ValueError: a number that isn't ``within`` the range or not
    there (of a member that diverged), two rows for one replica, or cells of different replicas,
    which could not be paired.
    """
    out: dict[Key, dict[int, float]] = {}
    for *raw, replica, number in columns(run, *by, "replica", of, rows=rows):
        key = key_of(raw)
        at = f"{_text(by, key)}, replica {replica}"
        if number is None or not within[0] <= number <= within[1]:
            lost = number is None or math.isnan(number)
            diverged = " (the run diverged)" if lost else ""
            low, high = within
            raise ValueError(
                f"{where(run)}: {of} must be in [{low:g}, {high:g}], got {number} for "
                f"{at}{diverged}"
            )
        if int(replica) in out.setdefault(key, {}):
            raise ValueError(f"{where(run)} has two rows for {at}")
        out[key][int(replica)] = times * number
    first, *rest = out
    for key in rest:
        if sorted(out[key]) != sorted(out[first]):
            raise ValueError(
                f"{where(run)}: paired differences need the same replicas everywhere; "
                f"{_text(by, key)} has {sorted(out[key])}, {_text(by, first)} has "
                f"{sorted(out[first])}"
            )
    return Cells(where(run), by, out)


def key_of(raw: Sequence[Any]) -> Key:
    """Values as those of ``Cells``."""
    return tuple(_plain(part) for part in raw)


def _plain(part: Any) -> Any:
    part = part.item() if isinstance(part, np.generic) else part
    return round(part, 6) if isinstance(part, float) else part


def _text(by: Sequence[str], key: Key) -> str:
    """``method 'random', fraction 0.3``."""
    parts = zip(by, key, strict=True)
    return ", ".join(f"{n} {v:g}" if isinstance(v, float) else f"{n} {v!r}" for n, v in parts)


def array(
    run: record.Run, name: str, ndim: int, *, finite: bool = True, **labels: Any
) -> np.ndarray:
    """f64: an array of the run, the part at these labels of its dims, with so many axes."""
    if name not in run.arrays:
        raise ValueError(f"{where(run)} has no array {name!r}; it has {sorted(run.arrays)}")
    try:
        part = _whole(run, run.arrays[name]).at(**labels)
    except ValueError as error:
        raise ValueError(f"{where(run)}: {name!r}: {error}") from None
    found = np.asarray(part.values, dtype=np.float64)
    wrong = int((~np.isfinite(found)).sum()) if finite else 0
    if found.ndim != ndim or found.size == 0 or wrong:
        raise ValueError(
            f"{where(run)}: array {name!r} must be finite with {ndim} axes, got shape "
            f"{found.shape} and {wrong} values that are not finite"
        )
    return found


def _whole(run: record.Run, found: record.Array) -> record.Array:
    """The array without the seeds of which a member diverged."""
    if "replica" not in found.dims or record.SCORED in run.frames or not seeds(run).lost:
        return found
    axis = found.dims.index("replica")
    marks = np.asarray(found.coords.get("replica", np.arange(found.values.shape[axis])))
    kept = np.flatnonzero(~np.isin(marks, seeds(run).lost))
    coords = {**found.coords, "replica": marks[kept]}
    return record.Array(np.take(found.values, kept, axis=axis), found.dims, coords)


def index(run: record.Run) -> np.ndarray:
    """i64[N]: the place of each training example in the file."""
    return array(run, "index", 1).astype(np.int64)


def value(run: record.Run, *path: str) -> Any:
    """A value of the config."""
    found: Any = run.config
    for part in path:
        if not isinstance(found, Mapping) or part not in found:
            raise ValueError(f"{where(run)} has no {'.'.join(path)!r} in its config")
        found = found[part]
    return found


def number(run: record.Run, *path: str) -> float:
    """A number of the config."""
    found = value(run, *path)
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise ValueError(f"{where(run)}: {'.'.join(path)!r} must be a number, got {found!r}")
    return float(found)


NAMES = {
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
}


def scale(run: record.Run, *words: str, net: bool = True) -> Scale:
    """Data, size, ``words``, model, as in "digits, 1,347 examples, clean labels, MLP 2 x 128"."""
    kind, _, copy = str(run.provenance.get("source", value(run, "data", "source"))).partition(" ")
    size = f"{len(index(run)):,} examples"
    net_words = [model(value(run, "model"))] if net else []
    text = ", ".join([f"{NAMES.get(kind, kind)} {copy}".strip(), size, *words, *net_words])
    return scale_of(run, text)


def scale_of(run: record.Run, text: str) -> Scale:
    """These words for what the run measured at, and how many of its seeds diverged."""
    diverged = str(seeds(run))
    return Scale(text, f"{diverged}, left out" if diverged else "")


def model(config: Mapping[str, Any]) -> str:
    """``MLP 2 x 128``: its kind and its sizes."""
    kind = str(config.get("kind", "model"))
    if "channels" in config:
        return f"{kind} {'-'.join(map(str, config['channels']))}"
    if "depth" in config and "width" in config:
        return f"{kind} {config['depth']} x {config['width']}"
    return kind


def judging(figure: str, scale: Scale, seeds: int, unit: str = "points") -> Callable[..., Claim]:
    """``made(estimate, quantity, said, at_least=..., control=False)``: a claim of the figure."""

    def made(
        e: Estimate | Paired, quantity: str, said: Said, *, control: bool = False, **gate: float
    ) -> Claim:
        return statistics.judge(
            e,
            figure=figure,
            paper=said.paper,
            statement=said.statement,
            quantity=quantity,
            seeds=seeds,
            scale=scale,
            unit=unit,
            kind="control" if control else "claim",
            **gate,
        )

    return made


def nearest(values: Sequence[float], wanted: float) -> float:
    """The value nearest to the wanted one; the smaller of two that are equally near."""
    return min(values, key=lambda v: (abs(v - wanted), v))


def row(panel: str, series: str, x: Any, e: Estimate | Paired, seeds: int | None) -> dict[str, Any]:
    """A row of a figure's csv."""
    return {"panel": panel, "series": series, "x": x, "y": e.mean, "low": e.low,
            "high": e.high, "seeds": seeds}  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows as the columns of ``TABLE``."""
    return {name: [r.get(name) for r in rows] for name in TABLE}


def count(number: float, noun: str) -> str:
    """``1 epoch``, ``5 epochs``."""
    return f"{number:g} {noun}{'s' * (number != 1)}"


def percent(fraction: float) -> str:
    """``30 %``."""
    return f"{100 * fraction:g} %"


def minus(text: str) -> str:
    """Hyphens as minus signs, for what is drawn."""
    return text.replace("-", "\N{MINUS SIGN}")
