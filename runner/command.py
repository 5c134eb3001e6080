"""The command line: ``python -m experiments NAME [PRESET.py] [--flags]``; sweep, plan, export."""

import dataclasses
import functools
import importlib
import itertools
import json
import pkgutil
import runpy
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, TextIO

import tyro

import experiments
from dynamics import config as configs
from dynamics import record
from runner import export, launch, progress

DIVERGED = 4  # exit status: done, and no result

USAGE = """\
usage: python -m experiments NAME [PRESET.py] [--flags]
           one run; NAME --help lists every value with its meaning and default
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
             member of some run diverged: stored, and no result
several hosts: the same command on each; found by itself on SLURM, Open MPI, Kubernetes and Cloud
             TPU, else JAX_COORDINATOR_ADDRESS=host:port JAX_NUM_PROCESSES JAX_PROCESS_ID;
             DYNAMICS_PATIENCE  seconds to wait for one that does not arrive (default: 600)
"""


@dataclasses.dataclass(frozen=True)
class Where:
    """What can't change a result."""

    runs: Path = Path("runs")
    """Folder of the results"""
    data_folder: Path | None = None
    """Folder of the data sets; None: DYNAMICS_DATA"""
    mesh: tuple[int, int, int] | None = None
    """Devices along replica, data and model; None: replicas over as many as divide them"""
    verbose: bool = False
    """Show the traceback of an error"""


class Refused(Exception):
    """A command that can't be carried out; its text is all the user needs."""


