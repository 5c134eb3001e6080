"""Devices: starting up, the mesh (replica, data, model), and what lies where on it.

The only file that names mesh axes. All meshes have Auto axis types: under Explicit ones
per-example gradients of convolutions fail.
"""

import dataclasses
import importlib.util
import logging
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from jax._src import xla_bridge
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxlib import xla_client

from dynamics import counts, hosts
from dynamics.types import Leaf, Lies, PyTree, TrainState

log = logging.getLogger(__name__)

AXES = ("replica", "data", "model")
NO_TPU = {  # what libtpu would ask the machine it is on, which has none
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling is no use of the TPU: several may at once
}
TPUS = {"v4": "2x2x1", "v5e": "4x4", "v5p": "4x4x4", "v6e": "4x4"}  # and the shape of a slice

YNN = "--xla_cpu_experimental_ynn_fusion_type="

Rule = Callable[[tuple[int, ...], Mesh], PartitionSpec]
Rules = Sequence[tuple[str, Rule]]
"""(regular expression over a leaf's path, rule): the first whose expression is found is used."""
Layout = Callable[[PyTree], PyTree]
"""``Task.layout``: how a task's extras lie."""


def _without_ynn_reductions() -> str:
    """Keep XLA from handing reductions on a CPU to YNNPACK: why that can't be done, "" if it is.

    YNNPACK's reductions (jaxlib 0.10.2) wait for threads of XLA's pool while they hold one: with
    batched linear algebra beside them a program of several devices stops for ever. Their maximum
    leaves NaN out. XLA's own cost a step no more than the noise of a benchmark (MLPs on digits and
    MNIST). A user's own choice in XLA_FLAGS stays. XLA reads these flags when jax starts, so they
    are set when this module is imported.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if given := re.findall(rf"{YNN}(\S*)", flags):
        kinds = given[-1].split(",")
        edits = kinds[0][:1] in ("+", "-")  # of the kinds that are on by default
        on = "-reduce" not in kinds if edits else "reduce" in kinds
        return f"XLA_FLAGS has {YNN}{given[-1]}" if on else ""
    if xla_bridge.backends_are_initialized():
        return "jax was started before dynamics.mesh was imported"
    os.environ["XLA_FLAGS"] = f"{flags} {YNN}-reduce".strip()
    return ""


_YNN_REDUCES = _without_ynn_reductions()


def start(*, cache: bool = True) -> None:
    """Prepare this process; call it before anything else touches jax.

    Joins the other processes where a cluster is detected (SLURM, Open MPI, Kubernetes, Cloud TPU)
    or the environment names them (JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES,
    JAX_PROCESS_ID), gives a CPU one device per core (JAX_NUM_CPU_DEVICES overrides), and keeps
    compiled programs in the user's cache folder. ``DYNAMICS_CACHE`` is the switch for that: a
    folder, or ``off``; so is ``cache``.
    """
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        mine = getattr(os, "sched_getaffinity", None)  # Linux only
        jax.config.update("jax_num_cpu_devices", len(mine(0)) if mine else os.cpu_count() or 1)
    folder = os.environ.get("DYNAMICS_CACHE") or str(_user_cache() / "training-dynamics" / "jax")
    if not cache:
        jax.config.update("jax_enable_compilation_cache", False)
    elif folder != "off":
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if _in_cluster() and not jax.distributed.is_initialized():
        jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is fit's to handle
        named = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
        given = {k: int(os.environ[v]) for k, v in named.items() if v in os.environ}
        jax.distributed.initialize(**given, shutdown_timeout_seconds=60)  # pyright: ignore
        hosts.join()


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _in_cluster() -> bool:
    """Whether jax would find other processes by itself."""
    several = any(
        int(os.environ.get(name, "1")) > 1
        for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "JAX_NUM_PROCESSES")
    )
    return (
        several or "JAX_COORDINATOR_ADDRESS" in os.environ or "TPU_WORKER_HOSTNAMES" in os.environ
    )


def make(
    replica: int = 1, data: int = 1, model: int = 1, *, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh of replica x data x model devices; ValueError if this machine has fewer.

    ``devices`` are those of another machine: see ``topology``.
    """
    sizes = dict(zip(AXES, (replica, data, model), strict=True))
    counts.check(**{f"mesh axis {name}": size for name, size in sizes.items()})
    there, needed = devices is not None, replica * data * model
    devices = jax.devices() if devices is None else devices
    if needed > len(devices):
        more = devices[0].platform == "cpu" and not there
        raise ValueError(
            f"mesh {sizes} needs {needed} devices, {'that' if there else 'this'} machine has "
            f"{len(devices)}{' (set JAX_NUM_CPU_DEVICES for more)' * more}"
        )
    if _YNN_REDUCES and needed > 1 and devices[0].platform == "cpu" and not there:
        log.warning(
            "%s: programs with linear algebra may stop for ever on several devices of a CPU. "
            "Import dynamics.mesh first, or set XLA_FLAGS=%s-reduce",
            *(_YNN_REDUCES, YNN),
        )
    if there:  # as they come: neighbours of a slice lie along the last axes
        grid = np.array(devices[:needed]).reshape(replica, data, model)
        return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)
    found = jax.make_mesh(
        (replica, data, model), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:needed]
    )
    if idle := set(range(hosts.count())) - {d.process_index for d in found.devices.flat}:
        raise ValueError(
            f"mesh {sizes} has no device of the processes {sorted(idle)} of {hosts.count()}: "
            f"a mesh of all {len(devices)} devices is needed (--mesh R D M)"
        )
    return found


