"""A sweep in several processes: workers on this machine, or SLURM jobs, through submitit.

A unit is what a process computes at a time: points of one compiled program, which train as one
population, cut into as many equal parts as give every process its share. The same command makes
the same units, so that a killed one continues from its checkpoint; one whose points all have their
``done.json`` is not begun. No point is computed by two processes at once (``record.alone``).

``<runs>/<experiment>/launches/<time>-<process>/`` holds the logs of the workers (``*_log.err``) and
for each unit ``<unit>.taken``, a link to the id of the job that began it, ``<unit>.failed``, which
says why it could not be computed, and ``<unit>.job``, the SLURM job that was given it.
"""

import datetime
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from dynamics import config as configs
from dynamics import record
from runner import progress, worker
from runner.worker import Unit

AGAIN = 1  # times that a unit is given to another worker after its own died
SECONDS = 0.3  # between looks at the workers
LINES = 5  # of a dead worker's log that are shown
GRACE = 10.0  # seconds that workers have to save what they train when the command is stopped
FOREVER = 10 * 365 * 24 * 60  # minutes a local worker may take
LIVE = ("PENDING", "RUNNING", "REQUEUED", "COMPLETING", "SUSPENDED")  # states of a SLURM job


class How(NamedTuple):
    """What --workers and --slurm say."""

    workers: int  # processes at a time; 0: one for each compiled program
    slurm: dict[str, Any] | None  # parameters of sbatch as submitit names them; None: here


