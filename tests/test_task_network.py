"""What reads weights reads the module's own, of tasks that train or keep something else, too."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.flatten_util import ravel_pytree

from dynamics import (
    curvature,
    kernel,
    landscape,
    mesh,
    models,
    population,
    scores,
    step,
    task,
    watch,
)
from dynamics import representation as rep
from dynamics.models.transformer import TransformerModule
from dynamics.probes import Attention, Outputs, Path
from dynamics.task.multiscale import multiscale
from dynamics.types import Batch, Task, TrainState

D, N, C = 5, 40, 4
MLP = models.make(models.MLP(width=4, depth=1), C)
NORMED = models.make(models.Convnet(channels=(3,), norm="batch"), C)
TOKENS = models.Transformer(width=8, depth=1, num_heads=2, max_length=8)


@dataclass(frozen=True, eq=False)
class Subspace:
    """``inner`` at theta0 + P d, where d alone is trained: the smallest reparametrisation."""

    inner: Task
    theta0: jax.Array  # f32[p]
    basis: jax.Array  # f32[p, D]
    unravel: Any

    def weights(self, params: Any) -> Any:
        return self.unravel(self.theta0 + self.basis @ params["d"])

    def init(self, key: Any, hyperparameters: Any) -> Any:
        return {"d": jnp.zeros(D)}, self.inner.init(key, hyperparameters)[1]

    def loss(self, params: Any, extras: Any, batch: Any, key: Any, hyperparameters: Any) -> Any:
        return self.inner.loss(self.weights(params), extras, batch, key, hyperparameters)

    def evaluate(self, params: Any, extras: Any, batch: Any, hyperparameters: Any) -> Any:
        return self.inner.evaluate(self.weights(params), extras, batch, hyperparameters)

    def network(self, params: Any, extras: Any) -> Any:
        return self.inner.network(self.weights(params), extras)

    @property
    def bare(self) -> Task:
        return self.inner.bare or self.inner


def subspace(net: Task, d: Any = (0.3, -0.2, 0.5, 0.1, 0.4)) -> tuple[Any, TrainState, TrainState]:
    """The parts, a state in the subspace, and the plain one whose weights it stands for."""
    params, extras = net.init(jax.random.key(0), {})
    theta0, unravel = ravel_pytree(params)
    basis = jax.random.normal(jax.random.key(1), (len(theta0), D)) / 10
    parts = Subspace(net, theta0, basis, unravel)
    inside = {"d": jnp.asarray(d, jnp.float32)}
    extras = jax.tree.map(lambda x: x + 0.5, extras)
    plain = step.given(parts.weights(inside), extras)
    return parts, step.given(inside, extras), plain


def images(n: int = 6) -> Batch:
    data = tiny.images()
    x = (data.x[:n].astype(np.float32) - data.mean) / data.std
    return Batch(x=jnp.asarray(x), y=jnp.asarray(data.y[:n]), index=jnp.arange(n))


def close(found: Any, wanted: Any, rtol: float = 2e-5) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6)


HEAD = rep.of_layer(MLP, "head")
READERS = {
    "features": HEAD,
    "el2n": scores.el2n,
    "grand_last_layer": scores.grand_last_layer,
}


@pytest.mark.parametrize("name", READERS)
def test_a_subspace_is_read_as_the_weights_it_stands_for(name: str) -> None:
    net = task.of_dataset(MLP, tiny.images())
    parts, inside, plain = subspace(net)
    found = READERS[name](task.of_methods(parts), inside, images())
    close(found, READERS[name](net, plain, images()))
    start = READERS[name](net, step.given(parts.unravel(parts.theta0)), images())
    assert np.abs(np.asarray(found - start)).max() > 1e-3  # d matters


@pytest.mark.parametrize("wrap", ["subspace", "elr", "elr_plus", "z_loss", "elr of z_loss"])
def test_gradients_by_the_modules_own_parameters(wrap: str) -> None:
    """``read`` is the plain task at the plain weights, for everything that differentiates."""
    net = task.of_dataset(MLP, tiny.images())
    parts, inside, plain = subspace(net)
    made, state = {
        "subspace": lambda: (task.of_methods(parts), inside),
        "elr": lambda: wrapped(task.elr(net, N, C), plain),
        "elr_plus": lambda: wrapped_plus(task.elr_plus(net, N, C), plain, "first"),
        "z_loss": lambda: wrapped(task.z_loss(net), plain),
        "elr of z_loss": lambda: wrapped(task.elr(task.z_loss(net), N, C), plain),
    }[wrap]()
    own, read = made.read(state)
    assert jax.tree.structure(read.params) == jax.tree.structure(plain.params)
    assert read.extras == plain.extras == {}
    batch = images()
    close(scores.grand(own, read, batch), scores.grand(net, plain, batch))
    close(kernel.ntk(own, read, batch), kernel.ntk(net, plain, batch))
    close(scores.grand_last_layer(made, state, batch), scores.grand_last_layer(net, plain, batch))
    cut = jax.tree.map(lambda x: x[None], batch)
    mask = curvature.select(plain.params, "head")
    ops = [curvature.of_task(*pair, cut, mask=mask) for pair in ((own, read), (net, plain))]
    v = jax.tree.map(jnp.ones_like, ops[0].like)
    close(ops[0](v), ops[1](v))


def wrapped(made: Task, plain: TrainState) -> tuple[Task, TrainState]:
    """A state of a task with extras of its own, at these weights."""
    extras = made.init(jax.random.key(0), {})[1]
    return made, dataclasses.replace(plain, extras=extras)


def wrapped_plus(made: Task, plain: TrainState, net: str) -> tuple[Task, TrainState]:
    params, extras = made.init(jax.random.key(0), {})
    return made, dataclasses.replace(plain, params=params | {net: plain.params}, extras=extras)


def test_gradients_of_a_task_are_by_what_it_trains() -> None:
    """By d they are P' times those by the weights."""
    net = task.of_dataset(MLP, tiny.images())
    parts, inside, plain = subspace(net)
    made, batch = task.of_methods(parts), images()

    def by_weights(i: int) -> jax.Array:
        one = jax.tree.map(lambda x: x[i][None], batch)
        loss = lambda w: net.evaluate(w, {}, one, {}).loss[0]  # noqa: E731
        return parts.basis.T @ ravel_pytree(jax.grad(loss)(plain.params))[0]

    slopes = jnp.stack([by_weights(i) for i in range(6)])
    close(scores.grand(made, inside, batch), jnp.linalg.norm(slopes, axis=1))
    assert kernel.ntk(made, inside, batch).shape == (6, C, 6, C)
    cut = jax.tree.map(lambda x: x[None], batch)
    ones = {"d": jnp.ones(D)}
    found = curvature.of_task(made, inside, cut)(ones)
    theta = parts.unravel(parts.basis @ ones["d"])
    wanted = curvature.of_task(net, plain, cut)(theta)
    close(found["d"], parts.basis.T @ ravel_pytree(wanted)[0], rtol=1e-4)


