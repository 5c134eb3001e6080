"""Data Diet: what pruning by early scores costs, and what the scores agree with.

(a) Test accuracy against the fraction of the training set kept. (b) The difference from a random
subset of the same size, within pairs of runs that share seed, steps and everything else. (c) EL2N
against GraNd, and (d) GraNd at initialisation against the norm of the input: each point of the
plane coloured by the number of training examples there.

Reference: Paul, Ganguli & Dziugaite 2021, arXiv 2107.07075, figure 1 (second row), on our data and
model; bands are 95 % intervals of the mean over replicas, where the paper's are the 16th to 84th
percentile of the runs. Kirsch 2023, arXiv 2303.14753, for GraNd at initialisation.
"""

import functools
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from dynamics import record, statistics
from dynamics.statistics import Claim, Estimate, Paired
from paper_figures import draw as drawing

EXPERIMENT = "data_diet"
PRESET = "digits"

PAPER = "Paul, Ganguli & Dziugaite 2021, arXiv 2107.07075"
KIRSCH = "Kirsch 2023, arXiv 2303.14753"

METHODS = {  # as the rows name them -> as the reader sees them
    "el2n_hard": "EL2N (hardest)",
    "grand_hard": "GraNd (hardest)",
    "grand_init_hard": "GraNd at init (hardest)",
    "el2n_easy": "EL2N (easiest)",
    "random": "random",
    "full": "all data",
}
SUBSETS = tuple(name for name in METHODS if name != "full")
COMPARED = tuple(name for name in SUBSETS if name != "random")
# What the papers say, in our words.
HARD = (
    "The examples of highest EL2N early in training are the ones to keep: they train a better "
    "network than as many drawn at random."
)
HARD_NOISE = (
    "With wrong labels among them, the examples of highest EL2N are the ones to leave out: trained "
    "on them alone, a network fails."
)
EASY = (
    "The examples of lowest EL2N are the ones training can do without: alone, they train a worse "
    "network than as many drawn at random."
)
SAME = "EL2N, which needs no gradient, ranks examples as GraNd does once training has begun."
NORM = "GraNd at initialisation ranks examples by little more than the norm of their input."
CHANCE = (
    "GraNd at initialisation, by which the submission of Data Diet prunes 50 %, does not "
    "reproduce: it keeps no better examples than chance."
)

SCORES = {  # likewise, the scores that are arrays: [R, N], and the last [N]
    "el2n": "EL2N",
    "grand": "GraNd",
    "grand_init": "GraNd at init",
    "input_norm": "input norm",
}
COLUMNS = ("stage", "fraction", "method", "replica", "test_accuracy")
KEPT = 0.3  # the claims' fraction; where the digits gates were set


class Study(NamedTuple):
    """What is drawn of a run, checked."""

    accuracy: dict[tuple[str, float], dict[int, float]]  # (method, fraction) -> replica -> points
    fractions: tuple[float, ...]  # kept, rising, below 1
    replicas: int
    scores: dict[str, np.ndarray]  # f64[R, N]; f64[1, N] for the input norm
    index: np.ndarray  # i64[N]
    noise: float  # the fraction of training labels that are wrong
    epochs: int  # at which el2n and grand were scored
    trained: int  # epochs of every run of (a)
    scale: str

    def points(self, method: str, fraction: float) -> np.ndarray:
        """Test accuracy in percent, by replica."""
        values = self.accuracy[method, fraction]
        return np.array([values[replica] for replica in sorted(values)])

    def average(self, score: str) -> np.ndarray:
        """The score of each example, averaged over scoring replicas."""
        return self.scores[score].mean(axis=0)

    def against_random(self, method: str, fraction: float) -> Paired:
        """Points of accuracy, method - random, over paired replicas."""
        return statistics.paired(self.points(method, fraction), self.points("random", fraction))


def draw(
    run: record.Run, folder: Path | str, *, name: str = "data_diet_pruning"
) -> tuple[dict[str, Path], list[Claim]]:
    """Write the figure of a run of ``experiments.data_diet``; its files, and its claims.

    ValueError: the run lacks something, named.
    """
    study = _study(run)
    rhos = _correlations(study)
    claims = _claims(study, rhos, name)
    with drawing.style("full"):
        fig = drawing.figure("full", height=2.9)
        axes = fig.subplot_mosaic("aabbc\naabbd", gridspec_kw={"width_ratios": [1, 1, 1, 1, 1.4]})
        table = _panel_accuracy(axes["a"], study)
        table += _panel_difference(axes["b"], study)
        table += _panel_scores(axes["c"], "c", study, "el2n", "grand", rhos["grand"])
        table += _panel_scores(
            axes["d"], "d", study, "input_norm", "grand_init", rhos["grand_init"]
        )
        handles, labels = axes["a"].get_legend_handles_labels()
        fig.legend(
            handles, labels, loc="outside upper center", ncols=len(labels), columnspacing=1.2
        )
        drawing.caption(fig, _caption(study))
        columns = {column: [row.get(column) for row in table] for column in TABLE}
        fingerprints = [run.fingerprint]
        paths = drawing.save(
            fig, folder, name, table=columns, claims=claims, fingerprints=fingerprints
        )
    return paths, claims


