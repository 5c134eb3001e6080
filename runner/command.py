"""The command line: ``python -m experiments NAME [PRESET.py] [--flags]``; sweep, plan, export."""

import contextlib
import dataclasses
import difflib
import functools
import importlib
import pkgutil
import runpy
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, TextIO

import tyro

import experiments
from dynamics import config as configs
from dynamics import record
from runner import flags, launch, machine, progress
from runner.errors import REFUSED, Refused, answer, answered, in_one_line

DIVERGED = 4  # exit status: done, and no result

USAGE = """\
usage: python -m experiments NAME [PRESET.py] [--flags]
           one run; NAME --help lists every field with its meaning and default
       python -m experiments sweep NAME [PRESET.py] [--field VALUE VALUE ...] ...
           every point of the grid; without fields, the preset's own sweep
           --workers 4                  in so many processes at a time, on this machine
           --slurm partition=gpu timeout_min=600 nodes=2 ...   as SLURM jobs, see docs/launching.md
       python -m experiments plan NAME [PRESET.py] --topology v5e:4x4 [--flags]
           compile that run for a TPU slice (or cpu:N) and say what a chip would hold and do
       python -m experiments export RUN [--keep PART --score NAME]
           scores of a finished run, and a chosen subset, as npz and parquet

experiments: {names}
presets:     configs/<experiment>/*.py
results:     runs/<experiment>/<fingerprint>; a finished run is not computed again
environment: DYNAMICS_DATA   the folder of data sets (default: none; digits need no files)
             DYNAMICS_CACHE  the folder of compiled programs, or off (default: the user's cache)
             JAX_NUM_CPU_DEVICES  devices to split a CPU into (default: one per core)
exit status: 0 done, 1 some runs are missing, 2 refused, 3 another host was lost, 4 done, but every
             member of some run diverged: stored, and no result; 70 a fault of the program; 130 and
             143 stopped by Ctrl-C or SIGTERM: the same command goes on
several hosts: the same command on each; found by itself on SLURM, Open MPI, Kubernetes and Cloud
             TPU, else JAX_COORDINATOR_ADDRESS=host:port JAX_NUM_PROCESSES JAX_PROCESS_ID;
             DYNAMICS_PATIENCE  seconds to wait for one that does not arrive (default: 600)
"""

SWEEP = """\
usage: python -m experiments sweep {name} [PRESET.py] [--field VALUE VALUE ...] ...

Every combination of the values given, or without fields every point of the preset's own sweep.
Fields are those that  python -m experiments {name} --help  lists, with one value or several each;
a value of a field that is a list is written as one: '[0, 1]'. What is finished is not computed
again.

All values of these fields are trained together, as one program; any other value is one more
program: {together}

Folders and devices (--runs, --data-folder, --mesh ...) are given as for one run, and
--workers N   N processes at a time on this machine
--slurm partition=gpu timeout_min=600 ...   SLURM jobs, with parameters as submitit names them
"""


@dataclasses.dataclass(frozen=True)
class Where:
    """What can't change a result."""

    runs: Path = Path("runs")
    """Folder of the results"""
    data_folder: Path | None = None
    """Folder of the data sets; None: DYNAMICS_DATA"""
    mesh: tuple[int, int, int] | None = None
    """Devices along members (seeds, say), data and model; None: as many as divide the members"""
    verbose: bool = False
    """Show the traceback of an error, too"""


