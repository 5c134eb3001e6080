"""What all figures share: sizes, colours, how they are saved, how their claims are printed."""

import csv
import io
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tueplots import bundles

from dynamics import record
from dynamics.statistics import Claim

DPI = 300


class Look(NamedTuple):
    """How one method is drawn, in every figure."""

    color: str
    marker: str
    line: str = "-"


# Okabe & Ito 2008, told apart in every common colour blindness: one hue to a score, the lighter
# shade to its lesser variant, and a marker for grey print.
LOOKS: Mapping[str, Look] = {
    "EL2N (hardest)": Look("#0072B2", "o"),
    "EL2N (easiest)": Look("#56B4E9", "v"),
    "GraNd (hardest)": Look("#D55E00", "s"),
    "GraNd at init (hardest)": Look("#E69F00", "D"),
    "forgetting (hardest)": Look("#009E73", "^"),
    "margin (hardest)": Look("#CC79A7", "P"),
    "AUM (hardest)": Look("#117733", "*"),
    "input norm (largest)": Look("#882255", "<"),
    "coverage-centric (EL2N)": Look("#999933", "p"),
    "EL2N again": Look("#44AA99", "h"),
    "EL2N of another model": Look("#332288", ">"),
    "EL2N at another rate": Look("#AA4499", "X"),
    "random": Look("#777777", "x", "--"),
    "random again": Look("#AAAAAA", "+", ":"),
    "all data": Look("#000000", ""),
}

STYLE: Mapping[str, Any] = {
    # Shipped with matplotlib, so a figure is the same on every machine; metrics of Times.
    "font.family": "STIXGeneral",
    "mathtext.fontset": "stix",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.2,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    # TrueType: text in the pdf can be searched and edited, and no id is drawn at random.
    "pdf.fonttype": 42,
    "svg.hashsalt": "paper_figures",
}


def style(columns: Literal["half", "full"] = "full") -> AbstractContextManager[None]:
    """A context with the sizes of an ICML 2024 column, whatever the caller's matplotlibrc says.

    Make and fill a figure inside: matplotlib reads its settings when an artist is made.
    """
    sizes = bundles.icml2024(column=columns, usetex=False)
    return matplotlib.style.context(["default", {**sizes, **STYLE}])


def figure(columns: Literal["half", "full"] = "full", *, height: float) -> Figure:
    """An empty figure as wide as the column (3.25 or 6.75 in) and ``height`` in high.

    It belongs to no pyplot and opens no window.
    """
    width = bundles.icml2024(column=columns, usetex=False)["figure.figsize"][0]
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def letter(axes: Axes, text: str, note: str = "") -> None:
    """``(a)`` in bold over the left end of a panel, with a short note beside it."""
    axes.set_title(
        f"$\\mathbf{{({text})}}$" + (f"  {note}" if note else ""), loc="left", fontsize=8
    )


def caption(fig: Figure, text: str) -> None:
    """Small text under the panels, in lines as wide as the figure."""
    lines = textwrap.fill(text, int(23 * fig.get_figwidth()))  # 23 letters to the inch at 7 pt
    fig.supxlabel(lines, fontsize=7, x=0.005, ha="left", color="#444444")


def save(
    fig: Figure,
    folder: Path | str,
    name: str,
    *,
    table: Any,
    claims: Sequence[Claim],
    fingerprints: Sequence[str],
) -> dict[str, Path]:
    """Write NAME.pdf, .png, .csv (the numbers drawn) and .json (runs used, claims); the paths.

    ``table`` is columns by name or a polars table. The same input gives the same bytes. All four
    are made before the first is written, and each appears whole or not at all. What part of the
    members diverged, as the claims know it, is added to the caption and to every row.
    """
    columns = table.to_dict(as_series=False) if hasattr(table, "to_dict") else table
    if lost := _diverged(claims):
        columns = {**columns, "diverged": [lost] * len(next(iter(columns.values())))}
        caption(fig, f"{fig.get_supxlabel()} {lost[0].upper()}{lost[1:]}.".strip())
    with style():  # ticks and texts that are made while drawing
        contents = {
            "pdf": _render(fig, "pdf", {"CreationDate": None}),
            "png": _render(fig, "png", {"Software": None}),
        }
    contents["csv"] = _csv(columns).encode()
    about = {
        "figure": name,
        "fingerprints": list(fingerprints),
        "claims": [_plain(_about(claim)) for claim in claims],
    }
    contents["json"] = (json.dumps(about, indent=1, allow_nan=False) + "\n").encode()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {suffix: folder / f"{name}.{suffix}" for suffix in contents}
    for suffix, content in contents.items():
        record.write(paths[suffix], content)
    return paths


