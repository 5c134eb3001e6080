"""Steps: ``fit`` and populations beside plain loops."""

import importlib.util
from collections.abc import Mapping

import jax

from benchmarks import plain, sides
from benchmarks.measure import Race, Result, race
from benchmarks.sides import Job
from dynamics import mesh as meshes

THREADS = (1, 2)  # of PyTorch; the faster is compared with


def fit_mnist(quick: bool) -> list[Result]:
    """The loop around a step of a few milliseconds."""
    return [_fit_alone("fit_mnist", sides.mnist(), 2 if quick else 150, quick, 1.05)]


def fit_digits(quick: bool) -> list[Result]:
    """The loop around a step of a tenth of a millisecond: what it costs at its worst."""
    return [_fit_alone("fit_digits", sides.digits(), 8 if quick else 3000, quick, None)]


def _fit_alone(name: str, job: Job, steps: int, quick: bool, goal: float | None) -> Result:
    rounds = 1 if quick else 21
    race_ = race(
        {
            "fit": sides.through_fit(job, meshes.make(), steps, rounds),
            "scan": plain.scan(job.plain(), steps),
        },
        rounds,
    )
    what = f"fit / bare jitted scan: {job.net()}"
    return race_.compare(name, what, ("fit", steps), ("scan", steps), goal=goal, note=job.about)


def population_digits(quick: bool) -> list[Result]:
    """32 replicas on every device, one alone, and PyTorch."""
    job, rounds, k = sides.digits(), 1 if quick else 21, 32
    every, alone, torch = (2, 8, 8) if quick else (160, 3000, 800)
    mesh = meshes.for_population(k)
    race_ = race(
        {
            "population": sides.through_fit(job, mesh, every, rounds, replicas=k),
            "alone": sides.through_fit(job, meshes.make(), alone, rounds),
            **_torch(job, torch),
        },
        rounds,
    )
    where = f"{k} replicas on {mesh.size} devices, a member"
    ours = ("population", every * k)
    what = f"{where} / one alone through fit: {job.net()}"
    found = race_.compare(
        "population", what, ours, ("alone", alone), goal=0.6 if mesh.size == 2 else None
    )
    beside = _beside_torch("digits", job, race_, {where: ours}, torch, 0.25)
    return [found, *beside]


def population_mnist(quick: bool) -> list[Result]:
    """Four replicas on every device, and one alone, beside PyTorch."""
    job, rounds, k = sides.mnist(), 1 if quick else 21, 4
    every, alone, torch = (1, 2, 2) if quick else (60, 120, 120)
    mesh = meshes.for_population(k)
    race_ = race(
        {
            "population": sides.through_fit(job, mesh, every, rounds, replicas=k),
            "alone": sides.through_fit(job, meshes.make(), alone, rounds),
            **_torch(job, torch),
        },
        rounds,
    )
    ours = {
        f"{k} replicas on {mesh.size} devices, a member": ("population", every * k),
        "one replica": ("alone", alone),
    }
    return _beside_torch("mnist", job, race_, ours, torch, 0.8)


def _torch(job: Job, steps: int) -> dict[str, plain.Side]:
    if importlib.util.find_spec("torch") is None:
        return {}
    return {f"torch {n}": plain.torch_loop(job.plain(), steps, n) for n in THREADS}


def _beside_torch(
    name: str, job: Job, race_: Race, ours: Mapping[str, tuple[str, float]], steps: int, goal: float
) -> list[Result]:
    rivals = [side for side in race_.seconds if side.startswith("torch")]
    out = []
    for i, (where, mine) in enumerate(ours.items()):
        label, what = f"torch_{name}" + "_alone" * i, f"{where} / PyTorch loop: {job.net()}"
        if not rivals:
            out.append(Result(label, what, goal=goal, skipped="torch is not installed"))
            continue
        best = race_.fastest(*rivals)
        note = f"{job.about}; {best} thread(s), the faster of {THREADS}"
        out.append(race_.compare(label, what, mine, (best, steps), goal=goal, note=note))
    return out


def convnet(quick: bool) -> list[Result]:
    """A convolutional step on a CPU is dispatched, not scanned: what both cost."""
    job, rounds = sides.images(), 1 if quick else 15
    steps, scanned = (1, 1) if quick else (12, 2)
    race_ = race(
        {
            "fit": sides.through_fit(job, meshes.make(), steps, rounds),
            "calls": plain.calls(job.plain(), steps),
        },
        rounds,
    )
    what = f"fit / bare jitted step in a Python loop: {job.net()}"
    goal = 1.2 if jax.default_backend() == "cpu" else None
    found = race_.compare(
        "convnet", what, ("fit", steps), ("calls", steps), goal=goal, note=job.about
    )
    if quick:
        return [found]
    rounds = 3
    race_ = race(
        {
            "calls": plain.calls(job.plain(), steps),
            "scan": plain.scan(job.plain(), scanned),
        },
        rounds,
    )
    what = f"bare jitted step in a Python loop / bare jitted scan: {job.net()}"
    return [
        found,
        race_.compare("convnet_scan", what, ("calls", steps), ("scan", scanned), note=job.about),
    ]