@answered("python -m experiments")
def main(argv: Sequence[str]) -> int:
    """Carry out a command; the exit status, as the usage says."""
    names = [info.name for info in pkgutil.iter_modules(experiments.__path__) if info.ispkg]
    machine.check()
    if argv[:1] == ["export"]:
        from runner import export

        return export.main(argv[1:])
    several, planned = argv[:1] == ["sweep"], argv[:1] == ["plan"]
    rest = list(argv[several or planned :])
    name = rest.pop(0) if rest else ""
    helped = bool({"-h", "--help"} & set(argv))
    if not argv or (helped and (planned or name in ("-h", "--help"))):
        print(USAGE.format(names=", ".join(names)))
        return 0 if argv else REFUSED
    if name not in names:
        raise Refused(_no_experiment(name, names))
    module = importlib.import_module(f"experiments.{name}")
    preset = _preset(module, rest[0]) if rest and not rest[0].startswith("-") else {}
    given = flags.words([word for word in rest[bool(preset) :] if word not in ("-h", "--help")])
    config = preset.get("config") or module.Config()
    if helped:
        return _help(module, name, flags.chosen(config, given), several)
    own = ["workers", "slurm"] if several else ["topology"] if planned else []
    flags.check_known(given, config, [*own, *(field.name for field in dataclasses.fields(Where))])
    where = flags.options(Where, given)
    _check_folders(where)
    if planned:
        topology = " ".join(given.pop("topology", []))
        if not topology:
            raise Refused("plan needs --topology, as v5e:4x4, v5p:4x4x4 or cpu:64")
        return _plan(module, flags.single(config, given), where, topology)
    if not several:
        return _run(module, name, (flags.single(config, given),), where)
    how = launch.asked(given.pop("workers", None), given.pop("slurm", None))
    points = flags.several(config, given) if given else _swept(module, preset, rest)
    return _run(module, name, points, where) if how is None else _launch(name, points, where, how)


def _no_experiment(name: str, names: Sequence[str]) -> str:
    if not name:
        return f"the name of an experiment is missing; there are: {', '.join(names)}"
    near = difflib.get_close_matches(name.lower().replace("-", "_"), names, 1)
    perhaps = f"; perhaps {near[0]}" if near else f"; there are: {', '.join(names)}"
    return f"no experiment {name!r}{perhaps}"


def _check_folders(where: Where) -> None:
    for name in ("runs", "data_folder"):
        path = getattr(where, name)
        if path is not None and path.exists() and not path.is_dir():
            raise Refused(f"{flags.flag(name)} must be a folder, got the file {path}")