def _diverged(claims: Sequence[Claim]) -> str:
    """What the claims say of members that diverged; of which scale, if they differ."""
    told = dict.fromkeys((claim.scale, claim.diverged) for claim in claims)
    words = dict.fromkeys(diverged for _, diverged in told)
    if len(words) < 2:
        return next(iter(words), "")
    return "; ".join(f"{scale}: {diverged}" for scale, diverged in told if diverged)


def _about(claim: Claim) -> dict[str, Any]:
    """The claim; that members diverged only where some did."""
    found = claim._asdict()
    return found if claim.diverged else {k: v for k, v in found.items() if k != "diverged"}


def _render(fig: Figure, kind: str, metadata: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    fig.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
    return buffer.getvalue()


def _csv(columns: Mapping[str, Sequence[Any]]) -> str:
    """Columns as text; an absent value (None or NaN) is an empty field."""
    lists = {name: np.asarray(values, dtype=object).tolist() for name, values in columns.items()}
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the columns of a table must be equally long, got {lengths}")
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(lists)
    writer.writerows([_field(v) for v in row] for row in zip(*lists.values(), strict=True))
    return buffer.getvalue()


def _field(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return "" if value is None or value != value else value


def _plain(value: Any) -> Any:
    """What JSON can hold; a number that isn't finite becomes null."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report(claims: Sequence[Claim], *, width: int = 100) -> str:
    """The claims as text: what was measured, then what the paper says; controls after claims."""
    blocks = []
    for kind in ("claim", "control"):
        mine = [claim for claim in claims if claim.kind == kind]
        for scale in dict.fromkeys(claim.scale for claim in mine):
            lines = _wrap(f"{kind}s on {scale}:", "", width)
            for claim in mine:
                lines += _lines(claim, width) if claim.scale == scale else []
            blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _lines(claim: Claim, width: int) -> list[str]:
    """What was measured, after the verdict; under it what was said and by whom."""
    verdict = {True: "holds", False: "does not hold", None: "not measured"}[claim.holds]
    effect = number(claim.effect, claim.unit)
    if claim.unit and claim.unit not in claim.quantity:
        effect += f" {claim.unit}"
    if all(math.isfinite(end) for end in claim.interval):
        effect += f" [{', '.join(number(end, claim.unit) for end in claim.interval)}]"
    seeds = f"{claim.seeds} seed{'s' * (claim.seeds != 1)}"
    atoms = [f"{claim.quantity or 'effect'} = {_whole(effect + ',')}", _whole(seeds)]
    if claim.holds is None:
        atoms = [f"{claim.quantity or 'effect'}:"]
    atoms += [f"({claim.diverged})"] if claim.diverged else []
    atoms += [_whole(f"(gate {claim.gate})")] if claim.gate else []
    said = f"{claim.statement} ({claim.paper.replace('arXiv ', _whole('arXiv '))})"
    return _wrap(" ".join(atoms), f"{verdict:<15}", width) + _wrap(said, " " * 15, width)


def _whole(text: str) -> str:
    """Text that no line ends in."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def _wrap(text: str, start: str, width: int) -> list[str]:
    lines = textwrap.wrap(
        text,
        width,
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_on_hyphens=False,
        break_long_words=False,
    )
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def number(value: float, unit: str) -> str:
    """Points with their sign and two decimals, anything else with three."""
    digits = 2 if unit == "points" else 3
    value = round(float(value), digits) + 0.0  # no minus before a zero
    return f"{value:+.2f}" if unit == "points" else f"{value:.3f}"
