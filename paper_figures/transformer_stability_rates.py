"""The loss of small transformers at the end against their learning rate, with and without what
stabilises large ones; their learning-rate sensitivity; and the attention logits and gradients that
foretell instability.

Reference: Wortsman et al. 2023, arXiv 2309.14322, figures 1, 5, 8, 9 and 11, on characters and our
models. Bands are 95 % intervals of the mean over seeds.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from dynamics import record, statistics
from dynamics.statistics import Claim, Estimate, Scale
from paper_figures import draw as drawing
from paper_figures import panels, reading
from paper_figures.reading import Cells, Said, row
from paper_figures.transformer_stability import (
    LOOKS,
    NAMES,
    OURS,
    PAPER,
    cells,
    difference,
    geometric,
    interventions,
    line,
    ratio,
    scale,
    values,
)

EXPERIMENT = "transformer_stability"
STUDY = "Rates"
PRESET = "docstrings"
TOGETHER = ()

LARGE = 0.1  # the learning rate of the claims on logits

HELD = Said("Normalised queries and keys hold attention logits at large learning rates.", PAPER)
CALM = Said("Normalised queries and keys lower the sensitivity to the learning rate.", PAPER)
DECAY = Said("Decay that does not depend on the learning rate lowers the sensitivity.", PAPER)
WARM = Said("A longer warm-up lowers the sensitivity.", PAPER)
MU = Said("muParam does not lower the sensitivity.", PAPER)
FALLS = Said("Gradients of the first MLP layer fall as the learning rate grows.", PAPER)
FREE = Said("At the recipe's best rate, normalised queries and keys cost next to nothing.", OURS)
NO_Z = Said("So does the z-loss: not expected on this scale, where outputs don't diverge.", OURS)


class Study(NamedTuple):
    """What is drawn of a run, checked: by width, intervention, rate and step."""

    loss: Cells
    initial: Cells
    logit: Cells
    gradient: Cells
    widths: tuple[int, ...]
    interventions: tuple[str, ...]
    rates: tuple[float, ...]
    steps: int
    scale: Scale

    def of(self, found: Cells, width: int, name: str, rate: float) -> np.ndarray:
        """[R] at the last step."""
        return found.of(width, name, rate, self.steps)

    def sensitivity(self, width: int, name: str) -> np.ndarray:
        """Of each replica, in nats; nan of one that diverged at every rate."""
        losses = np.stack([self.of(self.loss, width, name, r) for r in self.rates], axis=1)
        initial = self.initial.of(width, name, self.rates[0], 0)
        found = statistics.learning_rate_sensitivity(list(self.rates), losses, initial)
        return np.where(np.isfinite(losses).any(axis=1), found, np.nan)

    def bracketed(self, width: int, name: str) -> bool:
        """Whether the best rate is inside the range of rates."""
        means = [self.of(self.loss, width, name, rate).mean() for rate in self.rates]
        return 0 < int(np.argmin(means)) < len(means) - 1


def draw(
    runs: Sequence[record.Run], folder: Path | str, *, name: str = "transformer_stability_rates"
) -> tuple[dict[str, Path], list[Claim]]:
    """Write the figure of one run; its files, and its claims. ValueError: it lacks something."""
    run = reading.only(runs)
    study = _study(run)
    claims = _claims(study, name)
    with drawing.style("full"):
        fig = drawing.figure("full", height=4.5)
        places = fig.subplots(2, 2).flatten()
        rows = _losses(places[0], study) + _sensitivities(places[1], study)
        rows += _logarithmic(places[2], "c", study, study.logit, "largest attention logit")
        rows += _logarithmic(places[3], "d", study, study.gradient, "RMS gradient, first MLP layer")
        panels.legend(fig, places[0], ncols=min(len(study.interventions), 7))
        drawing.caption(fig, _caption(study))
        paths = drawing.save(
            *(fig, folder, name),
            table=reading.table(rows),
            claims=claims,
            fingerprints=[run.fingerprint],
        )
    return paths, claims


def measure(
    runs: Sequence[record.Run], *, figure: str = "transformer_stability_rates"
) -> list[Claim]:
    """The claims alone, nothing drawn or written."""
    return _claims(_study(reading.only(runs)), figure)


def _study(run: record.Run) -> Study:
    """Everything the figure needs from the run, or one ValueError that says what it lacks."""
    steps = int(reading.number(run, "steps"))
    loss = cells(run, "test_loss", steps)
    study = Study(
        loss=loss,
        initial=cells(run, "test_loss", 0),
        logit=cells(run, "max_logit", steps),
        gradient=cells(run, "grad_rms", steps),
        widths=values(loss, 0),
        interventions=interventions(run, loss),
        rates=values(loss, 2),
        steps=steps,
        scale=scale(run),
    )
    for width in study.widths:
        for name in study.interventions:
            study.sensitivity(width, name)
    return study


def _claims(study: Study, figure: str) -> list[Claim]:
    """Those of every width."""
    return [claim for width in study.widths for claim in _of_width(study, width, figure)]


def _of_width(study: Study, width: int, figure: str) -> list[Claim]:
    made = {
        unit: reading.judging(
            figure, study.scale.of(f"{study.scale}, width {width}"), study.loss.replicas, unit
        )
        for unit in ("times", "nats")
    }
    has = set(study.interventions)
    large, least = reading.nearest(study.rates, LARGE), study.rates[0]
    claims: list[Claim] = []

    def less(than: str, other: str, said: Said, **gate: Any) -> None:
        """How far ``other`` is less sensitive ``than`` another."""
        if {than, other} <= has:
            e = difference(study.sensitivity(width, than), study.sensitivity(width, other))
            what = f"sensitivity, {NAMES[than]} - {NAMES[other]}"
            claims.append(made["nats"](e, what, said, **gate))

    if {"none", "qk_norm"} <= has:
        logits = [study.of(study.logit, width, n, large) for n in ("none", "qk_norm")]
        what = f"largest logit at rate {large:g}, {NAMES['none']} / {NAMES['qk_norm']}"
        claims.append(made["times"](ratio(*logits), what, HELD, at_least=30.0))
    less("none", "qk_norm", CALM, at_least=0.05)
    if "none" in has and least < large:
        ends = [study.of(study.gradient, width, "none", r) for r in (least, large)]
        what = f"RMS gradient, rate {least:g} / rate {large:g}"
        claims.append(made["times"](ratio(*ends), what, FALLS, at_least=10.0))
    less("scaled_decay", "none", DECAY, at_least=0.01)
    less("none", "long_warmup", WARM, at_least=0.01)
    less("none", "mu_param", MU, control=True, at_most=0.05)
    if {"none", "qk_norm"} <= has:
        at = _best(study, width, "none")
        e = difference(*(study.of(study.loss, width, n, at) for n in ("qk_norm", "none")))
        what = f"loss at rate {at:g}, {NAMES['qk_norm']} - {NAMES['none']}"
        claims.append(made["nats"](e, what, FREE, control=True, at_most=0.05))
    less("none", "z_loss", NO_Z, control=True, at_least=0.05)
    return claims


def _best(study: Study, width: int, name: str) -> float:
    return min(study.rates, key=lambda rate: study.of(study.loss, width, name, rate).mean())


def _losses(axes: Axes, study: Study) -> list[dict[str, Any]]:
    width, rows = study.widths[-1], []
    for name in study.interventions:
        found = [_mean(study.of(study.loss, width, name, rate)) for rate in study.rates]
        line(axes, study.rates, found, LOOKS[name], NAMES[name])
        rows += _rows("a", NAMES[name], study, found)
    _rates(axes)
    axes.set_ylabel("test loss at the end (nats)")
    drawing.letter(axes, "a", f"width {width}")
    return rows


def _sensitivities(axes: Axes, study: Study) -> list[dict[str, Any]]:
    """A row for each intervention; the widest net's marker is filled."""
    rows = []
    shifts = panels.aside(len(study.widths), 0.22)
    for i, name in enumerate(study.interventions):
        for width, shift in zip(study.widths, shifts, strict=True):
            e, look = _mean(study.sensitivity(width, name)), LOOKS[name]
            widest = width == study.widths[-1]
            ends = np.array([[e.mean - e.low], [e.high - e.mean]])
            axes.errorbar(
                [e.mean],
                [i - shift],
                xerr=ends if np.isfinite(ends).all() else None,
                color=look.color,
                marker=look.marker,
                mfc=look.color if widest else "white",
                ls="",
                elinewidth=0.9,
            )
            rows.append(row("b", f"{NAMES[name]}, width {width}", name, e, study.loss.replicas))
    reference = study.interventions[0]
    level = float(study.sensitivity(study.widths[-1], reference).mean())
    axes.axvline(level, color=LOOKS[reference].color, lw=0.6, ls=":", zorder=0)
    axes.set_yticks(range(len(study.interventions)), [NAMES[n] for n in study.interventions])
    axes.set_ylim(len(study.interventions) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(True, axis="x")
    axes.set_xlabel("learning-rate sensitivity (nats)")
    drawing.letter(axes, "b", "" if len(study.widths) == 1 else "hollow: narrower nets")
    return rows


def _logarithmic(
    axes: Axes, letter: str, study: Study, found: Cells, text: str
) -> list[dict[str, Any]]:
    width, rows = study.widths[-1], []
    for name in study.interventions:
        means = [geometric(study.of(found, width, name, rate)) for rate in study.rates]
        line(axes, study.rates, means, LOOKS[name], NAMES[name])
        rows += _rows(letter, NAMES[name], study, means)
    _rates(axes)
    axes.set_yscale("log")
    axes.set_ylabel(text)
    drawing.letter(axes, letter, f"width {width}")
    return rows


def _rates(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.set_xlabel("peak learning rate")
    axes.grid(True, axis="y")


def _mean(values: np.ndarray) -> Estimate:
    """Nan where a run diverged."""
    finite = np.isfinite(values).all()
    return statistics.bootstrap(values) if finite else Estimate(np.nan, np.nan, np.nan)


def _rows(
    letter: str, series: str, study: Study, found: Sequence[Estimate]
) -> list[dict[str, Any]]:
    seeds = study.loss.replicas
    return [row(letter, series, x, e, seeds) for x, e in zip(study.rates, found, strict=True)]


def _caption(study: Study) -> str:
    seeds = study.loss.replicas
    text = f"{study.scale}. {reading.count(seeds, 'paired seed')}, {study.steps} steps. "
    text += "Sensitivity: mean over these rates of the loss above the best one's. "
    ends = [n for n in study.interventions if not study.bracketed(study.widths[-1], n)]
    if ends:
        text += f"The best rate is an end of the range for: {', '.join(NAMES[n] for n in ends)}. "
    means = "Bands are 95 % intervals of the mean, in (c, d) of the geometric one."
    return text + (means if seeds > 1 else "No intervals.")