def main(argv: Sequence[str]) -> int:
    """Carry out a command; the exit status, as the usage says."""
    names = [info.name for info in pkgutil.iter_modules(experiments.__path__) if info.ispkg]
    usage = USAGE.format(names=", ".join(names))
    if argv[:1] == ["export"]:
        return export.main(argv[1:])
    if (
        not argv
        or argv[0] in ("-h", "--help")
        or (argv[0] in ("sweep", "plan") and list(argv[1:2]) in (["-h"], ["--help"]))
    ):
        print(usage)
        return 0 if argv else 2
    several, planned = argv[0] == "sweep", argv[0] == "plan"
    rest = argv[1:] if several or planned else argv
    name, rest = (rest[0] if rest else ""), list(rest[1:])
    try:
        if name not in names:
            raise Refused(f"no experiment {name!r}; there are: {', '.join(names)}")
        module = importlib.import_module(f"experiments.{name}")
        preset = _preset(module, rest[0]) if rest and not rest[0].startswith("-") else {}
        flags = rest[1:] if preset else rest
        topology = _taken(flags, "--topology") if planned else ""
        if several:
            points, where, how = _sweep_points(module, preset, flags)
        else:
            (points, where), how = _one_point(module, preset, flags, name), None
    except (Refused, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if planned:
        return _plan(module, points[0], where, topology)
    if how is not None:
        return _launch(name, points, where, how)
    return _run(module, name, points, where)


def _taken(flags: list[str], name: str) -> str:
    """The value of a flag that is not the config's, taken out of the others."""
    if name not in flags[:-1]:
        raise Refused(f"plan needs {name}, as v5e:4x4, v5p:4x4x4 or cpu:64")
    at = flags.index(name)
    value = flags[at + 1]
    del flags[at : at + 2]
    return value


def _plan(module: ModuleType, point: Any, where: Where, topology: str) -> int:
    from dynamics import mesh as meshes
    from dynamics.data import DataError
    from runner import plan

    try:
        meshes.start(cache=False)  # it takes what was compiled for another machine for broken
        devices = meshes.topology(topology)
        data = module.load(point, where.data_folder)
        make = functools.partial(meshes.make, devices=devices)
        run = functools.partial(module.sweep, (point,), data)
        print(plan.plan(run, make, topology, devices, where.mesh))
    except (ValueError, OSError, DataError) as error:
        if where.verbose:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _preset(module: ModuleType, file: str) -> dict[str, Any]:
    """The values of a preset file, checked to be of this experiment."""
    path = Path(file)
    if not path.is_file():
        known = sorted(map(str, Path("configs").glob("*/*.py")))
        raise Refused(f"no preset file {file}; there are: {', '.join(known) or 'none here'}")
    values = runpy.run_path(str(path))
    found = values.get("config")
    if not isinstance(found, module.Config):
        raise Refused(
            f"{file} must define config = Config(...) of {module.__name__}, got "
            f"{type(found).__module__}.{type(found).__name__}"
        )
    return values


def _one_point(
    module: ModuleType, preset: dict[str, Any], flags: Sequence[str], name: str
) -> tuple[tuple[Any, ...], Where]:
    default, flags = _chosen(preset.get("config") or module.Config(), list(flags))
    kinds = "".join(
        f"\n--{name.replace('_', '-')} {{{','.join(classes)}}}: which kind, then its own flags"
        for name, classes in configs.choices(default).items()
    )
    command = dataclasses.make_dataclass(
        "command",
        [
            ("config", Annotated[module.Config, tyro.conf.arg(name="")]),
            ("where", Annotated[Where, tyro.conf.arg(name="")]),
        ],
    )
    parsed = tyro.cli(
        command,
        args=flags,
        default=command(default, Where()),
        prog=f"python -m experiments {name} [PRESET.py]",
        description=f"{module.__doc__}{kinds}",
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
    )
    return (parsed.config,), parsed.where


def _chosen(config: Any, flags: list[str]) -> tuple[Any, list[str]]:
    """The config with the kinds that flags like ``--model convnet`` name, and the other flags."""
    for name in list(configs.choices(config)):
        flag = "--" + name.replace("_", "-")
        if flag in flags and flags.index(flag) + 1 < len(flags):
            at = flags.index(flag)
            config = configs.override(config, {name: flags[at + 1]})
            del flags[at : at + 2]
    return config, flags


def _sweep_points(
    module: ModuleType, preset: dict[str, Any], flags: Sequence[str]
) -> tuple[tuple[Any, ...], Where, launch.How | None]:
    """The points of a grid given as ``--field value value``, where and how they are computed."""
    fields: dict[str, list[Any]] = {}
    if {"-h", "--help"} & set(flags):
        config = preset.get("config") or module.Config()
        together = ", ".join(configs.replica_fields(config))
        raise Refused(
            f"fields are those of the experiment's own --help; one program for all values of: "
            f"{together}"
        )
    words = (flag.split("=", 1) if flag.startswith("--") else [flag] for flag in flags)
    for word in itertools.chain.from_iterable(words):
        if word.startswith("--"):
            fields[word[2:].replace("-", "_")] = []
        elif fields:
            fields[list(fields)[-1]].append(_value(word))
        else:
            raise Refused(f"expected --field VALUE ..., got {word!r}")
    options = {f.name: fields.pop(f.name) for f in dataclasses.fields(Where) if f.name in fields}
    where = Where(
        runs=Path(*map(str, options.get("runs", ["runs"]))),
        data_folder=Path(*map(str, options["data_folder"])) if "data_folder" in options else None,
        mesh=tuple(options["mesh"]) if "mesh" in options else None,  # pyright: ignore
        verbose="verbose" in options and options["verbose"] != [False],
    )
    how = launch.asked(fields.pop("workers", None), fields.pop("slurm", None))
    if fields:
        return configs.grid(preset.get("config") or module.Config(), fields), where, how
    if "sweep" not in preset:
        raise Refused(
            "nothing to sweep: give --field VALUE ..., or a preset with sweep = grid(...)"
        )
    return tuple(preset["sweep"]), where, how


def _value(word: str) -> Any:
    if word in ("None", "True", "False"):
        return {"None": None, "True": True, "False": False}[word]
    try:
        value = json.loads(word)
    except ValueError:
        return word
    return tuple(value) if isinstance(value, list) else value


def _run(module: ModuleType, name: str, points: Sequence[Any], where: Where) -> int:
    from dynamics import hosts
    from dynamics import mesh as meshes
    from dynamics.checkpoint import CheckpointError
    from dynamics.data import DataError
    from dynamics.record import RecordError

    meshes.start()
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
        except (ValueError, OSError, DataError, RecordError, CheckpointError) as error:
            if where.verbose:
                raise
            print(f"error: {error}", file=sys.stderr)
            return 2
    return _say_done(name, points, where, began) if hosts.is_first() else 0


def _launch(name: str, points: Sequence[Any], where: Where, how: launch.How) -> int:
    began = time.monotonic()
    try:
        missing = launch.launch(name, points, how, where.runs, where.data_folder, where.mesh)
    except ValueError as error:
        if where.verbose:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        jobs = "" if how.slurm is None else ", its jobs were not (squeue shows them, scancel ends)"
        print(f"stopped{jobs}; the same command goes on", file=sys.stderr)
        return 130
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
        if record.nothing(frames):
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
