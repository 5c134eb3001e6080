import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamics.models import ResNet, make
from dynamics.models.layers import Conv
from dynamics.models.resnet import STAGES, Block


def shapes(config):
    module = make(config, 10)
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), x)


@pytest.mark.parametrize(
    ("depth", "width", "number"),
    [(18, 64, 11_173_962), (34, 64, 21_282_122), (50, 64, 23_520_842), (20, 16, 272_474)],
)
def test_number_of_parameters(depth, width, number):
    params = shapes(ResNet(depth=depth, width=width))["params"]
    assert sum(math.prod(p.shape) for p in jax.tree.leaves(params)) == number


@pytest.mark.parametrize("depth", STAGES)
def test_depth_counts_the_layers_off_the_shortcuts(depth):
    params = shapes(ResNet(depth=depth, width=1))["params"]
    names = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
    layers = [n for n in names if n.endswith("['kernel']") and "shortcut" not in n]
    assert len(layers) == depth


def test_a_bottleneck_block_starts_as_its_shortcut(jit):
    block = Block(ResNet(depth=50, width=2), 2, 1, True)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 8)), jnp.float32)
    y, variables = jit(lambda x: block.init_with_output(jax.random.key(1), x, train=False))(x)
    np.testing.assert_array_equal(y, jnp.maximum(x, 0))
    assert (variables["params"]["norm_2"]["scale"] == 0).all()


def test_a_basic_block_adds_its_branch_to_its_shortcut(jit):
    config = ResNet(depth=18, width=2)
    block = Block(config, 4, 2, False)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8, 2)), jnp.float32)
    y, variables = jit(lambda x: block.init_with_output(jax.random.key(1), x, train=False))(x)

    def conv_norm(name, x, **fields):
        conv = Conv(4, config, bias=False, **fields)
        y = jit(lambda x: conv.apply({"params": variables["params"][name]}, x))(x)
        return y / np.sqrt(1 + 1e-5)  # the first running average

    h = jnp.maximum(conv_norm("conv_0", x, stride=2), 0)
    h = conv_norm("conv_1", h) + conv_norm("shortcut_conv", x, size=1, stride=2)
    np.testing.assert_allclose(y, jnp.maximum(h, 0), rtol=1e-5, atol=1e-6)