def for_population(num_replicas: int, batch_size: int = 1) -> Mesh:
    """Replicas over as many devices as divide them evenly.

    Of several processes, all must have a part: the other devices split the batches.
    """
    available = len(jax.devices())
    used = max(r for r in range(1, available + 1) if num_replicas % r == 0)
    if hosts.count() > 1:
        used = max(r for r in range(1, used + 1) if num_replicas % r == 0 == available % r)
        return make(used, math.gcd(available // used, batch_size))
    if used < min(available, num_replicas):
        log.warning(
            "%d members divide over %d of %d devices; a multiple of %d would use all of them",
            *(num_replicas, used, available, available),
        )
    return make(used)


def topology(name: str) -> list[Any]:
    """The devices of a machine that is not here, to compile for: ``v5e:4x4``, ``cpu:64``.

    ValueError: none that is known, or no libtpu to compile with.
    """
    kind, _, size = name.partition(":")
    if kind == "cpu" and size.isdigit() and int(size) > 0:
        return list(xla_client.make_cpu_client(num_devices=int(size)).devices())
    if kind not in TPUS or not re.fullmatch(r"\d+(x\d+)+", size):
        raise ValueError(
            f"topology must be cpu:N or one of {', '.join(f'{k}:{v}' for k, v in TPUS.items())} "
            f"and other sizes of these, got {name!r}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"to compile for {name} install libtpu: pip install -e '.[tpu]'")
    before = os.environ.copy()
    os.environ.update(NO_TPU | before)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"libtpu has no topology {name!r}, like {TPUS[kind]} ({why})") from None
    finally:  # they would say that this machine is one of a cluster
        for variable in NO_TPU.keys() - before.keys():
            del os.environ[variable]


def is_elsewhere(mesh: Mesh) -> bool:
    """Whether its devices are of ``topology``, so that programs can be compiled but not run."""
    return mesh.devices.flat[0].client is not jax.devices()[0].client


def put(tree: PyTree, where: Any, mesh: Mesh) -> PyTree:
    """Arrays on the mesh; of a machine that is not here their shapes alone.

    Of several processes each copies to its own devices, from its own copy of the whole.
    """
    if is_elsewhere(mesh):
        return placed(tree, where)
    where = _over_all(where, tree)
    if hosts.count() == 1:
        return jax.device_put(tree, where)
    return jax.tree.map(_own_part, tree, where)


def _over_all(where: Any, tree: PyTree) -> PyTree:
    """A sharding for each leaf; where one is given for all, scalars (a clock) lie everywhere."""
    if not isinstance(where, NamedSharding):
        return where
    scalar = NamedSharding(where.mesh, PartitionSpec())
    return jax.tree.map(lambda x: where if np.ndim(x) else scalar, tree)


def _own_part(x: Any, where: NamedSharding) -> jax.Array:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.device_put(x, where)
    if isinstance(x, jax.Array) and jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _own_part(jax.random.key_data(x), where)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, where, lambda part: whole[part])


def own_block(where: NamedSharding, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The smallest block that holds what lies on this process's devices."""
    parts: list[Any] = list(where.addressable_devices_indices_map(shape).values())
    starts = [min(p[i].start or 0 for p in parts) for i in range(len(shape))]
    ends = [max(n if p[i].stop is None else p[i].stop for p in parts) for i, n in enumerate(shape)]
    return tuple(map(slice, starts, ends))


def from_block(block: np.ndarray, at: tuple[slice, ...], where: NamedSharding, shape: Any) -> Any:
    """An array of this shape of which each process has its ``own_block``."""
    if hosts.count() == 1:
        return jax.device_put(block, where)

    def part(index: Any) -> np.ndarray:
        places = zip(index, shape, at, strict=True)
        ends = [(*s.indices(n)[:2], mine.start) for s, n, mine in places]
        return block[tuple(slice(i - start, j - start) for i, j, start in ends)]

    return jax.make_array_from_callback(shape, where, part)


def fetch(tree: PyTree) -> PyTree:
    """Whole numpy arrays (keys: on one device); of several processes on each, all must call it."""

    def whole(x: Any) -> Any:
        if isinstance(x, jax.Array) and jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = whole(jax.random.key_data(x))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            mesh = x.sharding.mesh  # pyright: ignore[reportAttributeAccessIssue]
            x = jax.device_put(x, everywhere(mesh))
        return np.asarray(x)

    return jax.tree.map(whole, tree)


def placed(tree: PyTree, where: Any) -> PyTree:
    """The shapes of arrays, and where they would lie: one sharding, or a tree of them."""

    def shape(x: Any, lies: NamedSharding) -> jax.ShapeDtypeStruct:
        x = x if hasattr(x, "dtype") else np.asarray(x)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies)

    return jax.tree.map(shape, tree, _over_all(where, tree))


def shaped(state: PyTree, mesh: Mesh, rules: Rules, layout: Layout | None = None) -> PyTree:
    """The shapes of what lies with its replica, by ``shardings``."""
    return placed(state, shardings(state, mesh, rules, layout))


def check(mesh: Mesh, num_replicas: int, batch_size: int | None = None) -> None:
    """ValueError unless a population and its batches divide over the mesh."""
    if mesh.axis_names != AXES:
        raise ValueError(f"the mesh must have the axes {AXES}, got {mesh.axis_names}: mesh.make()")
    sizes = {"replica": ("the number of members", num_replicas)}
    if batch_size is not None:
        sizes["data"] = ("the (micro)batch size", batch_size)
    for axis, (what, size) in sizes.items():
        if size % mesh.shape[axis]:
            raise ValueError(
                f"{what} must be a multiple of the mesh's {axis} axis, {mesh.shape[axis]}, "
                f"got {size}"
            )


def replicas(mesh: Mesh) -> PartitionSpec:
    """Of anything whose first axis is the replica axis."""
    return PartitionSpec("replica")


def over_batches(mesh: Mesh) -> NamedSharding:
    """[K, steps, B, ...]: replicas and the examples of each batch over their axes."""
    return NamedSharding(mesh, PartitionSpec("replica", None, "data"))


def everywhere(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def over_replicas(mesh: Mesh) -> NamedSharding:
    """The first axis over the replica axis, the rest in one piece."""
    return NamedSharding(mesh, replicas(mesh))


def split_batch(tree: PyTree, mesh: Mesh) -> PyTree:
    """Inside the step: the leading axis of one replica's batch over the data axis."""
    if mesh.shape["data"] == 1:
        return tree
    spec = NamedSharding(mesh, PartitionSpec("data"))
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, spec), tree)


