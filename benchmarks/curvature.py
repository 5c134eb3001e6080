"""Curvature beside PyTorch's libraries, and what watching the sharpness adds to a run."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import sides
from benchmarks.measure import Race, Result, race
from benchmarks.plain import CLASSES, Lap, Side
from benchmarks.plain_curvature import Found, Net, Peer, densities, side, tops
from dynamics import curvature, models, task
from dynamics import mesh as meshes
from dynamics.data import subset
from dynamics.data.stream import whole
from dynamics.probes import Sharpness
from dynamics.types import Batch

PRODUCTS, STEPS, STRIDE = 20, 100, 2
SIZES = {"digits": (500, 32), "mnist": (1000, 128)}  # examples, width of two hidden layers
EVERY = 50


class Problem(NamedTuple):
    """A net of tanh some steps into training, and the examples its cross-entropy is the mean of."""

    net: Net | None  # for the peers
    operator: curvature.Operator
    about: str
    truth: float  # the largest eigenvalue, its residual below 1e-5 of it
    gradient: Callable[[], Any]


def curvature_digits(quick: bool) -> list[Result]:
    """An MLP of 3,466 parameters."""
    return _beside("digits", _mlp("digits", quick), quick, goal=1 / 3)


def curvature_mnist(quick: bool) -> list[Result]:
    """An MLP of 118,282 parameters."""
    return _beside("mnist", _mlp("digits" if quick else "mnist", quick), quick, goal=1 / 3)


def curvature_convnet(quick: bool) -> list[Result]:
    """Two convolutions, driven from outside: on a CPU they are slow in a compiled loop."""
    return _beside("convnet", _convnet(quick), quick, driven=True)


def curvature_transformer(quick: bool) -> list[Result]:
    """What a product costs in gradients, of attention and norms."""
    width, depth, length, n = (16, 1, 8, 2) if quick else (64, 2, 64, 16)
    config = models.Transformer(width=width, depth=depth, max_length=length)
    made = task.classification(models.make(config, 96), (length,), input_dtype=jnp.int32)
    drawn = np.random.default_rng(0).integers(0, 96, (2, n, length)).astype(np.int32)
    batch = Batch(x=jnp.asarray(drawn[0]), y=jnp.asarray(drawn[1]), index=jnp.arange(n))
    params, extras = jax.jit(made.init)(jax.random.key(0), {})
    mean = curvature.mean_loss(made)

    def loss(params: Any, batch: Batch) -> jax.Array:
        return mean(params, batch, extras, {})

    about = f"Transformer {width} x {depth}, {n} x {length} tokens"
    problem = _problem(loss, params, batch, None, about)
    found: dict[str, Found] = {}
    top = _ours(problem, found, "top", _top, PRODUCTS)
    raced = race({"top": top, "gradients": _gradients(problem)}, 1 if quick else 11)
    return [_product("transformer", problem, raced, found["top"])]


def sharpness_watched(quick: bool) -> list[Result]:
    """Full-batch training on digits with the sharpness every 50 steps, and without."""
    n, width = SIZES["digits"]
    data = sides.digits().data
    index = np.arange(40 if quick else n)
    data = subset(data, index)
    model = models.MLP(width=8 if quick else width, depth=2, activation="tanh")
    job = sides.Job(data, model, len(data), "digits")
    net, rounds, mesh, out = job.task(), 1 if quick else 15, meshes.for_population(1), []
    steps = 2 if quick else 4 * EVERY
    every = 1 if quick else EVERY
    for warm, goal in ((6, 0.35), (8, None)):
        probe = Sharpness(every, rule=sides.RULE, warm=warm)
        run = functools.partial(
            *(sides.through_fit, job, mesh, steps, rounds),
            net=net,
            change=lambda _: whole(data, 1),
            data={"train": data},
        )
        raced = race({"watched": run(probes=[probe]), "alone": run()}, rounds)
        both = raced.each("watched", steps) * 1e6, raced.each("alone", steps) * 1e6
        low, ratio, high = (float(q) for q in np.quantile(both[0] / both[1] - 1, (0.25, 0.5, 0.75)))
        added = float(np.median(both[0] - both[1]))
        out.append(
            Result(
                f"sharpness_watched_{warm}",
                f"what {warm} warm products every {every} full-batch steps add / a step: "
                f"{job.net()}",
                *(added, float(np.median(both[1])), "us/step", ratio, low, high, goal),
                rounds=len(both[0]),
                busy=raced.busy,
            )
        )
    return out


# ---- ours ---------------------------------------------------------------------------------------


def _beside(
    name: str, problem: Problem, quick: bool, *, goal: float | None = None, driven: bool = False
) -> list[Result]:
    """The largest eigenvalue and a density, and a product in gradients."""
    found: dict[str, Found] = {}
    steps = 5 if quick else STEPS
    ours = functools.partial(_ours, problem, found)
    density = functools.partial(_density, steps, driven)
    mine: dict[str, Side] = {
        "top": ours("top", _converged if driven else _top, 0 if driven else PRODUCTS),
        "density": ours("density", density(False), steps),
        "reorthogonalised": ours("reorthogonalised", density(True), steps),
        "gradients": _gradients(problem),
    }
    peers = {peer.about: peer for peer in [*tops(), *densities(steps)]}
    there = {n: side(peer, problem.net, found) for n, peer in peers.items() if not peer.missing}
    raced = race(mine | there, 1 if quick else 11)

    def row(label: str, what: str, mine: str, peer: Peer, goal: float | None) -> Result:
        title, short = f"{what} / {peer.about}: {problem.about}", f"{label}_{name}_{peer.package}"
        if peer.missing:
            return Result(short, title, goal=goal, skipped=peer.missing)
        note = ", theirs ".join(_said(found[n], problem.truth) for n in (mine, peer.about))
        return raced.compare(
            *(short, title, (mine, 1), (peer.about, 1)), unit="us", goal=goal, note=note
        )

    how = "until the residual is 1e-3" if driven else f"{PRODUCTS} products"
    found_by = f"largest eigenvalue, {how}"
    papyan, reorthogonalised = densities(steps)
    exact, loose = tops()[:2], tops()[2]
    return [
        *(row("top", found_by, "top", peer, goal) for peer in exact),
        row("top_loose", found_by, "top", loose, None),
        row("density", f"density, {steps} products", "density", papyan, goal),
        row(
            "density_reorthogonalised",
            f"density, {steps} products, reorthogonalised",
            *("reorthogonalised", reorthogonalised, goal and 1.0),
        ),
        *([] if driven else [_product(name, problem, raced, found["top"])]),
    ]


def _product(name: str, problem: Problem, raced: Race, found: Found) -> Result:
    title = f"a product of Lanczos / a gradient: {problem.about}"
    sizes = (("top", PRODUCTS), ("gradients", PRODUCTS))
    note = _said(found, problem.truth)
    return raced.compare(f"product_{name}", title, *sizes, unit="us", note=note)


def _said(found: Found, truth: float) -> str:
    count = f" by {found.products}" if found.products else ""
    return f"off by {found.largest / truth - 1:+.0e}{count}"


def _density(k: int, driven: bool, reorthogonalise: bool) -> Callable[..., jax.Array]:
    lanczos = curvature.drive.density if driven else curvature.density

    def largest(operator: curvature.Operator, key: jax.Array) -> jax.Array:
        found = lanczos(operator, key, num=1, k=k, reorthogonalise=reorthogonalise)
        return found.nodes.max()

    return largest if driven else jax.jit(largest)


def _mlp(name: str, quick: bool) -> Problem:
    """64-32-32-10 on 500 digits, or 784-128-128-10 on 1,000 of MNIST."""
    n, width = (40, 8) if quick else SIZES[name]
    data = (sides.digits() if name == "digits" else sides.mnist()).data
    sizes = (data.x[0].size, width, width, CLASSES)
    about = f"MLP {'-'.join(map(str, sizes))}, {n} examples"
    shapes = [tuple(sizes[i : i + 2]) for i in range(3)]
    return _trained(shapes, data.x[:n].reshape(n, -1), data.y[:n], about)


def _convnet(quick: bool) -> Problem:
    """Two 5 x 5 convolutions and a dense layer on 28 x 28."""
    n, (a, b) = (8, (2, 2)) if quick else (256, (8, 16))
    data = sides.mnist().data
    shapes = [(5, 5, 1, a), (5, 5, a, b), (4 * 4 * b, CLASSES)]
    about = f"convnet {a}-{b}, {n} examples"
    return _trained(shapes, data.x[:n].reshape(n, 28, 28, 1), data.y[:n], about)


def _trained(shapes: list[tuple[int, ...]], x: np.ndarray, y: np.ndarray, about: str) -> Problem:
    """A hundred steps of gradient descent from 1 / sqrt(fan_in)."""
    x = x.astype(np.float32)
    batch = jnp.asarray((x - x.mean()) / x.std()), jnp.asarray(y, jnp.int32)
    draw, step = np.random.default_rng(0), jax.jit(jax.value_and_grad(_loss))
    params = [
        (jnp.asarray(draw.normal(size=s) / np.prod(s[:-1]) ** 0.5, jnp.float32), jnp.zeros(s[-1]))
        for s in shapes
    ]
    for _ in range(100):
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, step(params, batch)[1])
    arrays = [(np.array(w), np.array(b)) for w, b in params]
    net = Net(arrays, STRIDE, np.array(batch[0]), np.array(batch[1]))
    return _problem(_loss, params, batch, net, about)


def _problem(
    loss: Callable[..., jax.Array], params: Any, batch: Any, net: Net | None, about: str
) -> Problem:
    operator = curvature.hessian(loss, params, curvature.cut(batch))
    found = curvature.converge(operator, jax.random.key(1), tolerance=1e-5, most=200)
    gradient = jax.jit(jax.value_and_grad(loss))
    return Problem(net, operator, about, float(found.values[0]), lambda: gradient(params, batch))


def _loss(params: list, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    (x, y), dims = batch, ("NHWC", "HWIO", "NHWC")
    for i, (w, b) in enumerate(params):
        x = jnp.tanh(x) if i else x
        if w.ndim == 4:
            x = jax.lax.conv_general_dilated(
                x, w, (STRIDE, STRIDE), "VALID", dimension_numbers=dims
            )
        else:
            x = x.reshape(len(x), -1) @ w
        x = x + b
    return -jnp.take_along_axis(jax.nn.log_softmax(x), y[:, None], axis=1).mean()


@jax.jit
def _top(operator: curvature.Operator, key: jax.Array) -> jax.Array:
    return curvature.sharpness(operator, key, k=PRODUCTS).value


def _converged(operator: curvature.Operator, key: jax.Array) -> jax.Array:
    return curvature.converge(operator, key).values[0]


def _ours(
    problem: Problem, found: dict[str, Found], name: str, fn: Callable[..., jax.Array], count: int
) -> Side:
    def run(lap: Lap) -> None:
        while True:
            largest = float(fn(problem.operator, jax.random.key(0)))
            found[name] = Found(largest, count)
            lap()

    return run


def _gradients(problem: Problem) -> Side:
    def run(lap: Lap) -> None:
        while True:
            for _ in range(PRODUCTS):
                found = problem.gradient()
            jax.block_until_ready(found)
            lap()

    return run