def measure(run: record.Run, *, figure: str = "data_diet_pruning") -> list[Claim]:
    """The claims alone, nothing drawn or written."""
    study = _study(run)
    return _claims(study, _correlations(study), figure)


TABLE = ("panel", "series", "index", "x", "y", "low", "high", "seeds")


# Reading


def _study(run: record.Run) -> Study:
    """Everything the figure needs from the run, or one ValueError that says what it lacks."""
    where = f"{EXPERIMENT} run {run.fingerprint}"
    accuracy = _accuracy(run, where)
    fractions = sorted({fraction for method, fraction in accuracy if method == "random"})
    if not fractions:
        raise ValueError(f"{where} has no rows for method 'random' at a fraction below 1")
    for method, fraction in [("full", 1.0), *itertools.product(SUBSETS, fractions)]:
        if (method, fraction) not in accuracy:
            raise ValueError(f"{where} has no rows for method {method!r} at fraction {fraction:g}")
    replicas = sorted(accuracy["random", fractions[0]])
    for (method, fraction), values in accuracy.items():
        if method != "full" and sorted(values) != replicas:
            raise ValueError(
                f"{where}: paired differences need the same replicas everywhere; {method!r} at "
                f"fraction {fraction:g} has {sorted(values)}, 'random' at {fractions[0]:g} has "
                f"{replicas}"
            )
    scores = {name: _array(run, where, name, 2) for name in ("el2n", "grand", "grand_init")}
    scores["input_norm"] = _array(run, where, "input_norm", 1)[None]
    index = _array(run, where, "index", 1).astype(np.int64)
    sizes = {name: value.shape[-1] for name, value in (scores | {"index": index}).items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"{where}: its arrays must be of the same examples, got {sizes}")
    if len(scores["el2n"]) != len(scores["grand"]):
        raise ValueError(
            f"{where}: 'el2n' and 'grand' must be of the same scoring replicas, got "
            f"{len(scores['el2n'])} and {len(scores['grand'])}"
        )
    return Study(
        accuracy=accuracy,
        fractions=tuple(fractions),
        replicas=len(replicas),
        scores=scores,
        index=index,
        noise=float(_value(run.config, where, "noise")),
        epochs=int(_value(run.config, where, "score", "epochs")),
        trained=int(_value(run.config, where, "prune", "epochs")),
        scale=_scale(run.config, where, len(index)),
    )


def _accuracy(run: record.Run, where: str) -> dict[tuple[str, float], dict[int, float]]:
    if missing := [name for name in COLUMNS if name not in run.rows.columns]:
        raise ValueError(f"{where} has no column {missing[0]!r} in its rows: {run.rows.columns}")
    out: dict[tuple[str, float], dict[int, float]] = {}
    columns = [run.rows[name].to_list() for name in COLUMNS]
    for stage, fraction, method, replica, value in zip(*columns, strict=True):
        if stage != "prune" or method not in METHODS:
            continue
        if method != "full" and fraction >= 1:
            continue  # nothing was pruned: the same runs as "full"
        if value is None or not 0 <= value <= 1:
            raise ValueError(
                f"{where}: test_accuracy must be in [0, 1], got {value} for {method!r} "
                f"at fraction {fraction:g}, replica {replica:g}"
            )
        replicas = out.setdefault((method, round(float(fraction), 6)), {})
        if int(replica) in replicas:
            raise ValueError(
                f"{where} has two rows for {method!r} at fraction {fraction:g}, replica {replica:g}"
            )
        replicas[int(replica)] = 100 * value
    return out


def _array(run: record.Run, where: str, name: str, ndim: int) -> np.ndarray:
    if name not in run.arrays:
        raise ValueError(f"{where} has no array {name!r}; it has {sorted(run.arrays)}")
    value = np.asarray(run.arrays[name], dtype=np.float64)
    if value.ndim != ndim or value.size == 0 or not np.isfinite(value).all():
        raise ValueError(
            f"{where}: array {name!r} must be finite with {ndim} axes, got shape {value.shape} "
            f"and {int((~np.isfinite(value)).sum())} values that are not finite"
        )
    return value