def must_wait(mesh: Mesh) -> bool:
    """Whether one program must end before the next begins: on a CPU (jax 0.10), several with
    collectives in flight can wait for each other for ever.
    """
    talks = mesh.size > mesh.shape["replica"] or hosts.count() > 1
    return talks and mesh.devices.flat[0].platform == "cpu"


def split_here(tree: PyTree) -> PyTree:
    """Inside a function of one replica: the leading axis over the data axis, if it divides."""
    parts = jax.sharding.get_abstract_mesh().shape.get("data", 1)

    def split(x: jax.Array) -> jax.Array:
        if parts == 1 or x.shape[0] % parts:
            return x
        return jax.lax.with_sharding_constraint(x, PartitionSpec("data"))

    return jax.tree.map(split, tree)


def whole_here(tree: PyTree) -> PyTree:
    """Inside a function of one replica: each leaf in one piece again."""
    if jax.sharding.get_abstract_mesh().shape.get("data", 1) == 1:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), tree)


# ---- what lies where: rules see a leaf of one replica -----------------------------------------


def replicated(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """A copy on every device of the data and model axes."""
    return PartitionSpec()


def last_over_model(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Output features over the model axis where they divide; else replicated."""
    if len(shape) >= 1 and shape[-1] % mesh.shape["model"] == 0:
        return PartitionSpec(*[None] * (len(shape) - 1), "model")
    return PartitionSpec()


def largest_over_data(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Fully sharded: features over model as above, the largest other axis over data."""
    axes: list[str | None] = [*last_over_model(shape, mesh)] or [None] * len(shape)
    free = [i for i, a in enumerate(axes) if a is None and shape[i] % mesh.shape["data"] == 0]
    if free:
        axes[max(free, key=lambda i: shape[i])] = "data"
    return PartitionSpec(*axes)


def table(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """An embedding: over model if there is such an axis, else over data, never both.

    XLA (jax 0.10 to 0.12) aborts the process on a lookup in a table that is split over both.
    """
    return (last_over_model if mesh.shape["model"] > 1 else largest_over_data)(shape, mesh)


def over_examples(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """A row for each example: over the data and model axes where they divide; else replicated.

    Over data alone, with a model axis beside it, XLA (jax 0.10) aborts on the step's gather.
    """
    parts = mesh.shape["data"] * mesh.shape["model"]
    return PartitionSpec() if shape[0] % parts else PartitionSpec(("data", "model"))


TENSOR_PARALLEL: Rules = (
    (r"kernel|embedding", last_over_model),
    (r"", replicated),
)
FULLY_SHARDED: Rules = (
    (r"embedding", table),
    (r"kernel|scale|bias", largest_over_data),
    (r"", replicated),
)


DECLARED: dict[Lies, Rule] = {"examples": over_examples, "replicated": replicated}


def shardings(
    state: PyTree, mesh: Mesh, rules: Rules = TENSOR_PARALLEL, layout: Layout | None = None
) -> PyTree:
    """A NamedSharding for every leaf of a population's state, by its path.

    Optimizer state and averages carry the path of the parameter they belong to, so one rule places
    all of them. ``layout`` is a task's, for what it declares of the extras of a TrainState (None:
    they lie by the rules, too). ValueError: no rule matches; a layout that is no prefix of the
    extras, or of other words than ``Lies``.
    """

    def place(path: tuple, leaf: Leaf, lies: Lies) -> NamedSharding:
        if leaf.ndim == 0:  # the clock of a population, which all members share
            return everywhere(mesh)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, rule in [("", DECLARED[lies])] if lies in DECLARED else rules:
            if re.search(pattern, name):
                spec = rule(tuple(leaf.shape[1:]), mesh)
                return NamedSharding(mesh, PartitionSpec("replica", *spec))
        raise ValueError(f"no sharding rule matches {name!r}; end the rules with ('', replicated)")

    words = jax.tree.map(lambda part: _words(part, layout), state, is_leaf=_is_state)
    return jax.tree_util.tree_map_with_path(place, state, words)


def _is_state(part: Any) -> bool:
    return isinstance(part, TrainState)


def _words(part: PyTree, layout: Layout | None) -> PyTree:
    """How each leaf lies, as a tree like the part's."""

    def spread(lies: Any, tree: PyTree) -> PyTree:
        if lies not in get_args(Lies):
            raise ValueError(f"a task's layout must be of {get_args(Lies)}, got {lies!r}")
        return jax.tree.map(lambda _: lies, tree)

    alike = spread("parameters", part)
    if layout is None or not _is_state(part):
        return alike
    return dataclasses.replace(alike, extras=jax.tree.map(spread, layout(part.extras), part.extras))
