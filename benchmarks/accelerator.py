"""What an accelerator is bought for: the Data Diet network, and populations of small ones."""

import jax
import numpy as np

from benchmarks import sides
from benchmarks.measure import Race, Result, race
from benchmarks.sides import Job
from dynamics import mesh as meshes
from dynamics import models

MULTIPLY_ADDS = 0.557e9  # of ResNet-18 for an image of 32 x 32, forwards
PEAKS = {  # bfloat16 FLOPs a second of one device, dense, from its maker's data sheet
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}
REPLICAS = (4, 10)
POPULATIONS = (10, 32, 100, 256)


def resnet_training(quick: bool) -> list[Result]:
    """ResNet-18 as the cifar10 preset trains it, batch 128, bfloat16: replicas, and one alone."""
    if jax.default_backend() == "cpu" and not quick:
        return [Result("resnet_training", "ResNet-18", skipped="it wants an accelerator")]
    model = models.ResNet(depth=18, precision="bfloat16")
    job = Job(sides.noise(50_000, 32, 32, 3), model, 128, "noise in CIFAR's shape")
    if quick:
        small = models.ResNet(depth=8, width=4)
        job = Job(sides.noise(32, 8, 8, 3), small, 8, "noise")
    every, alone, rounds = (1, 1, 1) if quick else (8, 32, 9)
    found = []
    for k in (2,) if quick else REPLICAS:
        race_ = _raced(job, k, every, alone, rounds)
        name, note = f"resnet_training_{k}", _used(job, race_, k, every)
        found.append(_beside_alone(name, job, race_, k, every, alone, note))
    return found


def populations(quick: bool) -> list[Result]:
    """From ten to hundreds of small networks in one program, a member beside one alone."""
    found = []
    for name, job in {"digits": sides.digits(), "mnist": sides.mnist()}.items():
        every, alone, rounds = (1, 2, 1) if quick else (64, 2000, 9)
        for k in (2,) if quick else POPULATIONS:
            race_ = _raced(job, k, every, alone, rounds)
            label = f"populations_{name}_{k}"
            found.append(_beside_alone(label, job, race_, k, every, alone, job.about))
    return found


def _raced(job: Job, k: int, every: int, alone: int, rounds: int) -> Race:
    mesh = meshes.for_population(k)
    return race(
        {
            "population": sides.through_fit(job, mesh, every, rounds, replicas=k),
            "alone": sides.through_fit(job, meshes.make(), alone, rounds),
        },
        rounds,
    )


def _beside_alone(
    name: str, job: Job, race_: Race, k: int, every: int, alone: int, note: str
) -> Result:
    where = f"{k} replicas on {meshes.for_population(k).size} devices"
    what = f"{where}, a member / one alone: {job.net()}"
    return race_.compare(name, what, ("population", every * k), ("alone", alone), note=note)


def _used(job: Job, race_: Race, k: int, every: int) -> str:
    """Epochs a minute of the population, and how much of the devices' peak its FLOPs are."""
    step = float(np.median(race_.each("population", every * k)))  # seconds, of a member
    epochs = 60 / (step * (len(job.data) // job.batch_size)) / k
    note = f"{job.about}; {epochs:.3g} epochs of all {k} a minute"
    kind = jax.devices()[0].device_kind
    peak = next((peak for name, peak in PEAKS.items() if name in kind), None)
    if peak is None:
        return note
    devices = meshes.for_population(k).size
    flops = 3 * 2 * MULTIPLY_ADDS * job.batch_size / step / devices
    return f"{note}; {flops / 1e12:.3g} TFLOP/s a device, {100 * flops / peak:.1f} % of its peak"