def _value(config: Mapping[str, Any], where: str, *path: str) -> Any:
    value: Any = config
    for part in path:
        if not isinstance(value, Mapping) or part not in value:
            raise ValueError(f"{where} has no {'.'.join(path)!r} in its config")
        value = value[part]
    return value


def _scale(config: Mapping[str, Any], where: str, examples: int) -> str:
    """Data, size, labels, model, as in "digits, 1,347 examples, clean labels, MLP 2 x 128"."""
    source = _value(config, where, "data", "source")
    source = source["kind"].lower() if isinstance(source, Mapping) else str(source)
    model = _value(config, where, "model")
    kind = _value(model, where, "kind")
    if "channels" in model:
        kind += " " + "-".join(map(str, model["channels"]))
    elif "depth" in model and "width" in model:
        kind += f" {model['depth']} x {model['width']}"
    noise = float(_value(config, where, "noise"))
    labels = f"{_percent(noise)} wrong labels" if noise else "clean labels"
    return f"{source}, {examples:,} examples, {labels}, {kind}"


# Measuring


def _correlations(study: Study) -> dict[str, Estimate]:
    return {
        "grand": _correlation(study.scores["el2n"], study.scores["grand"]),
        "grand_init": _correlation(study.scores["grand_init"], study.scores["input_norm"]),
    }


def _correlation(a: np.ndarray, b: np.ndarray) -> Estimate:
    """Spearman between averages over scoring replicas; its interval is over the replicas.

    ``a`` is [R, N]; ``b`` is [R, N] of the same replicas, or [1, N] and certain.
    """
    both = np.stack([a, np.broadcast_to(b, a.shape)], axis=1)

    def statistic(replicas: np.ndarray) -> float:
        x, y = replicas.mean(axis=0)
        return statistics.spearman(x, y)

    rho, low, high = statistics.jackknife(statistic, both)
    return Estimate(rho, max(low, -1.0), min(high, 1.0)) if len(a) > 1 else Estimate(rho, low, high)


def _claims(study: Study, rhos: Mapping[str, Estimate], figure: str) -> list[Claim]:
    fraction = min(study.fractions, key=lambda f: (abs(f - KEPT), f))
    at = f"at {_percent(fraction)} kept"
    at += f" (nearest to {_percent(KEPT)})" if fraction != KEPT else ""
    hard, easy, init = (
        study.against_random(m, fraction) for m in ("el2n_hard", "el2n_easy", "grand_init_hard")
    )
    shared = {"figure": figure, "scale": study.scale, "paper": PAPER}
    points = functools.partial(statistics.judge, **shared, seeds=study.replicas, unit="points")
    rank = functools.partial(
        statistics.judge, **shared, seeds=len(study.scores["el2n"]), unit="Spearman"
    )
    quantity = f"hard - random {at}"
    if study.noise:
        pruned = [points(hard, quantity=quantity, statement=HARD_NOISE, at_most=-30.0)]
    else:
        pruned = [
            points(hard, quantity=quantity, statement=HARD, at_least=0.5),
            points(easy, quantity=f"easy - random {at}", statement=EASY, at_most=-5.0),
        ]
    quantity = f"Spearman(EL2N, GraNd) after {_count(study.epochs, 'epoch')}"
    gate = 0.97 if not study.noise else 0.95 if study.noise <= 0.2 else 0.93
    control = {"kind": "control", "paper": KIRSCH}
    return [
        *pruned,
        rank(rhos["grand"], quantity=quantity, statement=SAME, at_least=gate),
        rank(
            rhos["grand_init"],
            **control,
            seeds=len(study.scores["grand_init"]),
            quantity="Spearman(GraNd at init, input norm)",
            statement=NORM,
            at_least=0.75,
        ),
        points(
            init, **control, quantity=f"GraNd at init - random {at}", statement=CHANCE, at_most=0.0
        ),
    ]


# Drawing


def _panel_accuracy(axes: Axes, study: Study) -> list[dict[str, Any]]:
    drawing.letter(axes, "a")
    table = []
    for method in SUBSETS:
        look = drawing.LOOKS[METHODS[method]]
        found = [statistics.bootstrap(study.points(method, f)) for f in study.fractions]
        mean, low, high = np.array(found).T
        axes.plot(study.fractions, mean, look.line, color=look.color, marker=look.marker,
                  label=METHODS[method], zorder=3)  # fmt: skip
        if np.isfinite(low).all():
            axes.fill_between(study.fractions, low, high, color=look.color, alpha=0.18, lw=0)
        table += _rows("a", METHODS[method], study, found)
    full, look = statistics.bootstrap(study.points("full", 1.0)), drawing.LOOKS["all data"]
    axes.axhline(full.mean, color=look.color, ls=look.line, lw=0.8, label="all data", zorder=2)
    if math.isfinite(full.low):
        axes.axhspan(full.low, full.high, color=look.color, alpha=0.1, lw=0)
    seeds = len(study.accuracy["full", 1.0])
    table.append(_row("a", "all data", 1.0, full, seeds))
    axes.set_ylabel("test accuracy (%)")
    _kept_axis(axes, study)
    return table