def asked(workers: Sequence[str] | None, slurm: Sequence[str] | None) -> How | None:
    """What the words of the flags mean, None where there are none. ValueError: nothing."""
    if workers is None and slurm is None:
        return None
    words = list(map(str, workers or ["0"]))
    if workers is not None and not (len(words) == 1 and words[0].isdecimal() and int(words[0])):
        got = " ".join(map(str, workers)) or "nothing"
        raise ValueError(f"--workers must be one number of processes, at least 1, got {got}")
    count = int(words[0])
    if slurm is None:
        return How(count, None)
    pairs = [str(word).partition("=") for word in slurm]
    if bad := ["".join(pair) for pair in pairs if not (pair[0] and pair[2])]:
        raise ValueError(f"--slurm takes NAME=VALUE, as in partition=gpu nodes=2, got {bad[0]!r}")
    given = {name: _value(text) for name, _, text in pairs}
    if not {"timeout_min", "time"} & set(given):
        raise ValueError("--slurm needs timeout_min=MINUTES: a job is stopped then")
    return How(count, given)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def units(points: Sequence[Any], parts: int) -> list[Unit]:
    """The points of each program, cut so that ``parts`` processes get equal shares."""
    found = []
    for group in configs.group(points):
        pieces = min(len(group), max(1, math.ceil(parts * len(group) / len(points))))
        ends = [len(group) * i // pieces for i in range(pieces + 1)]
        found += [group[a:b] for a, b in itertools.pairwise(ends)]
    return found


def launch(
    name: str,
    points: Sequence[Any],
    how: How,
    runs: Path,
    data_folder: Path | None,
    mesh: tuple[int, int, int] | None,
) -> dict[Unit, str]:
    """Compute the points that are not finished; the units that are missing at the end, and why.

    A worker that dies takes no other with it, and its unit is given to another one ``AGAIN``. On
    KeyboardInterrupt local workers end; SLURM jobs go on. ValueError: what was asked can't be had
    here.
    """
    runs = runs.absolute()
    home, cut = runs / name, units(points, how.workers)
    missing = [unit for unit in cut if not record.finished(home, unit)]
    why: dict[Unit, str] = _elsewhere(home, missing) if how.slurm is not None else {}
    todo = [unit for unit in missing if unit not in why]
    if not todo:
        return why
    slots = [todo] * min(how.workers, len(todo)) if how.slurm is None else [[u] for u in todo]
    shares = _shares(len(slots)) if how.slurm is None else [_of_a_node(how.slurm)] * len(slots)
    folder = home / "launches" / f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
    executor = _executor(how, folder, name)
    jobs: dict[int, Any] = {}
    died: Counter[Unit] = Counter()
    try:
        with progress.line() as say:
            while True:
                for slot in [slot for slot, job in jobs.items() if job.done()]:
                    _judge(folder, slots[slot], jobs.pop(slot), died, why, home)
                left = [
                    unit for unit in todo if unit not in why and not record.finished(home, unit)
                ]
                free = {unit for unit in left if not worker.job_of(folder, unit)}
                idle = [s for s in range(len(slots)) if s not in jobs and free & set(slots[s])]
                if start := idle[: max(0, len(left) - len(jobs))]:
                    given = [(name, slots[s], runs, data_folder, mesh, *shares[s]) for s in start]
                    jobs |= dict(zip(start, _submitted(executor, given), strict=True))
                    _remember(folder, slots, jobs, how)
                if not jobs:
                    break
                finished = sum(record.finished(home, (point,)) for point in points)
                lost = f", {sum(map(len, why))} failed" if why else ""
                say(f"{name}: {finished} of {len(points)} points, workers: {len(jobs)}{lost}")
                time.sleep(SECONDS)
    except KeyboardInterrupt:
        if how.slurm is None:
            _stop(list(jobs.values()))
        raise
    return {
        unit: why.get(unit, "it was not begun")
        for unit in missing
        if not record.finished(home, unit)
    }


def _judge(
    folder: Path,
    units: Sequence[Unit],
    job: Any,
    died: Counter[Unit],
    why: dict[Unit, str],
    home: Path,
) -> None:
    """What became of the units of a job that has ended."""
    well = job.paths.result_pickle.exists() and job.exception() is None
    taken = [unit for unit in units if worker.job_of(folder, unit) == job.job_id]
    none_yet = [unit for unit in units if not worker.job_of(folder, unit)]
    for unit in taken or ([] if well else none_yet):
        if record.finished(home, unit):
            continue
        if (failed := worker.mark(folder, unit, "failed")).exists():
            why[unit] = failed.read_text()
            continue
        died[unit] += 1
        if died[unit] > AGAIN or not taken or job.state.startswith("CANCELLED"):
            when = "at its start" if not taken else "again" if died[unit] > 1 else ""
            how = f"its worker died {when}".strip()
            why[unit] = f"{how} ({job.state.lower()})\n{_last_lines(job.paths.stderr)}"
        else:
            worker.mark(folder, unit, "taken").unlink()


def _last_lines(log: Path) -> str:
    text = log.read_text(errors="replace") if log.exists() else ""
    return "\n".join([*(f"  | {line}" for line in text.splitlines()[-LINES:]), f"  log: {log}"])


def _elsewhere(home: Path, units: Sequence[Unit]) -> dict[Unit, str]:
    """The units that a SLURM job of an earlier command has or will have, by what SLURM says."""
    found = {}
    for unit in units:
        for mark in sorted(home.glob(f"launches/*/{configs.fingerprint(unit)}.job"))[-1:]:
            import submitit

            job = submitit.SlurmJob(folder=mark.parent, job_id=mark.read_text())
            ended = job.paths.result_pickle.exists()
            if not ended and job.get_info().get("State", "").startswith(LIVE):
                found[unit] = f"job {job.job_id} of an earlier command is queued or running"
    return found


def _remember(
    folder: Path, slots: Sequence[Sequence[Unit]], jobs: Mapping[int, Any], how: How
) -> None:
    """Note which SLURM job has which unit, before it begins."""
    for slot, job in jobs.items() if how.slurm is not None else ():
        worker.mark(folder, slots[slot][0], "job").write_text(job.job_id)


def _submitted(executor: Any, given: Sequence[tuple[Any, ...]]) -> list[Any]:
    try:
        with executor.batch():
            jobs = [executor.submit(worker.work, *arguments) for arguments in given]
    except RuntimeError as error:
        raise ValueError(f"submitting failed: {str(error).splitlines()[-1]}") from error
    return jobs


def _executor(how: How, folder: Path, name: str) -> Any:
    """Where submitit sends jobs to. ValueError: it isn't installed, or has no such parameter."""
    try:
        import submitit
    except ImportError:
        raise ValueError(
            "--workers and --slurm need submitit: pip install -e '.[cluster]'"
        ) from None
    try:
        if how.slurm is None:
            executor = submitit.AutoExecutor(folder, cluster="local")
            executor.update_parameters(timeout_min=FOREVER, name=name)
            return executor
        executor = submitit.AutoExecutor(folder, cluster="slurm")
        # a node that fails ends its job at once: the others would wait for it
        own = {"name": name, "tasks_per_node": 1, "srun_args": ["--kill-on-bad-exit=1"]}
        own |= {"array_parallelism": how.workers} if how.workers else {}
        executor.update_parameters(**{f"slurm_{k}": v for k, v in (own | how.slurm).items()})
        return executor
    except (RuntimeError, NameError, AssertionError, ValueError, TypeError) as error:
        raise ValueError(f"--slurm: {str(error).splitlines()[0]}") from None


def _stop(jobs: Sequence[Any]) -> None:
    """End local workers: with a checkpoint if they are training, and then in any case."""
    for way, seconds in ((signal.SIGTERM, GRACE), (signal.SIGINT, 5.0)):
        until = time.monotonic() + seconds
        for job in [job for job in jobs if not job.done()]:
            with suppress(ProcessLookupError):
                os.kill(int(job.job_id), way)  # submitit's process beside the worker hands it on
        while time.monotonic() < until and not all(job.done() for job in jobs):
            time.sleep(0.1)


def _shares(count: int) -> list[tuple[list[int], dict[str, str]]]:
    """The cores and the environment of each local worker: its part of this machine."""
    mine = getattr(os, "sched_getaffinity", None)
    cores, gpus = sorted(mine(0)) if mine else [], _gpus()
    if gpus and count > len(gpus):
        raise ValueError(
            f"--workers must be at most the {len(gpus)} GPUs of this machine, got {count}: points "
            "of one program share a GPU by themselves (JAX_PLATFORMS=cpu to leave it alone)"
        )
    return [
        (
            cores[i::count] or cores[i % max(1, len(cores)) :][:1],
            {"CUDA_VISIBLE_DEVICES": ",".join(gpus[i::count])},
        )
        for i in range(count)
    ]


def _gpus() -> list[str]:
    """The NVIDIA GPUs that jax would use here, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return []
    if given is not None:
        return [name for name in given.split(",") if name]
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    listed = subprocess.run(command, capture_output=True, text=True)
    return listed.stdout.split() if listed.returncode == 0 else []


def _of_a_node(slurm: Mapping[str, Any]) -> tuple[list[int], dict[str, str]]:
    """No cores to choose; all GPUs for the one process of a node, where jax would give it one."""
    gpus = slurm.get("gpus_per_node", 0)
    several = slurm.get("nodes", 1) > 1 and slurm.get("tasks_per_node", 1) == 1
    ids = ",".join(map(str, range(gpus))) if several and type(gpus) is int else ""
    return [], {"JAX_LOCAL_DEVICE_IDS": ids} if ids else {}
