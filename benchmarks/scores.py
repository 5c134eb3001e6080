"""Example scores: the gradients of a batch's examples in several ways, passes over a dataset."""

import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import plain, plain_scores, sides
from benchmarks.measure import Race, Result, race
from benchmarks.plain import CLASSES, Lap, Side
from dynamics import fit, models, population, step, task, watch
from dynamics import mesh as meshes
from dynamics.data.rows import subset, take
from dynamics.probes import Score
from dynamics.scores import el2n, grand, grand_last_layer, loss
from dynamics.types import Batch, Dataset, PyTree, Task, TrainState

REPLICAS = 10
THREADS = (1, 2)  # of PyTorch; the faster is compared with
BESIDE = {
    "forward": "forward passes",
    "batch": "the batch's gradient",
    "vmap": "vmap(grad)",
    "last": "GraNd of the last layer",
}
SCORES = {"ghost": grand, "forward": loss, "last": grand_last_layer}
TORCH = {"torch": "PyTorch's vmap(grad)", "torch_loop": "PyTorch, a backward an example"}


class Net(NamedTuple):
    """A net, a batch for it, and how often a lap goes each way to the norms or beside them."""

    name: str
    about: str
    task: Task
    state: TrainState
    batch: Batch
    calls: Mapping[str, int]
    layers: plain_scores.Layers = ()  # for PyTorch

    @property
    def size(self) -> int:
        """Examples."""
        return len(self.batch.index)


def grand_mlp(quick: bool) -> list[Result]:
    """Dense layers: never a gradient. Also beside PyTorch."""
    job, b = sides.mnist(), 8 if quick else 256
    if quick:
        job = job._replace(model=models.MLP(width=64, depth=2))
    calls = {"ghost": 100, "forward": 150, "batch": 40, "vmap": 1, "last": 150}
    calls |= {"torch": 1, "torch_loop": 1}
    net = _net("mlp", job.net().split(",")[0], job.task(), _batch(job.data, b), calls)
    params = net.state.params
    net = net._replace(layers=[(params[n]["kernel"], params[n]["bias"]) for n in sorted(params)])
    goals = {"forward": 3, "vmap": 0.1, "flops": 2.2, "memory": 0.05}
    return _rows(net, 1 if quick else 15, quick, goals)


def grand_convnet(quick: bool) -> list[Result]:
    """Convolutions, as a plain function. Also beside PyTorch."""
    channels, b = ((4, 4), 2) if quick else ((32, 32, 64, 64, 128, 128), 64)
    data = sides.noise(b, 32, 32, 3)
    job = plain.Plain(data.x, data.y, 128, 74, b, channels=channels)
    about = f"{len(channels)} convolutions, {'-'.join(map(str, channels))}"
    calls = {"ghost": 1, "forward": 8, "batch": 2, "vmap": 1, "torch": 1}
    layers = plain.params(job)
    made = task.of_function(plain_scores.convnet, init=lambda key: layers)
    net = _net("convnet", about, made, _batch(data, b), calls)
    return _rows(net._replace(layers=layers), 1 if quick else 9, quick, {"vmap": 0.667})


def grand_resnet(quick: bool) -> list[Result]:
    """ResNet-18, in which vmap(grad) writes 45 MB an example."""
    b = 2 if quick else 8 if jax.default_backend() == "cpu" else 64
    data = sides.noise(b, 8 if quick else 32, 8 if quick else 32, 3)
    config = models.ResNet(depth=8, width=4) if quick else models.ResNet(depth=18)
    made = task.of_dataset(models.make(config, CLASSES), data)
    calls = {"ghost": 1, "forward": 1, "batch": 1, "vmap": 1}
    net = _net("resnet", f"ResNet-{config.depth}", made, _batch(data, b), calls)
    return _rows(net, 1 if quick else 5, quick, {})


def grand_transformer(quick: bool) -> list[Result]:
    """Dense layers on sequences, embeddings, norms."""
    depth, width, length, b = (1, 16, 8, 2) if quick else (4, 128, 128, 16)
    config = models.Transformer(width=width, depth=depth, max_length=length)
    made = task.classification(models.make(config, 256), (length,), input_dtype=jnp.int32)
    draw = np.random.default_rng(0).integers(0, 256, (2, b, length)).astype(np.int32)
    batch = Batch(x=jnp.asarray(draw[0]), y=jnp.asarray(draw[1]), index=jnp.arange(b))
    calls = {"ghost": 1, "forward": 4, "batch": 2, "vmap": 1}
    about = f"Transformer {width} x {depth}, {length} tokens"
    return _rows(_net("transformer", about, made, batch, calls), 1 if quick else 11, quick, {})


