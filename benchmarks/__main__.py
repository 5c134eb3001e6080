"""``python -m benchmarks [NAME ...] [--quick] [--out FOLDER]``: run them, print one table."""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path

import jax

from benchmarks import accelerator, costs, curvature, early_learning, scores, speed
from benchmarks.measure import Result
from dynamics import mesh, record

BENCHMARKS: dict[str, Callable[[bool], list[Result]]] = {
    "fit_mnist": speed.fit_mnist,
    "fit_digits": speed.fit_digits,
    "population_digits": speed.population_digits,
    "population_mnist": speed.population_mnist,
    "convnet": speed.convnet,
    "order": costs.order,
    "importance": costs.importance,
    "checkpoint": costs.checkpoint,
    "checkpoint_direct": costs.checkpoint_direct,
    "startup": costs.startup,
    "grand_mlp": scores.grand_mlp,
    "grand_convnet": scores.grand_convnet,
    "grand_resnet": scores.grand_resnet,
    "grand_transformer": scores.grand_transformer,
    "dataset": scores.dataset,
    "elr_digits": early_learning.elr_digits,
    "elr_mnist": early_learning.elr_mnist,
    "elr_rows": early_learning.elr_rows,
    "curvature_digits": curvature.curvature_digits,
    "curvature_mnist": curvature.curvature_mnist,
    "curvature_convnet": curvature.curvature_convnet,
    "curvature_transformer": curvature.curvature_transformer,
    "sharpness_watched": curvature.sharpness_watched,
    "resnet_training": accelerator.resnet_training,
    "populations": accelerator.populations,
}
HEADER = ("name", "what", "ours", "theirs", "ratio", "goal", "met", "first lap", "others", "note")


def main() -> None:
    """Results are written as each benchmark ends, so an interrupted run leaves what it has."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument(
        "--quick", action="store_true", help="does everything run? numbers mean nothing"
    )
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in BENCHMARKS]:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    if not options.quick:
        os.environ.setdefault("DYNAMICS_CACHE", "off")  # the time to compile is measured, too
    mesh.start()
    results: list[Result] = []
    for name in options.names or BENCHMARKS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        found = BENCHMARKS[name](options.quick)
        results += [dataclasses.replace(r, goal=None) for r in found] if options.quick else found
        place = write(results, options.out, options.quick, options.names)
    print(table(results))
    print(f"\n{place}.json, {place}.md", file=sys.stderr)


def write(results: list[Result], folder: Path, quick: bool, names: list[str]) -> Path:
    """``<folder>/<date>-<hardware>`` as .json and .md, and its path without the ending."""
    about = {"quick": quick, "hardware": hardware(), "load": os.getloadavg()}
    about |= record.provenance({"devices": [str(d) for d in jax.devices()]})
    about["command"] = ["python", "-m", "benchmarks", *names]
    rows = [dataclasses.asdict(result) | {"met": result.met} for result in results]
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", hardware().lower()).strip("-")
    place = folder / f"{datetime.date.today()}-{name}{'-quick' if quick else ''}"
    record.write(place.with_suffix(".json"), json.dumps({**about, "results": rows}, indent=1))
    record.write(place.with_suffix(".md"), f"# {place.name}\n\n{table(results)}\n")
    return place


def hardware() -> str:
    """The device, or the processor and its number of cores."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{len(jax.devices())} {device.device_kind}"
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{len(os.sched_getaffinity(0))} {names[0] if names else platform.machine()}"


def table(results: list[Result]) -> str:
    """Markdown, with its columns aligned."""
    cells = [HEADER, *(_cells(result) for result in results)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(HEADER))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _cells(r: Result) -> tuple[str, ...]:
    goal = "" if r.goal is None else f"<= {r.goal:g}"
    if r.skipped:
        return (r.name, r.what, "", "", "", goal, "skipped", "", "", r.skipped)
    spread = "" if r.low == r.high else f" ({r.low:.3g}..{r.high:.3g})"
    first = "" if r.compiled is None else "{:.1f} / {:.1f} s".format(*r.compiled)
    busy = "" if r.busy != r.busy else f"{r.busy:.1f}"
    met = {None: "", True: "yes", False: "NO"}[r.met]
    ours, theirs = (f"{x:.0f}" if x >= 1000 else f"{x:.3g}" for x in (r.ours, r.theirs))
    values = (f"{ours} {r.unit}", f"{theirs} {r.unit}", f"{r.ratio:.3g}{spread}")
    return (r.name, r.what, *values, goal, met, first, busy, r.note)


if __name__ == "__main__":
    main()
