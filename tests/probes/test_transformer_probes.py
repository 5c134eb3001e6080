"""What foretells instability, against a transformer in float64 and by its own definitions."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from references import transformer as reference

from dynamics import fit, mesh, models, optim, task, watch
from dynamics.data.rows import subset
from dynamics.models.transformer import TransformerModule
from dynamics.optim.adam import last_update
from dynamics.probes import Attention, Evaluate, Outputs, Updates
from dynamics.probes.transformer import attention_logits, entropy, rms

DATA = subset(tiny.tokens(), slice(3))
SHAPE = {"depth": 2, "num_heads": 2}
CHOSEN = ("block_0/mlp/up/kernel", "block_1/attention/query/kernel")
SCALARS = {"learning_rate": 0.1, "momentum": 0.9, "second_moment": 0.95, "epsilon": 1e-8}


@functools.cache
def problem(qk_norm: bool = False) -> Any:
    """Two replicas of a transformer with norms that scale, and the probes' numbers of each."""
    config = models.Transformer(width=8, max_length=8, qk_norm=qk_norm, init_scale=2.0, **SHAPE)
    module = TransformerModule(config, 8)
    net = task.of_dataset(module, DATA)
    rule = optim.Adam(learning_rate=0.02)
    optimizer = rule.make(5)
    keys = jax.random.split(jax.random.key(1), 2)
    state = fit.init(net, optimizer, keys, rule.hyperparameters(), mesh.make())
    rng = np.random.default_rng(0)
    other = lambda x: x + jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype)  # noqa: E731
    state = dataclasses.replace(state, params=jax.tree.map(other, state.params))
    context = watch.context(net, mesh.make(), {"test": DATA})
    found: dict[str, np.ndarray] = {}
    probes = [Attention(module, 1), Outputs(module, 1), Updates(CHOSEN, 1)]
    for probe in probes[: 1 if qk_norm else 3]:  # the others see nothing of the norms
        carry, metrics = probe.measure(context, probe.start(context, state), state)
        assert carry == ()
        found |= {f"{probe.name}.{name}": np.asarray(v) for name, v in metrics.items()}
    return state, found


def problem_module() -> TransformerModule:
    """The module of the tiny transformer."""
    return TransformerModule(models.Transformer(width=8, depth=1, num_heads=2, max_length=8), 8)


def params_of(state: Any, replica: int) -> Any:
    return jax.tree.map(lambda x: np.asarray(x[replica], np.float64), state.params)


@pytest.mark.parametrize("replica", [0, 1])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_and_outputs(qk_norm: bool, replica: int) -> None:
    state, found = problem(qk_norm)
    params = params_of(state, replica)
    logits, last, heads = reference.forward(params, DATA.x, qk_norm=qk_norm, **SHAPE)
    wanted = {}
    if not qk_norm:
        wanted["outputs.log_z"] = reference.log_z(logits).mean()
        wanted["outputs.rms"] = np.sqrt((last**2).mean())
    for i, (query, key) in enumerate(heads):
        wanted[f"attention.max_logit_{i}"] = reference.max_logit(query, key)
        wanted[f"attention.entropy_{i}"] = reference.entropy(query, key)
    wanted["attention.max_logit"] = max(wanted[f"attention.max_logit_{i}"] for i in range(2))
    assert wanted.keys() == {n for n in found if n.startswith(("attention", "outputs"))}
    for name, value in wanted.items():
        assert found[name].shape == (2,)
        np.testing.assert_allclose(found[name][replica], value, rtol=1e-4, err_msg=name)


def test_the_gradient_is_that_of_the_mean_loss() -> None:
    """Central differences of the reference in float64, parameter by parameter."""
    state, found = problem()
    params = params_of(state, 0)
    for name in CHOSEN:
        leaf = functools.reduce(lambda tree, part: tree[part], name.split("/"), params)
        slopes = []
        for place in np.ndindex(*leaf.shape):
            value, ends = leaf[place], []
            for moved in (value + 1e-5, value - 1e-5):
                leaf[place] = moved
                ends.append(reference.loss(params, DATA.x, DATA.y, qk_norm=False, **SHAPE))
            leaf[place] = value
            slopes.append((ends[0] - ends[1]) / 2e-5)
        wanted = np.sqrt(np.mean(np.square(slopes)))
        np.testing.assert_allclose(found[f"sizes.grad_{name}"][0], wanted, rtol=1e-4)
        assert f"sizes.update_{name}" not in found  # no step was done


def test_logits_are_float32_when_activations_are_not() -> None:
    query = jnp.full((1, 1, 1, 3), 1 + 2**-7, jnp.bfloat16)  # exact in bfloat16, its square not
    found = attention_logits(query, query)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, 3 * (1 + 2**-7) ** 2 / np.sqrt(3), rtol=1e-6)