def _net(name: str, about: str, made: Task, batch: Batch, calls: Mapping[str, int]) -> Net:
    params, extras = jax.jit(made.init)(jax.random.key(0), {})
    about = f"{about}, batch {len(batch.index)}"
    return Net(name, about, made, step.given(params, extras), batch, calls)


def _batch(data: Dataset, n: int) -> Batch:
    return jax.jit(take)(subset(data, slice(n)), jnp.arange(n))


def _rows(net: Net, rounds: int, quick: bool, goals: Mapping[str, float]) -> list[Result]:
    """GraNd by factored gradients beside every other way."""
    net = net._replace(calls=dict.fromkeys(net.calls, 1)) if quick else net
    programs: dict[str, Any] = {}
    ways, same = _ways(net), Same()
    runs = {way: _called(net, way, fn, programs, same) for way, fn in ways.items()}
    found = race(runs | _torch(net, same), rounds)
    ghost, out = ("ghost", net.calls["ghost"] * net.size), []
    for way in [w for w in BESIDE if w in ways]:
        theirs, note = (way, net.calls[way] * net.size), ""
        if way == "vmap":
            note = f"equal within {same.errors['vmap']:.1g}"
        what = f"GraNd / {BESIDE[way]}: {net.about}"
        name, more = f"grand_{net.name}_{way}", {"unit": "us/example", "note": note}
        out.append(found.compare(name, what, ghost, theirs, goal=goals.get(way), **more))
    return [*out, *_counted(net, programs, goals), *_beside_torch(net, found, same)]


def _ways(net: Net) -> dict[str, Callable[[TrainState, Batch], PyTree]]:
    """What is called: functions of a state and a batch."""
    evaluate = net.task.evaluate

    def by_vmap(state: TrainState, batch: Batch) -> jax.Array:
        def of_one(params: PyTree, example: Batch) -> jax.Array:
            alone = jax.tree.map(lambda x: x[None], example)
            return evaluate(params, state.extras, alone, state.hyperparameters).loss[0]

        return plain_scores.norms(of_one, state.params, batch)

    def gradient(state: TrainState, batch: Batch) -> PyTree:
        def mean(params: PyTree) -> jax.Array:
            return evaluate(params, state.extras, batch, state.hyperparameters).loss.mean()

        return jax.grad(mean)(state.params)

    ways = {name: functools.partial(score, net.task) for name, score in SCORES.items()}
    ways |= {"vmap": by_vmap, "batch": gradient}
    return {way: fn for way, fn in ways.items() if way in net.calls}


class Same:
    """Norms of one batch found in several ways, which must agree."""

    def __init__(self) -> None:
        self._first: np.ndarray | None = None
        self.errors: dict[str, float] = {}

    def check(self, way: str, norms: Any) -> None:
        """ValueError: further than rounding from what the first side found."""
        norms = np.asarray(norms)
        self._first = norms if self._first is None else self._first
        self.errors[way] = float(np.max(np.abs(norms / self._first - 1)))
        rounding = 1e-4 if jax.default_backend() == "cpu" else 1e-2  # products in TF32
        if not self.errors[way] <= rounding:
            raise ValueError(f"{way} differs from the others by {self.errors[way]:.2g}")


def _called(
    net: Net, way: str, fn: Callable[..., PyTree], programs: dict[str, Any], same: Same
) -> Side:
    """A program that is called and waited for, compiled in the first lap."""

    def run(lap: Lap) -> None:
        program = programs[way] = jax.jit(fn).lower(net.state, net.batch).compile()
        if way in ("ghost", "vmap"):
            same.check(way, program(net.state, net.batch))
        while True:
            for _ in range(net.calls[way]):
                jax.block_until_ready(program(net.state, net.batch))
            lap()

    return run


