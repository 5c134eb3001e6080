"""``python -m paper_figures [NAME ...] [--runs runs] [--out out]``: the gallery.

A NAME is a figure or an experiment, which stands for all its figures; without one, every figure is
drawn that has a finished run. The newest run of an experiment is drawn as OUT/<figure>.pdf (.png,
.csv, .json), each older one as OUT/<figure>-<first 8 characters of its fingerprint>.pdf.

The exit status is 0 if all that was asked for was drawn, 1 if something has no run or could not be
drawn, 2 for a name that isn't known.
"""

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import paper_figures
from dynamics import record
from paper_figures import draw


def figures() -> dict[str, ModuleType]:
    """The modules of this folder that draw a figure, by name."""
    names = sorted(info.name for info in pkgutil.iter_modules(paper_figures.__path__))
    modules = {
        name: importlib.import_module(f"paper_figures.{name}")
        for name in names
        if not name.startswith("_")
    }
    return {n: m for n, m in modules.items() if hasattr(m, "EXPERIMENT") and hasattr(m, "draw")}


def main(argv: Sequence[str] | None = None) -> int:
    """Draw what is asked for; the exit status."""
    known = figures()
    parser = argparse.ArgumentParser(
        prog="python -m paper_figures",
        description="Draw the figures of finished runs and measure their claims.",
        epilog=f"figures: {', '.join(known)}",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a figure or an experiment")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="default: runs")
    parser.add_argument("--out", type=Path, default=Path("out"), help="default: out")
    args = parser.parse_args(argv)
    for name in args.names:
        if not any(name in (figure, module.EXPERIMENT) for figure, module in known.items()):
            print(f"no figure {name!r}; there are: {', '.join(known)}", file=sys.stderr)
            return 2
    asked = {
        figure: module
        for figure, module in known.items()
        if not args.names or figure in args.names or module.EXPERIMENT in args.names
    }
    found = {figure: record.runs(args.runs, m.EXPERIMENT) for figure, m in asked.items()}
    lacking = [figure for figure, paths in found.items() if not paths]
    if lacking and (args.names or len(lacking) == len(asked)):
        for figure in lacking:
            print(_no_run(figure, asked[figure], args.runs), file=sys.stderr)
    drawn = [
        _draw(figure, asked[figure], path, args.out, newest=path == paths[-1])
        for figure, paths in found.items()
        for path in reversed(paths)
    ]
    enough = not lacking if args.names else bool(drawn)
    return 0 if enough and all(drawn) else 1


def _draw(figure: str, module: ModuleType, path: Path, out: Path, *, newest: bool) -> bool:
    """Draw one run and print its files and claims; whether that worked."""
    name = figure if newest else f"{figure}-{path.name[:8]}"
    try:
        paths, claims = module.draw(record.read(path), out, name=name)
    except (record.RecordError, ValueError) as error:
        print(f"{name}: not drawn: {error}", file=sys.stderr)
        return False
    suffixes = " ".join(p.suffix for p in list(paths.values())[1:])
    print(f"{paths['pdf']} {suffixes}  from {path}\n{draw.report(claims)}\n")
    return True


def _no_run(figure: str, module: ModuleType, runs: Path) -> str:
    command = f"python -m experiments {module.EXPERIMENT} configs/{module.EXPERIMENT}"
    return f"{figure}: no finished run in {runs / module.EXPERIMENT}; make one with: {command}/" + (
        f"{module.PRESET}.py"
    )


if __name__ == "__main__":
    sys.exit(main())