def test_what_comes_after_is_not_seen() -> None:
    """The largest product is with a later key: it is masked, not the maximum."""
    query = jnp.ones((1, 3, 1, 1))
    key = jnp.float32([1.0, 5.0, 100.0])[None, :, None, None]
    found = np.asarray(attention_logits(query, -key))[0, 0]
    np.testing.assert_array_equal(
        found, [[-1, -np.inf, -np.inf], [-1, -5, -np.inf], [-1, -5, -100]]
    )
    assert found.max() == -1


@pytest.mark.parametrize(
    ("logits", "wanted"),
    [
        ([0.0, 0.0, 0.0, 0.0], np.log(4)),
        ([7.0, 7.0, -np.inf, -np.inf], np.log(2)),
        ([1e6, 0.0, 0.0, 0.0], 0.0),
        ([3.0, -np.inf, -np.inf, -np.inf], 0.0),
    ],
)
def test_entropy(logits: list[float], wanted: float) -> None:
    assert float(entropy(jnp.float32(logits))) == pytest.approx(wanted, abs=1e-6)


def test_rms_does_not_overflow_where_its_input_is_narrow() -> None:
    assert float(rms(jnp.full(8, 3e2, jnp.float16))) == pytest.approx(3e2)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_delta_is_adams_update_of_the_gradients_so_far(clip: float) -> None:
    """And what the optimizer subtracts, divided by its rate; of clipped gradients, if they are."""
    rule = optim.Adam(clip_norm=clip, **SCALARS)
    optimizer = rule.make(4)
    rng, w = np.random.default_rng(0), {"w": jnp.ones(6)}
    gradients = [rng.normal(size=6) for _ in range(4)]
    h = {name: jnp.float32(v) for name, v in rule.hyperparameters().items()}
    opt_state, updates = optimizer.init(w), w
    for g in gradients:
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(
                {"w": jnp.float32(g)}, opt_state, w, hyperparameters=h
            )
    found = np.asarray(last_update(opt_state, h)["w"])
    cut = [g * min(1.0, (clip or np.inf) / np.linalg.norm(g)) for g in gradients]
    names = ("momentum", "second_moment", "epsilon")
    wanted = reference.delta(cut, **{name: SCALARS[name] for name in names})
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    np.testing.assert_allclose(found, -np.asarray(updates["w"]) / 0.1, rtol=1e-5)


def test_what_the_probes_can_not_measure_is_refused() -> None:
    state, _ = problem()
    net = task.of_function(lambda params, x: params)
    context = watch.context(net, mesh.make(), {"test": DATA})
    with pytest.raises(ValueError, match="no parameter 'block_9'; there are .*block_0/mlp/up"):
        Updates(("block_9",), 1).start(context, state)
    sgd = dataclasses.replace(state, opt_state=optax.sgd(0.1).init(state.params))
    with pytest.raises(ValueError, match="one Adam, got 0"):
        Updates(CHOSEN, 1).start(context, sgd)
    with pytest.raises(ValueError, match=r"looks at the data 'probed', fit was given \['test'\]"):
        Outputs(problem_module(), 1, on="probed").start(context, state)


def test_watching_changes_no_bit_and_is_recorded() -> None:
    p = tiny.problem("transformer", num_steps=4, rule=optim.Adam)
    module = problem_module()
    probes = [
        Attention(module, 2, on="probed"),
        Outputs(module, 2, on="probed"),
        Updates(CHOSEN[:1], 2, on="probed"),
        Evaluate(2, on="probed"),
    ]
    watched = tiny.run(p, mesh.make(), 2, probes=probes, data={"probed": DATA})
    plain = tiny.run(p, mesh.make(), 2)
    for x, y in zip(tiny.leaves(watched), tiny.leaves(plain), strict=True):
        np.testing.assert_array_equal(x, y)
    names = {"attention": ("max_logit", "entropy_0"), "outputs": ("log_z", "rms")}
    for probe, metrics in names.items():
        for name in metrics:
            found = watched.measured[probe][name]
            assert len(found) == len(set(found)) == 2 * 3, name
    sizes = watched.measured["sizes"]
    assert sizes["step"].to_list() == [0, 0, 2, 2, 4, 4]
    moved = sizes[f"update_{CHOSEN[0]}"]
    assert moved.is_null().to_list() == [True] * 2 + [False] * 4  # there is no update before one
    assert (moved.drop_nulls() > 0.01).all() and sizes[f"grad_{CHOSEN[0]}"].is_finite().all()
