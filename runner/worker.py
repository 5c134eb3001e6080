"""What a worker of a sweep does: one unit after another, none that another process computes."""

import importlib
import itertools
import os
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dynamics import config as configs
from dynamics import record
from runner import machine, progress

Unit = tuple[Any, ...]  # points that are computed together


def work(
    name: str,
    todo: Sequence[Unit],
    runs: Path,
    data_folder: Path | None,
    mesh: tuple[int, int, int] | None,
    cores: Sequence[int],
    environment: Mapping[str, str],
) -> None:
    """Compute each unit that no other worker has taken; what fails is written down.

    Units that a process of another launch computes come last: they are waited for.
    """
    os.environ.update(environment)  # before jax looks for devices
    if cores and hasattr(os, "sched_setaffinity"):  # Linux only
        os.sched_setaffinity(0, cores)
    import jax
    import submitit

    from dynamics import mesh as meshes

    machine.start()
    module, home = importlib.import_module(f"experiments.{name}"), runs / name
    job = submitit.JobEnvironment()
    several = jax.process_count() > 1  # of a job, which has one unit: all of them do the same
    for wait, unit in itertools.product((True,) if several else (False, True), todo):
        if not several and record.finished(home, unit):
            continue
        if not jax.process_index() and not _take(job.paths.folder, unit, job):
            continue
        with record.alone(home, unit, wait=wait) as mine, progress.shown():
            try:
                if mine:
                    data = module.load(unit[0], data_folder)
                    module.sweep(unit, data, meshes.make(*mesh) if mesh else None, store=runs)
                else:
                    mark(job.paths.folder, unit, "taken").unlink()
            except Exception as error:  # of one unit: the others are computed all the same
                traceback.print_exc()
                why = f"{type(error).__name__}: {error}\n  log: {job.paths.stderr}"
                mark(job.paths.folder, unit, "failed").write_text(why)
                if several:  # the other processes wait for this one
                    raise


def _again(*arguments: Any) -> Any:
    """What submitit queues again when the time of a job is up, or its node is wanted."""
    import submitit.helpers

    return submitit.helpers.DelayedSubmission(work, *arguments)


work.checkpoint = _again  # pyright: ignore[reportFunctionMemberAccess]


def mark(folder: Path, unit: Unit, kind: str) -> Path:
    """Where a launch says that the unit is ``taken``, ``failed`` or a SLURM ``job``."""
    return folder / f"{configs.fingerprint(unit)}.{kind}"


def job_of(folder: Path, unit: Unit) -> str:
    """The id of the job that has taken the unit, "" if none has."""
    try:
        return os.readlink(mark(folder, unit, "taken"))
    except FileNotFoundError:
        return ""


def _take(folder: Path, unit: Unit, job: Any) -> bool:
    """Whether the unit is this job's from now on, or was before it was queued again."""
    if mark(folder, unit, "failed").exists():
        return False
    with suppress(FileExistsError):
        mark(folder, unit, "taken").symlink_to(job.job_id)  # one of many that try succeeds
    return job_of(folder, unit) == job.job_id