def test_the_second_network_is_read_by_its_name() -> None:
    net = task.of_dataset(MLP, tiny.images())
    _, _, plain = subspace(net)
    wanted = HEAD(net, plain, images())
    for reads in ("first", "second"):
        made, state = wrapped_plus(task.elr_plus(net, N, C, reads=reads), plain, reads)
        close(HEAD(made, state, images()), wanted)
        other = task.elr_plus(net, N, C, reads="second" if reads == "first" else "first")
        assert np.abs(np.asarray(HEAD(other, state, images()) - wanted)).max() > 1e-3
    make: Any = getattr(task.elr_plus, "__wrapped__", task.elr_plus)
    with pytest.raises(ValueError, match=r"reads must be one of \('first', 'second'\), got 'both'"):
        make(net, N, C, reads="both")


def test_extras_of_the_module_alone_come_through() -> None:
    """Batch statistics, and no targets, averages or counts."""
    net = task.of_dataset(NORMED, tiny.images())
    params, extras = net.init(jax.random.key(0), {})
    for made in (task.elr(net, N, C), task.z_loss(task.elr(net, N, C)), multiscale(net)):
        given = made.init(jax.random.key(0), {})
        found = made.network(*given)
        assert jax.tree.structure(found) == jax.tree.structure((params, extras))
        NORMED.apply({"params": found[0], **found[1]}, images().x, train=False)
    given = task.elr_plus(net, N, C).init(jax.random.key(0), {})
    found = task.elr_plus(net, N, C).network(*given)
    assert jax.tree.structure(found) == jax.tree.structure((params, extras))
    assert net.network(params, extras) == (params, extras)
    assert multiscale(net).bare is None
    assert multiscale(task.elr(net, N, C)).bare == multiscale(net)