def _preset(module: ModuleType, file: str) -> dict[str, Any]:
    """The values of a preset file, checked to be of this experiment."""
    path = Path(file)
    if not path.is_file():
        known = sorted(map(str, Path("configs").glob("*/*.py")))
        raise Refused(f"no preset file {file}; there are: {', '.join(known) or 'none here'}")
    try:
        values = runpy.run_path(str(path))
    except SyntaxError as error:
        line = f", line {error.lineno}" if error.lineno else ""
        raise Refused(f"{error.filename or file}{line}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
        text = answer(error) or in_one_line(error)
        raise Refused(f"{file}, line {[0, *lines][-1]}: {text}") from error
    found = values.get("config")
    if not isinstance(found, module.Config):
        raise Refused(
            f"{file} must define config = Config(...) of {module.__name__}, got "
            f"{type(found).__module__}.{type(found).__name__}"
        )
    return values


def _swept(module: ModuleType, preset: dict[str, Any], rest: Sequence[str]) -> tuple[Any, ...]:
    """The points of a preset's own sweep."""
    if "sweep" not in preset:
        raise Refused(
            "nothing to sweep: give --field VALUE ..., or a preset with sweep = grid(...)"
        )
    points = preset["sweep"]
    points = tuple(points) if isinstance(points, list | tuple) else (points,)
    wrong = [point for point in points if not isinstance(point, module.Config)]
    if wrong or not points:
        got = configs.shown(wrong[0]) if wrong else "no points"
        raise Refused(f"{rest[0]} must define sweep = grid(config, {{...}}), configs, got {got}")
    return points


def _help(module: ModuleType, name: str, config: Any, several: bool) -> int:
    """Print what can be given, and its values without flags."""
    if several:
        together = ", ".join(map(flags.flag, configs.replica_fields(config)))
        print(SWEEP.format(name=name, together=together))
        return 0
    kinds = "".join(
        f"\n{flags.flag(field)} {{{','.join(classes)}}}: which kind, then its own flags"
        for field, classes in configs.choices(config).items()
    )
    command = dataclasses.make_dataclass(
        "command",
        [
            ("config", Annotated[module.Config, tyro.conf.arg(name="")]),
            ("where", Annotated[Where, tyro.conf.arg(name="")]),
        ],
    )
    with contextlib.suppress(SystemExit):
        tyro.cli(
            command,
            args=["--help"],
            default=command(config, Where()),
            prog=f"python -m experiments {name} [PRESET.py]",
            description=f"{module.__doc__}{kinds}",
            config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
        )
    return 0


def _plan(module: ModuleType, point: Any, where: Where, topology: str) -> int:
    from dynamics import mesh as meshes
    from runner import plan

    machine.start(cache=False)  # it takes what was compiled for another machine for broken
    devices = meshes.topology(topology)
    data = module.load(point, where.data_folder)
    make = functools.partial(meshes.make, devices=devices)
    run = functools.partial(module.sweep, (point,), data)
    print(plan.plan(run, make, topology, devices, where.mesh))
    return 0


def _run(module: ModuleType, name: str, points: Sequence[Any], where: Where) -> int:
    from dynamics import hosts
    from dynamics import mesh as meshes

    machine.start()
    mesh, began = None, time.monotonic()
    with progress.shown(hosts.is_first()):
        try:
            mesh = meshes.make(*where.mesh) if where.mesh else None
            for group in configs.group(points):
                data = module.load(group[0], where.data_folder)
                with record.alone(where.runs / name, group, wait=True):
                    module.sweep(group, data, mesh, store=where.runs)
        except hosts.LostError as error:
            print(f"error: {error}", file=sys.stderr)
            return hosts.LOST
    return _say_done(name, points, where, began) if hosts.is_first() else 0


def _launch(name: str, points: Sequence[Any], where: Where, how: launch.How) -> int:
    began = time.monotonic()
    try:
        missing = launch.launch(name, points, how, where.runs, where.data_folder, where.mesh)
    except KeyboardInterrupt:
        jobs = "" if how.slurm is None else ", its jobs were not (squeue shows them, scancel ends)"
        raise KeyboardInterrupt(f"stopped{jobs}; the same command goes on") from None
    if not missing:
        return _say_done(name, points, where, began)
    count = sum(map(len, missing))
    print(f"error: {count} of {len(points)} runs of {name} are missing", file=sys.stderr)
    for unit, why in missing.items():
        _say_points(name, unit, points, where, sys.stderr)
        print(f"  {why}", file=sys.stderr)
    print("the others are done; the same command computes what is missing", file=sys.stderr)
    return 1


def _say_done(name: str, points: Sequence[Any], where: Where, began: float) -> int:
    """Say where the runs are, and which of them have members that diverged; the exit status."""
    seconds = time.monotonic() - began
    print(f"{len(points)} run{'s' * (len(points) > 1)} of {name}, {seconds:.1f} s:")
    _say_points(name, points, points, where, sys.stdout)
    print(f"draw:  python -m paper_figures {name} --runs {where.runs}")
    return _say_diverged(name, points, where)


def _say_diverged(name: str, points: Sequence[Any], where: Where) -> int:
    """A line for each run that lost members; DIVERGED if one lost them all, else 0."""
    status = 0
    for path in [where.runs / name / configs.fingerprint(point) for point in points]:
        frames = record.read(path).frames
        if record.all_diverged(frames):
            print(f"no result: every member diverged in {path}", file=sys.stderr)
            status = DIVERGED
        elif lost := str(record.seeds(frames)):
            print(f"{lost}, and no figure or claim has them: {path}", file=sys.stderr)
    return status


def _say_points(
    name: str, some: Sequence[Any], points: Sequence[Any], where: Where, file: TextIO
) -> None:
    for point in some:
        path = where.runs / name / configs.fingerprint(point)
        print(f"  {path}{_differences(point, points)}", file=file)


def _differences(point: Any, points: Sequence[Any], prefix: str = "") -> str:
    """The fields of a point in which it differs from another of the sweep, of the same kind."""
    text = ""
    for field in dataclasses.fields(point):
        name, mine = prefix + field.name, getattr(point, field.name)
        others = [getattr(other, field.name) for other in points]
        if not dataclasses.is_dataclass(mine):
            text += f"  {name}={mine}" if any(other != mine for other in others) else ""
            continue
        alike = [other for other in others if type(other) is type(mine)]
        if len(alike) < len(others):
            text += f"  {name}={type(mine).__name__.lower()}"
        text += _differences(mine, alike, f"{name}.")
    return text
