"""Populations: one function over members, one clock, members as values, given starts."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.extend.core import jaxprs_in_params

from dynamics import fit, mesh, models, population, step, task
from dynamics.chunk import Chunk
from dynamics.types import TrainState

WAYS = ("vmap", "map", "dispatch")
K = 4


def members(k: int = K, at: int = 3, seed: int = 0) -> TrainState:
    """A population at step ``at`` whose members differ in every leaf but the clock."""
    draw = np.random.default_rng(seed)
    params = {"w": draw.normal(size=(k, 3, 2)), "b": draw.normal(size=(k, 2))}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    keys = jax.random.split(jax.random.key(seed), k)
    states = jax.vmap(lambda params, key: step.given(params, key=key))(params, keys)
    scalars = {"learning_rate": jnp.asarray(draw.uniform(size=k), jnp.float32)}
    return dataclasses.replace(states, step=jnp.int32(at), hyperparameters=scalars)


def assert_same(found: Any, wanted: Any, **close: float) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, **{"rtol": 1e-6, "atol": 1e-6} | close)


def run(fn: Any, here: mesh.Mesh, how: Any, own: Any, *shared: Any) -> Any:
    """``fn`` over all members; dispatched, each piece is a call."""
    spread = jax.jit(population.spread(fn, here, how))
    if how != "dispatch":
        return spread(own, *shared)
    return population.join([spread(part, *shared) for part in population.split(own, here)])


# ---- a function over members --------------------------------------------------------------------


def moved(own: Any, by: Any) -> Any:
    """States in several places, in and out, and one that is made on the way."""
    first, (second, x) = own["one"], own["more"]["pair"]
    assert first.step.shape == second.step.shape == () and x.shape == (5,)
    grown = jax.lax.cond(first.step % 2 == 1, lambda w: w * by, lambda w: w - by, first.params["w"])
    after = dataclasses.replace(first, step=first.step + 2, params={**first.params, "w": grown})
    made = step.given({"sum": x.sum() + second.params["w"].sum()}, key=second.key)
    return {
        "deep": [{"after": after}, (x * second.hyperparameters["learning_rate"],)],
        "made": dataclasses.replace(made, step=first.step + second.step),
        "plain": first.params["b"] + second.params["b"],
    }


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("devices", [1, 2])
def test_states_anywhere_have_one_clock(how: Any, devices: int) -> None:
    here = mesh.make(devices)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(K, 5)), jnp.float32)
    own = {"one": members(at=3), "more": {"pair": (members(at=5, seed=1), x)}}
    found = run(moved, here, how, own, jnp.float32(3))
    assert found["deep"][0]["after"].step == 5 and found["made"].step == 8
    assert found["deep"][0]["after"].step.shape == found["made"].step.shape == ()
    for k in range(K):
        wanted = moved(population.take(own, k), jnp.float32(3))
        assert_same(population.take(found, k), wanted)


@pytest.mark.parametrize("how", WAYS)
def test_a_population_of_one_is_one(how: Any) -> None:
    own = {"one": members(1), "more": {"pair": (members(1, seed=1), jnp.ones((1, 5)))}}
    found = run(moved, mesh.make(), how, own, jnp.float32(3))
    assert_same(population.take(found, 0), moved(population.take(own, 0), jnp.float32(3)))


def stepped(own: Any, by: Any) -> Any:
    """``((state, rest)) -> (state, out)``, as a chunk of steps is."""
    state, rest = own
    w = state.params["w"] * by + rest["offset"]
    after = dataclasses.replace(state, step=state.step + 1, params={**state.params, "w": w})
    return after, {"norm": jnp.sqrt((w**2).sum()), "at": state.step}


def test_in_place_is_the_same_to_the_bit() -> None:
    own = (members(), {"offset": jnp.arange(K, dtype=jnp.float32)})
    room = {"norm": jnp.zeros(()), "at": jnp.int32(0)}
    shapes = jax.eval_shape(lambda: room)
    for devices in (1, 2):
        here = mesh.make(devices)
        plain = jax.jit(population.spread(stepped, here, "map"))(own, jnp.float32(2))
        placed = jax.jit(population.spread(stepped, here, "map", carried=shapes))
        assert_same(placed(own, jnp.float32(2)), plain, rtol=0, atol=0)
        assert plain[0].step == 4 and plain[0].step.shape == ()
        np.testing.assert_array_equal(plain[1]["at"], [3] * K)


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_join_undoes_split(devices: int) -> None:
    here, tree = mesh.make(devices), {"state": members(), "x": jnp.arange(K * 2).reshape(K, 2)}
    parts = population.split(tree, here)
    assert len(parts) == K // devices
    assert all(population.size(part["state"]) == devices for part in parts)
    assert all(part["state"].step.shape == () for part in parts)
    assert_same(population.join(parts), tree, rtol=0, atol=0)


def names(jaxpr: Any, inside: tuple[str, ...] = ()) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(primitive, those it is inside of) of every equation."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name = eqn.primitive.name
        yield name, inside
        for sub in jaxprs_in_params(eqn.params):
            yield from names(sub, (*inside, name))


def test_a_cond_on_the_clock_stays_one() -> None:
    """In the population's program there is one branch or the other, never both and a choice."""

    def some(state: TrainState) -> Any:
        w = state.params["w"]
        return jax.lax.cond(jax.lax.rem(state.step, 3) == 0, jnp.sin, jnp.cos, w)

    here = mesh.make()
    for how in ("vmap", "map"):
        found = [*names(jax.make_jaxpr(population.spread(some, here, how))(members()))]
        assert [name for name, _ in found].count("cond") == 1
        assert "select_n" not in [name for name, _ in found]
        assert all("cond" in inside for name, inside in found if name in ("sin", "cos"))
    # the control: a clock for each member becomes a choice between what both made
    own = dataclasses.replace(members(), step=jnp.full(K, 3))
    both = [name for name, _ in names(jax.make_jaxpr(jax.vmap(some))(own))]
    assert "cond" not in both and {"sin", "cos", "select_n"} <= set(both)


