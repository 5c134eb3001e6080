"""Batches and parameters over devices: the same numbers, one reduction for a product."""

import re
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from references import curvature as ref

from dynamics import curvature, mesh

DATA = mesh.AXES[1]


def problem() -> tuple[Any, Any]:
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x.astype(np.float32), ref.init(1, (16, 24, 8)))
    x, y = draw.normal(size=(64, 16)).astype(np.float32), draw.integers(0, 8, 64).astype(np.int32)
    return params, (x, y)


def placed(batches: Any, here: Any) -> Any:
    spec = NamedSharding(here, PartitionSpec(None, DATA))
    return jax.tree.map(lambda x: jax.device_put(x, spec), batches)


def reductions(compiled: Any) -> tuple[int, int]:
    """How many collectives a program has, and how many of them in the body of a loop."""
    text = compiled.as_text()
    bodies = set(re.findall(r"body=(%?[\w.\-]+)", text))
    inside, found, where = 0, 0, ""
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?(%?[\w.\-]+) .*\{$", line):
            where = header[1]
        if re.search(r"= .*(all-reduce|all-gather|all-to-all|reduce-scatter)(-start)?\(", line):
            found += 1
            inside += where in bodies
    return found, inside


apply = jax.jit(lambda op, v: op(v))


@pytest.mark.parametrize("size", [64, 16])
def test_one_reduction_for_a_product(size: int) -> None:
    """With the mesh, outside the loop over microbatches; without, in it."""
    params, batch = problem()
    here = mesh.make(1, 8, 1)
    v = jax.tree.map(np.ones_like, params)
    expected = apply(curvature.hessian(ref.ce, params, curvature.cut(batch)), v)
    batches = placed(curvature.cut(batch, size), here)
    at, v = jax.device_put((params, v), mesh.everywhere(here))
    op = curvature.hessian(ref.ce, at, batches, mesh=here)
    compiled = apply.lower(op, v).compile()
    assert reductions(compiled) == (1, 0)
    for x, y in zip(*map(jax.tree.leaves, (compiled(op, v), expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    plain = apply.lower(curvature.hessian(ref.ce, at, batches), v).compile()
    assert reductions(plain)[0] >= 1 and (reductions(plain)[1] >= 1) == (size == 16)


def test_lanczos_over_devices_is_that_of_one() -> None:
    """Within 1e-5; nothing but the product crosses devices."""
    params, batch = problem()
    here = mesh.make(1, 8, 1)
    run = jax.jit(curvature.sharpness, static_argnames="k")
    key = jax.random.key(0)
    alone = run(curvature.hessian(ref.ce, params, curvature.cut(batch, 16)), key, k=12)
    at = jax.device_put(params, mesh.everywhere(here))
    op = curvature.hessian(ref.ce, at, placed(curvature.cut(batch, 16), here), mesh=here)
    spread = run(op, key, k=12)
    np.testing.assert_allclose(spread.value, alone.value, rtol=1e-5)
    np.testing.assert_allclose(spread.smallest, alone.smallest, rtol=1e-5)
    total, inside = reductions(run.lower(op, key, k=12).compile())
    assert (total, inside) == (1, 1)  # in the loop over steps: one for each product


def test_sharded_parameters_stay_where_they_are() -> None:
    """Leaves over data and model axes: T is that of one device, and the basis lies as they do."""
    params, batch = problem()
    here = mesh.make(1, 4, 2)
    state = {"params": jax.tree.map(lambda x: x[None], params)}
    specs = mesh.shardings(state, here, mesh.FULLY_SHARDED)["params"]
    places = jax.tree.map(
        lambda s: NamedSharding(here, PartitionSpec(*s.spec[1:])),
        specs,
        is_leaf=lambda s: isinstance(s, NamedSharding),
    )
    at = jax.tree.map(jax.device_put, params, places)
    run = jax.jit(curvature.lanczos, static_argnums=2)
    v = jax.tree.map(lambda x: x + 1, params)
    alone = run(curvature.hessian(ref.ce, params, curvature.cut(batch)), v, 8)
    batches = placed(curvature.cut(batch), here)
    op = curvature.hessian(ref.ce, at, batches, sharded=True)
    start = jax.tree.map(jax.device_put, v, places)
    spread = run(op, start, 8)
    np.testing.assert_allclose(spread.alpha, alone.alpha, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(spread.beta, alone.beta, rtol=1e-5, atol=1e-5)
    kernel = spread.basis["layer_0"]["kernel"]
    assert kernel.shape == (8, 16, 24)
    assert np.prod(kernel.sharding.shard_shape(kernel.shape)) < kernel.size


def test_a_mesh_the_batch_does_not_divide_over_is_refused() -> None:
    params, batch = problem()
    with pytest.raises(ValueError, match="multiple of the mesh's data axis, 8, got 4"):
        curvature.hessian(ref.ce, params, curvature.cut(batch, 4), mesh=mesh.make(1, 8, 1))