def _counted(net: Net, programs: dict[str, Any], goals: Mapping[str, float]) -> list[Result]:
    """What the compiler counts: no clock."""
    flops, temporary = {}, {}
    for way, program in programs.items():
        flops[way] = (program.cost_analysis() or {}).get("flops", 0) / 1e6
        temporary[way] = getattr(program.memory_analysis(), "temp_size_in_bytes", 0) / 1e6
    table = {
        "flops": ("compiled FLOPs, GraNd / a forward pass", flops, "forward", "MFLOP"),
        "memory": ("temporary memory, GraNd / vmap(grad)", temporary, "vmap", "MB"),
    }
    out = []
    for name, (what, counts, other, unit) in table.items():
        a, b, goal = counts["ghost"], counts[other], goals.get(name)
        name, what = f"grand_{net.name}_{name}", f"{what}: {net.about}"
        loops = any(" while(" in program.as_text() for program in programs.values())
        if not (a and b) or (unit == "MFLOP" and loops):
            why = "counts the body of a loop once" if a and b else "does not count"
            out.append(Result(name, what, goal=goal, skipped=f"the compiler {why}"))
            continue
        out.append(Result(name, what, a, b, unit, a / b, a / b, a / b, goal))
    return out


def _torch(net: Net, same: Same) -> dict[str, Side]:
    if _no_torch():
        return {}
    return {
        f"{way} {threads}": plain_scores.torch_norms(
            *(net.layers, net.batch.x, net.batch.y),
            together=way == "torch",
            threads=threads,
            calls=net.calls[way],
            check=functools.partial(same.check, way),
        )
        for way in TORCH
        if way in net.calls
        for threads in THREADS
    }


def _no_torch() -> str:
    """Why there is nothing to race with."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch  # pyright: ignore[reportMissingImports]

    on_cpu = jax.default_backend() == "cpu"
    return "" if on_cpu or torch.cuda.is_available() else "torch has no GPU here"


def _beside_torch(net: Net, found: Race, same: Same) -> list[Result]:
    out, ghost = [], ("ghost", net.calls["ghost"] * net.size)
    for way in [w for w in TORCH if w in net.calls]:
        name, what = f"grand_{net.name}_{way}", f"GraNd / {TORCH[way]}: {net.about}"
        if reason := _no_torch():
            out.append(Result(name, what, skipped=reason))
            continue
        best = found.fastest(*(side for side in found.seconds if side.startswith(f"{way} ")))
        note = f"{best.split()[-1]} thread(s), the faster of {THREADS}; "
        note += f"ours on 1 of {len(jax.devices())} devices; equal within {same.errors[way]:.1g}"
        theirs, more = (best, net.calls[way] * net.size), {"unit": "us/example", "note": note}
        out.append(found.compare(name, what, ghost, theirs, **more))
    return out


def dataset(quick: bool) -> list[Result]:
    """EL2N and GraNd of all examples by every replica, beside a bare forward pass of both."""
    job, k = sides.mnist(), 2 if quick else REPLICAS
    data = subset(job.data, slice(300)) if quick else job.data
    mesh, trained = meshes.for_population(k), job.task()
    keys, optimizer = jax.random.split(jax.random.key(0), k), sides.RULE.make(1)
    scalars = sides.RULE.hyperparameters()
    state = fit.init(trained, optimizer, keys, scalars, mesh)
    how = population.choose(jax.default_backend(), convolutional=False)
    context = watch.context(trained, mesh, {"train": data}, how)

    def scored(score: Callable) -> Side:
        probe = Score(score, every=1, name="score")

        def run(lap: Lap) -> None:
            while True:
                jax.block_until_ready(probe.measure(context, (), state))
                lap()

        return run

    layers = [(state.params[n]["kernel"], state.params[n]["bias"]) for n in sorted(state.params)]
    mean, std = float(data.mean.mean()), float(data.std.mean())
    bare = plain_scores.logits(layers, data.x, mean, std, Score.batch_size, mesh)
    found = race({"el2n": scored(el2n), "bare": bare, "grand": scored(grand)}, 1 if quick else 5)
    work, more = len(data) * k, {"unit": "us/example", "note": job.about}
    about = f"{k} x {job.net().split(',')[0]} on {mesh.size} devices, {len(data)} examples"
    what = f"EL2N through over_examples / bare jitted forward: {about}"
    sizes = ("el2n", work), ("bare", work), ("grand", work)
    return [
        found.compare("el2n_dataset", what, sizes[0], sizes[1], goal=1.3, **more),
        found.compare("grand_dataset", f"GraNd / EL2N: {about}", sizes[2], sizes[0], **more),
    ]
