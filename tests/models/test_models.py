"""What every model promises, over one table of all of them."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamics.config import from_json, frozen, to_json
from dynamics.models import MLP, RNN, Convnet, Linear, Model, ResNet, Transformer, make

C = 5  # outputs
IMAGES = np.random.default_rng(0).normal(size=(3, 4, 4, 2)).astype(np.float32)
TOKENS = np.random.default_rng(0).integers(0, C, (3, 4)).astype(np.int32)

TABLE = {
    "linear": (Linear(), IMAGES),
    "mlp": (MLP(width=6, activation="silu", dropout=0.1), IMAGES),
    "convnet": (Convnet(channels=(4, 8), norm="group", groups=2), IMAGES),
    "convnet batch": (Convnet(channels=(4,), norm="batch", pool="max"), IMAGES),
    "resnet": (ResNet(depth=8, width=2), IMAGES),
    "elman": (RNN(width=6, depth=2), IMAGES),
    "gru": (RNN(cell="gru", width=6, num_tokens=C), TOKENS),
    "transformer": (Transformer(width=8, depth=1, num_heads=2, max_length=4, qk_norm=True), TOKENS),
}
CASES = pytest.mark.parametrize(("config", "x"), TABLE.values(), ids=TABLE)

NAMES = {
    "linear": r"head/(kernel|bias)",
    "mlp": r"(dense_[01]|head)/(kernel|bias)",
    "convnet": r"conv_[01]/kernel|norm_[01]/(scale|bias)|head/(kernel|bias)",
    "convnet batch": r"conv_0/kernel|norm_0/(scale|bias)|head/(kernel|bias)",
    "resnet": r"stem_conv/kernel|stem_norm/(scale|bias)|block_[012]/conv_[01]/kernel"
    r"|block_[012]/norm_[01]/(scale|bias)|block_[12]/shortcut_conv/kernel"
    r"|block_[12]/shortcut_norm/(scale|bias)|head/(kernel|bias)",
    "elman": r"layer_[01]/(input/(kernel|bias)|recurrent/kernel)|head/(kernel|bias)",
    "gru": r"token_embedding|layer_0/(input/(kernel|bias)|recurrent/kernel)|head/(kernel|bias)",
    "transformer": r"(token|position)_embedding|block_0/attention/(query|key|value|out)/kernel"
    r"|block_0/attention/(query|key)_norm/scale|block_0/(attention|mlp)_norm/scale"
    r"|block_0/mlp/(up|down)/kernel|final_norm/scale|head/kernel",
}
NUMBER = {
    "linear": 2,
    "mlp": 6,
    "convnet": 8,
    "convnet batch": 5,
    "resnet": 29,
    "elman": 8,
    "gru": 6,
    "transformer": 14,
}


def named(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(k.key for k in path): leaf for path, leaf in leaves}


@pytest.fixture(scope="module")
def init(jit):
    """The variables of a model for key 0, compiled once for each config."""

    @functools.cache
    def variables(config, tokens):
        x = jnp.asarray(TOKENS if tokens else IMAGES)
        return jit(lambda: make(config, C).init(jax.random.key(0), x, train=False))()

    return lambda config, x: variables(config, x is TOKENS)


@pytest.mark.parametrize("name", TABLE)
def test_names_are_the_documented_ones(name, init):
    params = named(init(*TABLE[name])["params"])
    assert [n for n in params if not re.fullmatch(NAMES[name], n)] == []
    assert len(params) == NUMBER[name]


@CASES
def test_contract(config, x, init, jit):
    """Shapes and types; gradients are finite; in eval mode no example depends on another."""
    module, variables, x = make(config, C), init(config, x), jnp.asarray(x)
    params, extras = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    real = jnp.issubdtype(x.dtype, jnp.floating)

    def train(params, x):
        key = jax.random.key(1)
        logits, new = module.apply(
            {"params": params, **extras},
            x,
            train=True,
            mutable=list(extras),
            rngs={"dropout": key},
        )
        return (logits**2).sum(), (logits, dict(new))

    def evaluate(x):
        return module.apply(variables, x, train=False)

    @jit
    def everything(params, x):
        grads, (logits, new) = jax.grad(train, has_aux=True)(params, x)
        if not real:
            return grads, logits, new, evaluate(x), None, None
        others = jnp.ones_like(x).at[0].set(0)
        again, moved = jax.jvp(evaluate, (x,), (others,))
        _, trained = jax.jvp(lambda x: train(params, x)[1][0], (x,), (others,))
        return grads, logits, new, again, moved, trained

    grads, logits, new, again, moved, trained = everything(params, x)
    assert logits.shape == again.shape == (3, *[4] * isinstance(config, Transformer), C)
    assert logits.dtype == again.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((params, extras, grads)))
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((grads, new, logits)))
    batch_norm = getattr(config, "norm", None) == "batch"
    assert set(new) == set(extras) == ({"batch_stats"} if batch_norm else set())
    for before, after in zip(jax.tree.leaves(extras), jax.tree.leaves(new), strict=True):
        assert not np.array_equal(before, after)
    if real:
        assert (moved[0] == 0).all() and (moved[1:] != 0).any()
        assert (trained[0] != 0).any() == batch_norm


@CASES
def test_populations_are_initialised_by_vmap(config, x, init):
    x, keys = jnp.asarray(x), jax.random.split(jax.random.key(0), 2)
    init_one = lambda key: make(config, C).init(key, x, train=False)  # noqa: E731
    replicas = jax.eval_shape(jax.vmap(init_one), keys)
    one = jax.eval_shape(init_one, keys[0])
    expected = jax.tree.map(lambda leaf: (2, *leaf.shape), one)
    assert jax.tree.map(lambda leaf: leaf.shape, replicas) == expected


@CASES
def test_parametrisations_and_precisions_are_one_function(config, x, init, jit):
    """Same key: ntk computes what standard does, bfloat16 nearly so."""
    ntk = dataclasses.replace(config, parametrisation="ntk")
    half = dataclasses.replace(config, precision="bfloat16")
    cases = [(config, init(config, x)), (ntk, init(ntk, x)), (half, init(config, x))]

    @jit
    def outputs(x):
        return [make(c, C).apply(variables, x, train=False) for c, variables in cases]

    a, b, c = outputs(jnp.asarray(x))
    scale = float(jnp.abs(a).max())
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * scale)
    assert c.dtype == jnp.float32
    np.testing.assert_allclose(a, c, rtol=0, atol=8 * 2**-8 * scale)  # a handful of roundings
    assert isinstance(config, Linear) or not np.array_equal(a, c)


@CASES
def test_init_scale_multiplies_weights_and_zero_head_clears_one(config, x, init, jit):
    scaled = dataclasses.replace(config, init_scale=3.0, zero_head=True)
    one, three = named(init(config, x)["params"]), named(init(scaled, x)["params"])
    for name, value in one.items():
        factor = 3 if name.endswith(("kernel", "embedding")) else 1
        factor = 0 if name == "head/kernel" else factor
        np.testing.assert_allclose(three[name], value * factor, rtol=1e-6)
        assert not name.endswith("bias") or (value == 0).all()
    logits = jit(lambda v, x: make(scaled, C).apply(v, x, train=False))
    assert (logits(init(scaled, x), jnp.asarray(x)) == 0).all()


@CASES
def test_ntk_weights_have_unit_variance(config, x, init):
    params = named(init(dataclasses.replace(config, parametrisation="ntk"), x)["params"])
    weights = [np.asarray(v) for n, v in params.items() if n.endswith(("kernel", "embedding"))]
    weights = np.concatenate([w.ravel() for w in weights])
    assert abs(weights.mean()) < 4 / np.sqrt(len(weights))
    assert abs((weights**2).mean() - 1) < 4 * np.sqrt(2 / len(weights))


@frozen
class Study:
    model: Model = MLP()


@CASES
def test_config_is_text_and_hashable(config, x):
    study = Study(model=config)
    assert from_json(Study, to_json(study)) == study
    assert hash(make(config, C)) == hash(make(dataclasses.replace(config), C))


def called(config: Model, shape, dtype=jnp.float32):
    x = jax.ShapeDtypeStruct(shape, dtype)
    return jax.eval_shape(lambda x: make(config, C).init(jax.random.key(0), x, train=False), x)


BAD = {
    "flat resnet": (lambda: called(ResNet(), (3, 4)), r"ResNet reads images .*float32\[3, 4\]"),
    "flat convnet": (lambda: called(Convnet(), (3, 4)), r"Convnet reads images .*\[3, 4\]"),
    "small convnet": (lambda: called(Convnet(), (3, 2, 2, 1)), r"at least 4 pixels a side, got"),
    "raw images": (lambda: called(ResNet(), (3, 8, 8), jnp.uint8), r"normalised floats, got uint8"),
    "raw mlp": (lambda: called(MLP(), (3, 8), jnp.int32), r"MLP reads normalised floats.*int32"),
    "flat rnn": (lambda: called(RNN(), (3, 4), jnp.int32), r"RNN reads .*for tokens set num_token"),
    "float tokens": (lambda: called(RNN(num_tokens=9), (3, 4)), r"integer tokens .*got float32"),
    "float text": (lambda: called(Transformer(), (3, 4)), r"Transformer reads integer tokens"),
    "long text": (
        lambda: called(Transformer(max_length=7), (3, 8), jnp.int32),
        r"at most max_length = 7 tokens, got 8",
    ),
    "heads": (lambda: Transformer(width=10, num_heads=4), r"must divide width 10, got 4"),
    "tied": (lambda: Transformer(tied=True, zero_head=True), r"zero_head must be False if tied"),
    "no blocks": (lambda: Convnet(channels=()), r"Convnet.channels must name"),
    "groups": (lambda: Convnet(channels=(8, 12), norm="group"), r"\(8, 12\), got 8"),
    "resnet groups": (lambda: ResNet(width=12, norm="group"), r"must divide width 12, got 8"),
    "dropout": (lambda: MLP(dropout=1.0), r"MLP.dropout must be >= 0 and < 1, got 1.0"),
    "init scale": (lambda: Linear(init_scale=0.0), r"Linear.init_scale must be > 0, got 0.0"),
    "outputs": (lambda: make(MLP(), 0), r"num_outputs must be >= 1, got 0"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
