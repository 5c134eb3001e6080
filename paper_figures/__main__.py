"""``python -m paper_figures [NAME ...] [--runs runs] [--out out]``: the gallery.

A NAME is a figure or an experiment, which stands for all its figures that have a finished run, and
so does no name at all for every experiment. Runs that differ only in what a figure shows together
(its noise levels, say) are drawn as one. The newest are drawn as OUT/<figure>.pdf (.png, .csv,
.json), all older ones as OUT/<figure>-<first 8 characters of the first run's fingerprint>.pdf.

The exit status is 0 if all that was asked for was drawn, 1 if something has no run or could not be
drawn, 2 for a name that isn't known.
"""

import difflib
import importlib
import json
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import paper_figures
from dynamics import record
from runner.errors import Parser, Refused, answered


def figures() -> dict[str, ModuleType]:
    """The modules of this folder that draw a figure, by name."""
    names = sorted(info.name for info in pkgutil.iter_modules(paper_figures.__path__))
    modules = {
        name: importlib.import_module(f"paper_figures.{name}")
        for name in names
        if not name.startswith("_")
    }
    return {n: m for n, m in modules.items() if hasattr(m, "EXPERIMENT") and hasattr(m, "draw")}


@answered("python -m paper_figures")
def main(argv: Sequence[str] | None = None) -> int:
    """Draw what is asked for; the exit status."""
    known = figures()
    parser = Parser(
        prog="python -m paper_figures",
        allow_abbrev=False,
        description="Draw the figures of finished runs and measure their claims.",
        epilog=f"figures: {', '.join(known)}",
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="a figure, or an experiment for all of its own (default: all)",
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="folder of the runs (default: runs)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out"), help="folder to write to (default: out)"
    )
    args = parser.parse_args(argv)
    meant = {
        name: [f for f, m in known.items() if name in (f, m.EXPERIMENT)] for name in args.names
    }
    for name in [name for name, mine in meant.items() if not mine]:
        near = difflib.get_close_matches(name, [*known, *(m.EXPERIMENT for m in known.values())], 1)
        perhaps = f"; perhaps {near[0]}" if near else f"; there are: {', '.join(known)}"
        raise Refused(f"no figure {name!r}{perhaps}")
    for flag, folder in (("--runs", args.runs), ("--out", args.out)):
        if folder.exists() and not folder.is_dir():
            raise Refused(f"{flag} must be a folder, got the file {folder}")
    meant = meant or {"": list(known)}
    asked = {f: m for f, m in known.items() if any(f in mine for mine in meant.values())}
    stored = {e: _stored(args.runs, e, asked) for e in {m.EXPERIMENT: 0 for m in asked.values()}}
    found = {figure: grouped(m, stored[m.EXPERIMENT]) for figure, m in asked.items()}
    # of an experiment any figure will do; a figure asked for by its own name must be there
    lacking = {f for mine in meant.values() if not any(found[f] for f in mine) for f in mine}
    for figure in [figure for figure in asked if figure in lacking]:
        print(_no_run(figure, asked[figure], args.runs), file=sys.stderr)
    drawn = [
        _draw(figure, asked[figure], paths, args.out, newest=i == 0)
        for figure, groups in found.items()
        for i, paths in enumerate(groups)
    ]
    return 0 if not lacking and all(drawn) else 1


def _stored(
    runs: Path, experiment: str, asked: Mapping[str, ModuleType]
) -> dict[Path, dict[str, Any]]:
    """The configs of the finished runs of today's format, the newest last."""
    modules = [module for module in asked.values() if module.EXPERIMENT == experiment]
    studies = any(hasattr(module, "STUDY") for module in modules)
    found = {}
    for path in record.runs(runs, experiment):
        try:
            config, _ = record.asked(path)
            if studies:
                str(config["study"]["kind"])
            found[path] = dict(config)
        except record.RecordError as error:
            print(f"skipped: {error}", file=sys.stderr)
        except (OSError, ValueError, LookupError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"
            print(f"skipped: {path} is of no study that is drawn today ({why})", file=sys.stderr)
    return found


def grouped(module: ModuleType, stored: Mapping[Path, dict[str, Any]]) -> list[list[Path]]:
    """The runs that each figure of the module shows together, the newest figure first.

    Within a figure they are in the order of the fields they differ in.
    """
    study, together = getattr(module, "STUDY", None), getattr(module, "TOGETHER", ())
    groups: dict[str, list[Path]] = {}
    for path, config in reversed(list(stored.items())):
        if study is not None and config["study"]["kind"] != study:
            continue
        rest = {name: value for name, value in config.items() if name not in together}
        groups.setdefault(json.dumps(rest, sort_keys=True), []).append(path)

    def place(path: Path) -> list[Any]:
        values = [stored[path].get(name) for name in together]
        return [
            (0, v, "") if isinstance(v, int | float) else (1, 0, json.dumps(v, sort_keys=True))
            for v in values
        ]

    return [sorted(paths, key=place) for paths in groups.values()]


def _draw(figure: str, module: ModuleType, paths: list[Path], out: Path, *, newest: bool) -> bool:
    """Draw the runs of one figure and print its files and claims; whether that worked."""
    from paper_figures import draw  # here, so that a missing matplotlib is told in one line

    name = figure if newest else f"{figure}-{paths[0].name[:8]}"
    try:
        runs = [record.read(path) for path in paths]
        for run in [run for run in runs if record.seeds(run.frames).lost]:
            print(f"{name}: {record.seeds(run.frames)} in {run.path}", file=sys.stderr)
        files, claims = module.draw(runs, out, name=name)
    except (record.RecordError, ValueError) as error:
        print(f"{name}: not drawn: {error}", file=sys.stderr)
        return False
    suffixes = " ".join(p.suffix for p in list(files.values())[1:])
    source = str(paths[0])
    if len(paths) > 1:
        source = f"{paths[0].parent}/{{{','.join(path.name for path in paths)}}}"
    print(f"{files['pdf']} {suffixes}  from {source}\n{draw.report(claims)}\n")
    return True


def _no_run(figure: str, module: ModuleType, runs: Path) -> str:
    study = getattr(module, "STUDY", None)
    command = f"python -m experiments {module.EXPERIMENT} configs/{module.EXPERIMENT}"
    return (
        f"{figure}: no finished run{f' of {study}' if study else ''} in "
        f"{runs / module.EXPERIMENT}; make one with: {command}/{module.PRESET}.py"
        f"{f' --study {study.lower()}' if study else ''}"
    )


if __name__ == "__main__":
    sys.exit(main())