def seldom() -> optax.GradientTransformationExtraArgs:
    """Something dear every third step."""

    def update(updates: Any, state: Any, params: Any = None, *, step: Any) -> Any:
        dear = lambda u: jax.tree.map(lambda x: -jnp.tanh(x), u)  # noqa: E731
        cheap = lambda u: jax.tree.map(lambda x: -0.1 * x, u)  # noqa: E731
        return jax.lax.cond(step % 3 == 0, dear, cheap, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


@pytest.mark.parametrize("how", ["vmap", "map"])
def test_an_optimizers_cond_on_the_clock_stays_one_in_the_chunk(how: Any) -> None:
    p, here = tiny.problem("mlp"), mesh.make()
    state = fit.init(p.task, seldom(), jax.random.split(jax.random.key(0), K), {}, here)
    chunk = Chunk(p.task, seldom(), state, tiny.batches(p, K), here, how=how)
    trace = jax.make_jaxpr(chunk.program.loop)
    found = [*names(trace(state, (chunk.own, ()), np.int32(1), chunk.shared))]
    assert ("tanh", True) in {(name, "cond" in inside) for name, inside in found}
    assert ("tanh", False) not in {(name, "cond" in inside) for name, inside in found}


# ---- members as values --------------------------------------------------------------------------


def test_take() -> None:
    state = members()
    one = population.take(state, 2)
    assert one.step == 3 and one.key.shape == () and one.params["w"].shape == (3, 2)
    np.testing.assert_array_equal(one.params["w"], state.params["w"][2])
    some = population.take(state, [3, 1, 1])
    assert population.size(some) == 3 and some.step.shape == ()
    for i, k in enumerate((3, 1, 1)):
        assert_same(population.take(some, i), population.take(state, k), rtol=0, atol=0)
    assert_same(population.take(state, np.array([3, 1, 1])), some, rtol=0, atol=0)
    pair = population.take({"s": state, "x": jnp.arange(K)}, [0, 2])
    assert pair["s"].step == 3 and pair["x"].tolist() == [0, 2]


def test_broadcast_and_concatenate() -> None:
    state = members()
    one = population.take(state, 1)
    wide = population.broadcast(one, 3)
    assert population.size(wide) == 3 and wide.step.shape == ()
    for k in range(3):
        assert_same(population.take(wide, k), one, rtol=0, atol=0)
    parts = [population.take(state, some) for some in ([0], [1, 2], [3])]
    assert_same(population.concatenate(parts), state, rtol=0, atol=0)
    assert population.size(population.concatenate([wide, state])) == 7
    later = dataclasses.replace(state, step=jnp.int32(9))
    with pytest.raises(ValueError, match=r"different steps can't be one population, got \[3, 9\]"):
        population.concatenate([state, later])


def test_members_taken_out_of_a_population_train_as_they_would_in_it() -> None:
    """To the bit, with ``map``: the whole, two of its members, and two put together again."""
    p, here = tiny.problem("mlp", num_steps=12), mesh.make()
    rates = np.array([0.01, 0.02, 0.05, 0.1], np.float32)
    half = p._replace(num_steps=5)
    state = tiny.run(half, here, K, changed={"learning_rate": rates}, how="map").state
    whole = tiny.run(p, here, K, state=state, how="map")
    assert whole.state.step == 12
    some = tiny.run(p, here, 2, state=population.take(state, [3, 1]), how="map")
    assert_same(some.state, population.take(whole.state, [3, 1]), rtol=0, atol=0)
    for i, k in enumerate((3, 1)):
        mine = some.rows.filter(some.rows["member"] == i)["loss"]
        assert mine.equals(whole.rows.filter(whole.rows["member"] == k)["loss"])
    apart = [population.take(state, [2]), population.take(state, [0])]
    both = tiny.run(p, here, 2, state=population.concatenate(apart), how="map")
    assert_same(both.state, population.take(whole.state, [2, 0]), rtol=0, atol=0)


# ---- given starts -------------------------------------------------------------------------------


def init(net: Any, k: int = 2, seed: int = 0, **given: Any) -> TrainState:
    keys = jax.random.split(jax.random.key(seed), k)
    return fit.init(net, optax.adam(1e-3), keys, {}, mesh.make(), **given)


def net(width: int = 8, depth: int = 2) -> Any:
    return task.of_dataset(models.make(models.MLP(width=width, depth=depth), 4), tiny.images())


def test_members_start_from_given_weights() -> None:
    """All alike, or each its own; everything else is as without."""
    own, other = init(net()), init(net(), seed=1)
    one = population.take(other, 1).params
    alike, each = init(net(), params=one), init(net(), params=other.params)
    for k in range(2):
        assert_same(population.take(alike, k).params, one, rtol=0, atol=0)
    assert_same(each.params, other.params, rtol=0, atol=0)
    for state in (alike, each):
        rest = dataclasses.replace(state, params=own.params)
        assert_same(rest, own, rtol=0, atol=0)
    numpy = jax.tree.map(lambda x: np.asarray(x, np.float64), other.params)
    assert_same(init(net(), params=numpy).params, other.params, rtol=0, atol=0)  # in their type


def test_members_start_from_a_part_of_given_weights() -> None:
    own, other = init(net()), init(net(), seed=1)
    first, *_, head = sorted(own.params)
    kernel = {"net": {"encoder": population.take(other, 0).params[first]}}
    found = init(net(), params=kernel, paths={first: "net/encoder"})
    for k in range(2):
        mine = population.take(found, k).params
        assert_same(mine[first], population.take(other, 0).params[first], rtol=0, atol=0)
    assert_same(found.params[head], own.params[head], rtol=0, atol=0)
    leaf = init(net(), params=other.params, paths={f"{head}/kernel": f"{head}/kernel"})
    assert_same(leaf.params[head]["kernel"], other.params[head]["kernel"], rtol=0, atol=0)
    assert_same(leaf.params[head]["bias"], own.params[head]["bias"], rtol=0, atol=0)
    assert_same(leaf.params[first], own.params[first], rtol=0, atol=0)
    assert_same(init(net(), params=other.params, paths={}), own, rtol=0, atol=0)


def test_given_weights_that_do_not_fit_are_refused() -> None:
    own = init(net())
    first, *_, head = sorted(own.params)
    without = {name: tree for name, tree in own.params.items() if name != head}
    with pytest.raises(ValueError, match=f"must have the task's paths, '{head}/bias' is in one of"):
        init(net(), params=without)
    with pytest.raises(ValueError, match="'more' is in one of the two alone: say with paths"):
        init(net(), params={**own.params, "more": jnp.ones(2)})
    with pytest.raises(ValueError, match="the task has no parameters at 'encoder', it has"):
        init(net(), params=own.params, paths={"encoder": first})
    with pytest.raises(ValueError, match="params has nothing at 'encoder/bias', it has"):
        init(net(), params=own.params, paths={first: "encoder"})
    message = rf"params at '{first}/bias' must have shape \(8,\), or \(2, 8\) for each member"
    with pytest.raises(ValueError, match=message):
        init(net(), params=init(net(), 3).params)
    with pytest.raises(ValueError, match=rf"{message} its own, got \(2, 6\)"):
        init(net(), params=init(net(width=6)).params, paths={first: first})
    for paths in ({first: first}, None):
        half = first[: len(first) - 1]
        with pytest.raises(ValueError, match=f"no parameters at '{half}'"):  # no part of a name
            init(net(), params=own.params, paths={half: first, **(paths or {})})
    with pytest.raises(ValueError, match="learning_rate must be one number or 2"):
        keys = jax.random.split(jax.random.key(0), 2)
        fit.init(net(), optax.sgd(0.1), keys, {"learning_rate": np.ones(3)}, mesh.make())
    with pytest.raises(ValueError, match="give the weights that paths are of"):
        init(net(), paths={first: first})
