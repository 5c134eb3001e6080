"""``python -m experiments plan NAME [PRESET.py] --topology v5e:4x4``: a run, compiled for a machine
that is not here: what each chip would hold, compute and exchange, and how long a step would take.

Nothing is run. The first training of the experiment is compiled, with its probes; later stages
start from numbers that only a run can give. ``--mesh R D M`` is the mesh to compile for, otherwise
the best of those that divide the replicas and the batch, estimated from shapes.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from dynamics.mesh import AXES
from dynamics.plan import Plan, Planned, Program, Work

GB, MB, KB = 1e9, 1e6, 1e3


class Chip(NamedTuple):
    """Public figures of one chip."""

    memory: float  # bytes
    flops: float  # a second, bfloat16
    bandwidth: float  # bytes a second, of its memory
    links: float  # bytes a second it can send to its neighbours


# cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, November 2026; links: half of what is given as
# bidirectional. Of v4 the all-reduce bandwidth of a pod, 1.1 PB/s, over its 4,096 chips.
CHIPS = {
    "v4": Chip(32 * 2**30, 275e12, 1200e9, 268e9),
    "v5e": Chip(16e9, 197e12, 819e9, 200e9),
    "v5p": Chip(95e9, 459e12, 2765e9, 600e9),
    "v6e": Chip(32e9, 918e12, 1638e9, 400e9),
}
CORE = Chip(math.inf, 50e9, 10e9, 10e9)  # roughly, to choose among meshes of a CPU's
SENT = {  # of the bytes of its result, what a chip sends in a ring of n chips
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1.0,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}


class Times(NamedTuple):
    """Seconds of a step if one thing alone took time."""

    compute: float
    memory: float
    interconnect: float

    @property
    def largest(self) -> str:
        """The name of the bound."""
        return max(self._fields, key=lambda name: getattr(self, name))


def times(program: Program, chip: Chip, shape: dict[str, int]) -> Times:
    """Seconds of a step of the program: each figure over the chip's peak, nothing overlapped."""
    sent = 0.0
    for c in program.collectives:
        n = 1
        for axis in c.axes:
            n *= shape[axis]
        sent += c.count * c.bytes * SENT[c.kind](max(n, 1))
    return Times(program.flops / chip.flops, program.accessed / chip.bandwidth, sent / chip.links)


