"""The largest attention logit early in training against the size of the network, rate by rate, and
what the narrower networks predict for the widest.

Reference: Wortsman et al. 2023, arXiv 2309.14322, section 3.3 and figure 6: a quadratic between the
logarithms. Our early is after warm-up, our networks are of one depth. The band is the 95 % interval
for one more network, from the fit to the means over seeds of all but the widest.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from dynamics import record, statistics
from dynamics.statistics import Claim, Estimate, Extrapolation, Scale
from paper_figures import draw as drawing
from paper_figures import reading
from paper_figures.draw import Look
from paper_figures.reading import Said, row
from paper_figures.transformer_stability import (
    NAMES,
    OURS,
    PAPER,
    cells,
    geometric,
    interventions,
    logarithms,
    ratio,
    scale,
    values,
)

EXPERIMENT = "transformer_stability"
STUDY = "Widths"
PRESET = "docstrings"
TOGETHER = ()

DEGREE = 2
AT = 3e-2  # the rate of the claims on growth
COLORS = ("#56B4E9", "#0072B2", "#E69F00", "#D55E00", "#882255", "#000000")
MARKERS = "osD^vP"

GROWS = Said("At a fixed learning rate attention logits grow with width.", PAPER)
FORETOLD = Said("Small networks foretell how large the logits of larger ones will be.", PAPER)
HELD = Said("With normalised queries and keys they do not grow so.", OURS)


class Study(NamedTuple):
    """What is drawn of a run, checked."""

    logits: dict[tuple[str, float], np.ndarray]  # (intervention, rate) -> [R, W]
    parameters: np.ndarray  # f64[W]
    widths: tuple[int, ...]
    interventions: tuple[str, ...]
    rates: tuple[float, ...]
    steps: tuple[int, int]
    scale: Scale

    @property
    def seeds(self) -> int:
        """Replicas of each."""
        return len(next(iter(self.logits.values())))

    def predicted(self, name: str, rate: float, at: np.ndarray) -> Extrapolation:
        """At so many parameters, from all widths but the last."""
        means = [geometric(column).mean for column in self.logits[name, rate].T[:-1]]
        return statistics.extrapolate(self.parameters[:-1], means, at, degree=DEGREE)

    def usable(self, name: str, rate: float) -> bool:
        """Whether all logits are positive and finite, and enough to fit and to judge."""
        enough = len(self.widths) > DEGREE + 2
        return enough and not np.isnan(logarithms(self.logits[name, rate])).any()


def draw(
    runs: Sequence[record.Run], folder: Path | str, *, name: str = "transformer_stability_widths"
) -> tuple[dict[str, Path], list[Claim]]:
    """Write the figure of one run; its files, and its claims. ValueError: it lacks something."""
    run = reading.only(runs)
    study = _study(run)
    claims = _claims(study, name)
    with drawing.style("full"):
        fig = drawing.figure("full", height=2.9)
        places = np.atleast_1d(fig.subplots(1, len(study.interventions), sharey=True))
        rows = []
        for axes, letter, intervention in zip(places, "abcdefg", study.interventions, strict=False):
            rows += _panel(axes, letter, study, intervention)
        places[0].set_ylabel("largest attention logit")
        places[0].legend(title="learning rate", title_fontsize=7, loc="upper left")
        drawing.caption(fig, _caption(study))
        paths = drawing.save(
            *(fig, folder, name),
            table=reading.table(rows),
            claims=claims,
            fingerprints=[run.fingerprint],
        )
    return paths, claims


def measure(
    runs: Sequence[record.Run], *, figure: str = "transformer_stability_widths"
) -> list[Claim]:
    """The claims alone, nothing drawn or written."""
    return _claims(_study(reading.only(runs)), figure)


def _study(run: record.Run) -> Study:
    """Everything the figure needs from the run, or one ValueError that says what it lacks."""
    first, last = (int(reading.number(run, "study", end)) for end in ("first", "last"))
    early = range(first, last + 1)
    found, sizes = cells(run, "max_logit", *early), cells(run, "parameters", 0)
    widths, rates, names = values(found, 0), values(found, 2), interventions(run, found)
    if len(widths) < 2:
        raise ValueError(f"{reading.where(run)} needs two widths or more, got {widths}")
    return Study(
        logits={
            (n, r): np.stack(
                [np.mean([found.of(w, n, r, t) for t in early], axis=0) for w in widths], axis=1
            )
            for n in names
            for r in rates
        },
        parameters=np.array([sizes.of(w, names[0], rates[0], 0)[0] for w in widths]),
        widths=widths,
        interventions=names,
        rates=rates,
        steps=(first, last),
        scale=scale(run),
    )


def _claims(study: Study, figure: str) -> list[Claim]:
    times, decades = (
        reading.judging(figure, study.scale, study.seeds, unit) for unit in ("times", "decades")
    )
    rate, claims = reading.nearest(study.rates, AT), []
    if "none" in study.interventions:
        what = f"least growth from a width to the next, rate {rate:g}"
        e = _least_growth(study.logits["none", rate])
        claims.append(times(e, what, GROWS, at_least=1.0))
        claims.append(times(*_growth(study, "none", rate), GROWS, at_least=3.0))
        for small in [r for r in study.rates if r <= AT and study.usable("none", r)]:
            e = _missed(study, "none", small)
            what = f"measured / predicted at width {study.widths[-1]}, rate {small:g}, |log10|"
            claims.append(decades(e, what, FORETOLD, at_most=0.5))
    if "qk_norm" in study.interventions:
        e, what = _growth(study, "qk_norm", rate)
        claims.append(times(e, what, HELD, control=True, at_most=3.0))
    return claims


def _growth(study: Study, name: str, rate: float) -> tuple[Estimate, str]:
    logits = study.logits[name, rate]
    widths = f"width {study.widths[-1]} / width {study.widths[0]}"
    return ratio(logits[:, -1], logits[:, 0]), f"logit, {widths}, rate {rate:g}, {NAMES[name]}"


def _least_growth(logits: np.ndarray) -> Estimate:
    """Of the geometric means over replicas [R, W]."""
    exponents = logarithms(logits)
    if np.isnan(exponents).any():
        return Estimate(np.nan, np.nan, np.nan)
    least = lambda some: float(np.diff(some.mean(axis=0)).min())  # noqa: E731
    found = statistics.jackknife(least, exponents)
    return Estimate(*(float(10.0**v) if v < 300 else np.inf for v in found))


def _missed(study: Study, name: str, rate: float) -> Estimate:
    """|log10 measured - log10 predicted| at the widest, its interval over seeds."""
    predicted = study.predicted(name, rate, study.parameters[-1:]).mean[0]
    mean, low, high = statistics.bootstrap(
        logarithms(study.logits[name, rate][:, -1]) - np.log10(predicted)
    )
    ends = sorted((abs(low), abs(high)))
    return Estimate(abs(mean), 0.0 if low <= 0 <= high else ends[0], ends[1])


def _panel(axes: Axes, letter: str, study: Study, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    size = study.parameters
    fine = np.geomspace(size[0], 1.25 * size[-1], 60)
    beyond = np.geomspace(size[-2], 1.25 * size[-1], 30)
    for i, rate in enumerate(study.rates):
        look = Look(COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)])
        found = [geometric(column) for column in study.logits[name, rate].T]
        series = f"{NAMES[name]}, rate {rate:g}"
        rows += [row(letter, series, x, e, study.seeds) for x, e in zip(size, found, strict=True)]
        _points(axes, size, found, look, f"{rate:g}")
        if study.usable(name, rate):
            curve, band = (study.predicted(name, rate, at) for at in (fine, beyond))
            axes.plot(fine, curve.mean, color=look.color, lw=0.9, zorder=2)
            axes.fill_between(beyond, band.low, band.high, color=look.color, alpha=0.14, lw=0)
            e = Estimate(*(float(v[0]) for v in study.predicted(name, rate, size[-1:])))
            rows.append(row(letter, f"{series}, predicted", size[-1], e, None))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(*_limits(study))
    axes.set_xlabel("parameters without embeddings")
    axes.grid(True, axis="y")
    drawing.letter(axes, letter, NAMES[name])
    return rows


def _points(axes: Axes, x: np.ndarray, found: Sequence[Estimate], look: Look, label: str) -> None:
    """Means with their intervals; the last, which nothing was fitted to, is hollow."""
    for i, e in enumerate(found):
        ends = np.array([[e.mean - e.low], [e.high - e.mean]])
        axes.errorbar(
            [x[i]],
            [e.mean],
            yerr=ends if np.isfinite(ends).all() else None,
            color=look.color,
            marker=look.marker,
            mfc="white" if i == len(found) - 1 else look.color,
            ls="",
            elinewidth=0.9,
            label=label if not i else None,
            zorder=4,
        )


def _limits(study: Study) -> tuple[float, float]:
    """Of what was measured, so that a wide band does not hide it."""
    exponents = np.concatenate([logarithms(v).ravel() for v in study.logits.values()])
    low, high = np.nanmin(exponents), np.nanmax(exponents)
    return 10.0 ** (low - 0.25), 10.0 ** (high + 0.6)


def _caption(study: Study) -> str:
    first, last = study.steps
    widths = ", ".join(map(str, study.widths))
    return (
        f"{study.scale}. Widths {widths}; mean of steps {first} to {last}, "
        f"{reading.count(study.seeds, 'seed')}. Lines: quadratics between logarithms, fitted to "
        "the filled markers; bands: 95 % prediction intervals; hollow: what was predicted."
    )