def test_probes_of_a_transformer() -> None:
    module, data = TransformerModule(TOKENS, 8), tiny.tokens(3)
    net = task.of_dataset(module, data)
    parts, inside, plain = subspace(net)
    for probe in (Attention(module, 1), Outputs(module, 1)):
        found, wanted = (
            probe.measure(
                watch.context(made, mesh.make(), {"test": data}), (), population.broadcast(state, 1)
            )[1]
            for made, state in ((task.of_methods(parts), inside), (net, plain))
        )
        close(found, wanted)


# ---- batch statistics are re-estimated, tables and subspaces stay --------------------------------


def one_of_two(state: TrainState) -> TrainState:
    return population.broadcast(state, 2)


each = watch.each_member(mesh.make(), "vmap")


@pytest.mark.parametrize("wrap", ["subspace", "elr", "elr_plus"])
def test_statistics_of_any_task(wrap: str) -> None:
    net = task.of_dataset(NORMED, tiny.images())
    parts, inside, plain = subspace(net)
    h = {"elr_lambda": jnp.float32(0.0), "elr_beta": jnp.float32(0.7)}
    plain, batches = dataclasses.replace(plain, hyperparameters=h), [images(), images()]
    wanted = landscape.reestimated(net, one_of_two(plain), batches, each).extras
    if wrap == "subspace":
        made, state = task.of_methods(parts), dataclasses.replace(inside, hyperparameters=h)
    elif wrap == "elr":
        made = task.elr(net, N, C)
        table = {"targets": jnp.ones((256, C))}
        state = dataclasses.replace(plain, extras=plain.extras | table)
    else:
        made, state = wrapped_plus(task.elr_plus(net, N, C), plain, "first")
    assert landscape.has_statistics(made, one_of_two(state))
    found = landscape.reestimated(made, one_of_two(state), batches, each)
    assert jax.tree.structure(found) == jax.tree.structure(one_of_two(state))
    if wrap == "elr_plus":  # each network sees its half, mixed
        assert (np.asarray(found.extras["targets"]["first"]) == 0).all()
        before, after = (made.network(s.params, s.extras)[1] for s in (one_of_two(state), found))
        assert (np.asarray(before["batch_stats"]["norm_0"]["mean"]) == 0).all()
        assert (np.asarray(after["batch_stats"]["norm_0"]["mean"]) != 0).any()
        return
    close(made.network(found.params, found.extras)[1] if wrap == "elr" else found.extras, wanted)
    if wrap == "elr":
        np.testing.assert_array_equal(found.extras["targets"], 1)


def test_a_table_is_no_batch_statistic() -> None:
    """A path between runs under ELR of a network without statistics needs no training data."""
    p = tiny.problem("mlp", num_steps=2)
    p = p._replace(task=task.elr(p.task, N, C))
    scalars: dict[str, Any] = {"elr_lambda": 1.0, "elr_beta": 0.7}
    found = tiny.run(p, mesh.make(), 2, changed=scalars, probes=[Path(2, points=3)])
    assert found.arrays["path", "loss"].at(step=2).values.shape == (2, 2, N)
    state = tiny.start(p, mesh.make(), 2, **scalars)
    assert landscape.reestimated(p.task, state, [], each) is state