def meshes_of(chips: int, replicas: int, batch_size: int) -> Iterator[tuple[int, int, int]]:
    """(replica, data, model) that divide the replicas and the batch, over all or some chips."""
    for r in range(1, chips + 1):
        for d in range(1, chips // r + 1):
            if replicas % r == 0 and batch_size % d == 0:
                most = chips // (r * d)
                yield from ((r, d, m) for m in range(1, most + 1) if chips % m == 0)


def estimate(work: Work, mesh: tuple[int, int, int], chip: Chip) -> tuple[float, float]:
    """Bytes on a chip, and seconds of a step with nothing overlapped, from shapes alone.

    What replicas share nothing of divides over all axes; gradients are reduced over data, and what
    a model axis exchanges is taken to be what products read and write.
    """
    r, d, m = mesh
    here = (work.state / m + work.kept / (d * m)) / r + work.data
    read = (work.moved / (d * m) + 3 * work.state / m) / r
    sent = (2 * (d - 1) / d * work.params / m + work.moved / d * (m - 1) / m) / r
    compute = work.flops / (r * d * m) / chip.flops
    return here, compute + read / chip.bandwidth + sent / chip.links


def fewest(devices: Sequence[Any]) -> int:
    """The chips that a mesh must have so that every host of the machine has a part in it."""
    hosts = [device.process_index for device in devices]
    return max(hosts.index(host) for host in set(hosts)) + 1


def ranked(work: Work, chips: int, chip: Chip, least: int = 1) -> list[tuple[int, int, int]]:
    """Meshes, the one of least time among those that fit first.

    Fewer chips may be faster: on 10 of 16 a population of 10 exchanges nothing, on 16 gradients.
    With fewer than ``least`` a host would be idle, and it can't be: then they come last.
    """

    def cost(mesh: tuple[int, int, int]) -> tuple[bool, bool, float]:
        here, seconds = estimate(work, mesh, chip)
        return math.prod(mesh) < least, here > chip.memory, seconds

    return sorted(meshes_of(chips, work.replicas, work.batch_size), key=cost)


def plan(
    run: Callable[[Any], None],
    make: Callable[..., Any],
    topology: str,
    devices: Sequence[Any],
    shape: tuple[int, int, int] | None,
) -> str:
    """The report. ``run(mesh)`` begins the experiment, ``make(r, d, m)`` a mesh of the machine."""
    chip = CHIPS.get(topology.partition(":")[0])
    work = _planned(run, make(1, 1, 1)).work()
    least = fewest(devices)
    best = ranked(work, len(devices), chip or CORE, least)
    shapes, refused = [shape] if shape else best, ""
    for i, one in enumerate(shapes):
        try:
            planned = _planned(run, make(*one))
            break
        except ValueError as error:  # a later stage trains another number of replicas
            if i == len(shapes) - 1:
                raise
            refused = refused or f"\n{_by(one)} can't be used by all of this experiment: {error}."
    found = planned.compile()
    lines = list(report(found, topology, chip))
    some = (f"{_by(m)} ({_seconds(estimate(work, m, chip or CORE)[1])})" for m in best[:3])
    if found.mesh.size < least:
        lines.append("As one run on all hosts it can't be used: a host has no chip in this mesh.")
    return (
        "\n".join([*lines, f"Of {len(best)} meshes that divide, by shapes: {', '.join(some)}."])
        + refused
    )


def _planned(run: Callable[[Any], None], mesh: Any) -> Planned:
    try:
        run(mesh)
    except Planned as planned:
        return planned
    raise ValueError("this experiment trains nothing: there is nothing to plan")


def report(plan: Plan, topology: str, chip: Chip | None) -> Iterator[str]:
    """The lines of the table."""
    shape = dict(plan.mesh.shape)
    step = plan.programs[0]
    yield (
        f"{topology}, {plan.mesh.size} chips as {_by(shape.values())} "
        f"({', '.join(shape)}); {plan.replicas} members, batch {plan.batch_size}, "
        f"{plan.steps:,} steps"
    )
    yield ""
    yield "bytes per chip"
    parts = {
        "parameters": plan.params,
        "optimizer": plan.optimizer,
        "other state": plan.extras,
        "data": plan.data,
        "activations and temporaries": step.temporary,
    }
    for name, size in parts.items():
        yield f"  {name:<28}{_bytes(size):>12}"
    limit = f" of {_bytes(chip.memory)}" if chip else ""
    yield f"  {'peak of all programs':<28}{_bytes(plan.peak):>12}{limit}"
    if chip and plan.peak > chip.memory:
        yield f"  IT DOES NOT FIT: {advice(plan, chip)}"
    for program in plan.programs:
        yield ""
        yield from described(program, chip, shape, "a step" if program is step else "a measurement")
    for name, why in plan.unplanned.items():
        full = "RESOURCE_EXHAUSTED" in why
        because = "IT DOES NOT FIT" if full else "not compiled, it reads numbers on the host"
        yield f"\n{name}: {because} ({why})"
    yield ""
    yield "A loop's body counts once, as a step does; times are lower bounds, nothing overlapped."
    if chip and len(plan.programs) > 1:
        yield "Measurements are compiled in haste: what they read and write is rough."


def described(
    program: Program, chip: Chip | None, shape: dict[str, int], what: str
) -> Iterator[str]:
    """The lines about one program, run on a mesh of this ``shape``."""
    yield (
        f"{program.name}: {program.flops / GB:,.3g} GFLOP, "
        f"{_bytes(program.accessed)} read and written, {_bytes(program.temporary)} temporary"
    )
    for c in program.collectives:
        along = " and ".join(c.axes) or "nothing"
        yield f"  {c.count:>4} x {c.kind:<19} over {along:<16}{_bytes(c.bytes):>12}"
    if not program.collectives:
        yield "  no collectives"
    if chip:
        t = times(program, chip, shape)
        yield (
            f"  {what} takes at least {_seconds(max(t))}, bound by {t.largest} "
            f"(compute {_seconds(t.compute)}, memory {_seconds(t.memory)}, interconnect "
            f"{_seconds(t.interconnect)})"
        )


def advice(plan: Plan, chip: Chip) -> str:
    """What to change so that it fits, the largest part first."""
    here = plan.replicas // plan.mesh.shape[AXES[0]]
    state = plan.params + plan.optimizer
    if here > 1 and state + plan.programs[0].temporary > plan.data:
        return f"each chip holds {here} members: give more chips to the replica axis"
    if plan.data > 0.5 * chip.memory:
        return "the data do not lie on a chip: feed them from the host (data.stream.streamed)"
    if state > plan.programs[0].temporary:
        return "give chips to the model axis, or the rules mesh.FULLY_SHARDED"
    return "accumulate gradients over smaller batches (accumulate), or more chips for the data axis"


def _by(sizes: Iterable[int]) -> str:
    return " x ".join(map(str, sizes))


def _bytes(size: float) -> str:
    for unit, name in ((GB, "GB"), (MB, "MB"), (KB, "kB")):
        if size >= unit:
            return (
                f"{size / unit:,.3g} {name}" if size < 1000 * unit else f"{size / unit:,.0f} {name}"
            )
    return f"{size:,.0f} B"


def _seconds(t: float) -> str:
    return f"{t * 1e3:,.3g} ms" if t >= 1e-3 else f"{t * 1e6:,.3g} us"