def _panel_difference(axes: Axes, study: Study) -> list[dict[str, Any]]:
    drawing.letter(axes, "b")
    table = []
    axes.axhline(0, color=drawing.LOOKS["random"].color, ls="--", lw=0.8, zorder=1)
    for place, method in enumerate(COMPARED):
        look = drawing.LOOKS[METHODS[method]]
        found = [study.against_random(method, f) for f in study.fractions]
        mean = np.array([p.mean for p in found])
        ends = np.array([[p.mean - p.low, p.high - p.mean] for p in found]).T
        aside = 1 + 0.035 * (place - (len(COMPARED) - 1) / 2)  # intervals beside one another
        axes.errorbar(np.array(study.fractions) * aside, mean, ends if np.isfinite(ends).all()
                      else None, color=look.color, marker=look.marker, ls="", elinewidth=0.9,
                      zorder=3)  # fmt: skip
        table += _rows("b", METHODS[method], study, found)
    axes.set_yscale("symlog", linthresh=1, linscale=0.6)
    axes.yaxis.set_major_locator(FixedLocator([-100, -30, -10, -3, -1, 0, 1, 3, 10, 30, 100]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _minus(f"{v:+.0f}") if v else "0"))
    axes.set_ylabel("accuracy \N{MINUS SIGN} random (points)")
    _kept_axis(axes, study)
    return table


def _kept_axis(axes: Axes, study: Study) -> None:
    """Percent kept on a logarithmic axis: a tick at every fraction, labels where they fit."""
    labelled: list[float] = []
    for fraction in study.fractions:
        if not labelled or fraction / labelled[-1] >= 1.19:
            labelled.append(fraction)
    axes.set_xscale("log")
    axes.set_xlim(study.fractions[0] / 1.15, study.fractions[-1] * 1.15)
    axes.xaxis.set_major_locator(FixedLocator(labelled))
    axes.xaxis.set_minor_locator(FixedLocator(study.fractions))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("training examples kept (%)")
    axes.grid(axis="y")


def _panel_scores(
    axes: Axes, panel: str, study: Study, x_name: str, y_name: str, rho: Estimate
) -> list[dict[str, Any]]:
    """Counts of examples, on logarithmic axes where both scores are skewed and positive."""
    drawing.letter(axes, panel, _minus(f"Spearman {rho.mean:.3f}"))
    x, y = study.average(x_name), study.average(y_name)
    scale = "log" if panel == "c" and x.min() > 0 and y.min() > 0 else "linear"
    # 26 by 9: hexagons that are regular in a panel of this shape. One example is a visible blue.
    axes.hexbin(x, y, xscale=scale, yscale=scale, gridsize=(26, 9), mincnt=1, cmap="Blues",
                norm=LogNorm(vmin=0.25), lw=0.1)  # fmt: skip
    if scale == "log":
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(numticks=4))
            axis.set_minor_locator(NullLocator())
    axes.set_xlabel(SCORES[x_name], labelpad=1)
    axes.set_ylabel(SCORES[y_name])
    series = f"{SCORES[y_name]} against {SCORES[x_name]}"
    return [
        {"panel": panel, "series": series, "index": int(i), "x": float(a), "y": float(b)}
        for i, a, b in zip(study.index, x, y, strict=True)
    ]


def _rows(panel: str, series: str, study: Study, found: list[Any]) -> list[dict[str, Any]]:
    pairs = zip(study.fractions, found, strict=True)
    return [_row(panel, series, fraction, e, study.replicas) for fraction, e in pairs]


def _row(
    panel: str, series: str, fraction: float, e: Estimate | Paired, seeds: int
) -> dict[str, Any]:
    return {"panel": panel, "series": series, "x": fraction, "y": e.mean, "low": e.low,
            "high": e.high, "seeds": seeds}  # fmt: skip


def _caption(study: Study) -> str:
    seeds, scorings = study.replicas, len(study.scores["el2n"])
    intervals = "bands and bars are 95 % intervals of the mean" if seeds > 1 else "no intervals"
    return (
        f"{study.scale}. (a, b) {_count(seeds, 'paired seed')}, {_count(study.trained, 'epoch')}; "
        f"{intervals}; (b) is logarithmic beyond ±1. (c, d) Darker: more examples; scores averaged "
        f"over {_count(scorings, 'run')}, EL2N and GraNd after {_count(study.epochs, 'epoch')}."
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:g} %"


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")
