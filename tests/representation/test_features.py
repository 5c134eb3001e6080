"""What a layer reads and returns, of every model of the library and of others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn

from dynamics import mesh, models, population, scores, step, task
from dynamics import representation as rep
from dynamics.probes import Score

FEW_TOKENS = models.Transformer(width=8, depth=1, num_heads=2, max_length=8)
MODELS = {
    "linear": (models.Linear(), (5,)),
    "mlp": (models.MLP(width=8, depth=2, dropout=0.5), (5,)),
    "half": (models.MLP(width=8, precision="bfloat16"), (5,)),
    "convnet": (models.Convnet(channels=(4, 8), norm="batch"), (8, 8)),
    "resnet": (models.ResNet(depth=8, width=4), (8, 8, 3)),
    "rnn": (models.RNN(width=6), (4, 5)),
    "transformer": (FEW_TOKENS, (4,)),
}


def started(name):
    """A module, its params, its extras (moved away from their first values), and a batch."""
    config, shape = MODELS[name]
    module = models.make(config, 3)
    key = jax.random.key(0)
    x = jax.random.normal(key, (6, *shape))
    x = jnp.arange(24).reshape(6, 4) % 3 if name == "transformer" else x
    variables = dict(module.init(key, x, train=False))
    params = variables.pop("params")
    return module, params, jax.tree.map(lambda v: v + 0.5, variables), x


@pytest.mark.parametrize("name", MODELS)
def test_the_head_reads_what_makes_the_logits(name):
    """In evaluation mode: no dropout, running batch statistics."""
    module, params, extras, x = started(name)
    logits = module.apply({"params": params, **extras}, x, train=False)
    hidden = rep.features(module, params, extras, x, "head")
    head = params["head"]
    again = hidden.astype(jnp.float32) @ head["kernel"]
    if "bias" in head:
        again = again + jnp.broadcast_to(head["bias"], again.shape)
    np.testing.assert_allclose(again, logits, rtol=1e-5, atol=1e-6)
    out = rep.features(module, params, extras, x, "head", side="output")
    np.testing.assert_array_equal(out, logits)


def test_layers_between():
    module, params, _, x = started("mlp")
    first = x @ params["dense_0"]["kernel"] + params["dense_0"]["bias"][None]
    out = rep.features(module, params, {}, x, "dense_0", side="output")
    np.testing.assert_allclose(out, first, rtol=1e-5, atol=1e-6)
    second = rep.features(module, params, {}, x, "dense_1")
    np.testing.assert_allclose(second, jax.nn.relu(first), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(rep.features(module, params, {}, x, "dense_0"), x)
    np.testing.assert_array_equal(rep.features(module, params, {}, x, ""), x)
    module, params, _, x = started("transformer")
    up = rep.features(module, params, {}, x, "block_0/mlp/up", side="output")
    down = rep.features(module, params, {}, x, "block_0/mlp/down")
    assert up.shape == down.shape == (6, 4, 32)


def test_a_wrong_layer_lists_the_layers():
    module, params, _, x = started("mlp")
    with pytest.raises(ValueError, match=r"MLPModule calls once, got 'heads'.*'dense_0'.*'head'\]"):
        rep.features(module, params, {}, x, "heads")
    module, params, _, x = started("rnn")  # inside a loop: called at every time step
    with pytest.raises(ValueError, match=r"'layer_0/recurrent', which it calls 0 .*'layer_0/inp"):
        rep.features(module, params, {}, x, "layer_0/recurrent")


class Twice(nn.Module):
    """One layer called twice, another by keyword, a third that returns two arrays."""

    def setup(self):
        self.shared, self.pair = nn.Dense(5), Pair()

    def __call__(self, x):
        h = self.shared(inputs=self.shared(x))
        return sum(self.pair(h=h))


class Pair(nn.Module):
    @nn.compact
    def __call__(self, h):
        return nn.Dense(2, name="left")(inputs=h), nn.Dense(2, name="right")(h)


def test_modules_that_are_not_ours():
    module, x = Twice(), jax.random.normal(jax.random.key(0), (4, 5))
    params = module.init(jax.random.key(1), x)["params"]
    hidden = rep.features(module, params, {}, x, "pair/left", arguments={})
    assert hidden.shape == (4, 5)
    np.testing.assert_array_equal(
        hidden, rep.features(module, params, {}, x, "pair/right", arguments={})
    )
    with pytest.raises(ValueError, match="'shared', which it calls 2 times"):
        rep.features(module, params, {}, x, "shared", arguments={})
    with pytest.raises(ValueError, match="output of 'pair' must be one array, got 2"):
        rep.features(module, params, {}, x, "pair", side="output", arguments={})
    layers = nn.Sequential([nn.Dense(7), nn.relu, nn.Dense(3)])
    params = layers.init(jax.random.key(1), x)["params"]
    hidden = rep.features(layers, params, {}, x, "layers_2", arguments={})
    first = x @ params["layers_0"]["kernel"]  # its bias is zero
    np.testing.assert_allclose(hidden, jax.nn.relu(first), rtol=1e-5, atol=1e-6)


def test_an_unknown_side_is_no_other_side():
    module, params, _, x = started("mlp")
    fn = getattr(rep.features, "__wrapped__", rep.features)
    with pytest.raises(ValueError, match="side must be 'input' or 'output', got 'inputs'"):
        fn(module, params, {}, x, "head", side="inputs")


def test_it_composes():
    """Under jit and vmap, and with a gradient that reaches the layers before and none after."""
    module, params, _, x = started("mlp")
    fn = lambda params, x: rep.features(module, params, {}, x, "head")  # noqa: E731
    hidden = fn(params, x)
    np.testing.assert_allclose(jax.jit(fn)(params, x), hidden, rtol=1e-5, atol=1e-6)
    alone = jax.vmap(lambda one: fn(params, one[None])[0])(x)
    np.testing.assert_allclose(alone, hidden, rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda p: fn(p, x).sum())(params)
    assert gradient["dense_0"]["kernel"].any() and not gradient["head"]["kernel"].any()


# ---- of a dataset -------------------------------------------------------------------------------


def test_of_a_dataset_in_its_order():
    p = tiny.problem("convnet")
    module = models.make(models.Convnet(channels=(4, 8), norm="batch"), 4)
    params, extras = p.task.init(jax.random.key(0), {})
    table = {**extras, "targets": jnp.zeros((256, 4))}  # a task's own, that no module knows
    state = dataclasses.replace(step.given(params), extras=table)
    net = task.of_function(lambda params, x: jnp.zeros((len(x), 4)))
    fn = rep.of_layer(module, "head")
    whole = scores.over_examples(fn, net, state, p.data)
    assert whole.shape == (40, 8)
    x = (p.data.x.astype(np.float32) - p.data.mean) / p.data.std
    wanted = rep.features(module, params, extras, jnp.asarray(x), "head")
    np.testing.assert_allclose(whole, wanted, rtol=1e-5, atol=1e-6)
    parts = scores.over_examples(fn, net, state, p.data, batch_size=7)
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-6)
    out = rep.of_layer(module, "head", side="output")
    assert scores.over_examples(out, net, state, p.data).shape == (40, 4)


def test_of_a_population_while_it_trains():
    p, replicas = tiny.problem("mlp", num_steps=4), 2
    module = models.make(models.MLP(width=8, depth=2), 4)
    fn = rep.of_layer(module, "head")
    probe = Score(fn, [4], "hidden")
    results = tiny.run(p, mesh.for_population(replicas), replicas, probes=[probe])
    found = results.arrays["hidden", "score"].at(step=4).values
    assert found.shape == (replicas, 40, 8)
    for replica in range(replicas):
        one = population.take(results.state, replica)
        wanted = scores.over_examples(fn, p.task, one, p.data)
        np.testing.assert_allclose(found[replica], wanted, rtol=1e-5, atol=1e-6)
    assert not np.allclose(found[0], found[1])
