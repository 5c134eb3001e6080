"""Products against dense Hessians in float64; blocks, microbatches, precision, refusals."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.flatten_util import ravel_pytree
from references import curvature as ref

from dynamics import curvature, losses, models, step, task
from dynamics.curvature.operator import Operator
from dynamics.data import DataConfig, load, of_arrays


def flat(tree: Any) -> np.ndarray:
    return np.asarray(ravel_pytree(tree)[0])


def single(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x, np.float32) if x.dtype == np.float64 else x, tree)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def matrix(op: Operator) -> np.ndarray:
    """Every column, for small spaces."""
    one = curvature.packed(op)
    return np.asarray(jax.jit(jax.vmap(one))(jnp.eye(one.like.size, dtype=one.like.dtype)))


def vector(params: Any, seed: int = 3) -> Any:
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: draw.normal(size=x.shape).astype(x.dtype), params)


apply = jax.jit(lambda op, v: op(v))


@pytest.mark.parametrize("name", ["mse", "ce"])
@pytest.mark.parametrize("size", [None, 40])
def test_hessian_products_in_both_precisions(name: str, size: int | None) -> None:
    """Check 4: 1e-12 in float64, 1e-5 in float32, in one batch and in five."""
    params, batch, loss = ref.trained(name, 300), ref.digits(), ref.LOSSES[name]
    v = vector(params)
    expected = ref.dense(name, 300) @ flat_wide(v)
    with jax.enable_x64(True):
        op = curvature.hessian(loss, params, curvature.cut(batch, size))
        found = flat(apply(op, v))
    assert found.dtype == np.float64 and relative(found, expected) < 1e-12
    op = curvature.hessian(loss, single(params), curvature.cut(single(batch), size))
    found = flat(apply(op, single(v)))
    assert found.dtype == np.float32 and relative(found, expected) < 1e-5


def flat_wide(tree: Any) -> np.ndarray:
    with jax.enable_x64(True):
        return flat(tree)


SMALL = (8, 5, 3)


def small() -> tuple[Any, Any]:
    draw = np.random.default_rng(1)
    batch = (draw.normal(size=(12, 8)), draw.integers(0, 3, 12).astype(np.int32))
    return ref.init(2, SMALL), batch


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("size", [2, 12])
def test_microbatches_change_nothing(size: int, unroll: bool) -> None:
    params, batch = small()
    expected = ref.dense_of(lambda p: ref.ce(p, batch), params)
    with jax.enable_x64(True):
        op = curvature.hessian(ref.ce, params, curvature.cut(batch, size), unroll=unroll)
        assert relative(matrix(op), expected) < 1e-12
        loops = "while" in str(jax.make_jaxpr(op)(params)) or "scan" in str(
            jax.make_jaxpr(op)(params)
        )
    assert loops == (size == 2 and not unroll)


def test_gauss_newton_is_the_definition() -> None:
    params, batch = small()
    expected = ref.gauss_newton(params, batch, lambda z: np.eye(3))
    categorical = ref.gauss_newton(params, batch, ref.categorical)
    with jax.enable_x64(True):
        batches = curvature.cut(batch, 4)
        squares = curvature.gauss_newton(ref.predict, ref.squares, params, batches)
        entropy = curvature.gauss_newton(ref.predict, ref.cross_entropy, params, batches)
        assert relative(matrix(squares), expected) < 1e-12
        assert relative(matrix(entropy), categorical) < 1e-12
        hessian = matrix(curvature.hessian(ref.ce, params, batches))
    assert relative(hessian, categorical) > 0.1  # far from a fit they differ


def test_fisher_is_the_models_own() -> None:
    """The expectation over the model's labels, label by label; no label is read."""
    params, batch = small()
    expected = ref.gauss_newton(params, batch, ref.categorical)
    gaussian = ref.gauss_newton(params, batch, lambda z: np.eye(3))
    with jax.enable_x64(True):
        batches = curvature.cut(batch[:1], 4)
        assert relative(matrix(curvature.fisher(ref.predict, params, batches)), expected) < 1e-12
        found = curvature.fisher(ref.predict, params, batches, likelihood="gaussian")
        assert relative(matrix(found), gaussian) < 1e-12


def test_gauss_newton_is_the_hessian_of_linear_models() -> None:
    draw = np.random.default_rng(0)
    params = {"layer_0": {"kernel": draw.normal(size=(8, 3)), "bias": np.zeros(3)}}
    with jax.enable_x64(True):
        batches = curvature.cut(small()[1], 6)
        a = matrix(curvature.gauss_newton(ref.predict, ref.cross_entropy, params, batches))
        assert relative(a, matrix(curvature.hessian(ref.ce, params, batches))) < 1e-12


# ---- blocks -------------------------------------------------------------------------------------


def test_a_mask_of_leaves_is_a_block_of_the_dense_hessian() -> None:
    params, batch = small()
    dense = ref.dense_of(lambda p: ref.ce(p, batch), params)
    with jax.enable_x64(True):
        mask = curvature.select(params, "layer_1/")
        inside = flat(jax.tree.map(lambda keep, x: jnp.full(x.shape, keep), mask, params))
        op = curvature.hessian(ref.ce, params, curvature.cut(batch, 6), mask=mask)
        assert op.size == 5 * 3 + 3 and op.like["layer_0"]["kernel"] is None
        assert relative(matrix(op), dense[np.ix_(inside, inside)]) < 1e-12
        prefix = {"layer_0": False, "layer_1": True}
        again = curvature.hessian(ref.ce, params, curvature.cut(batch, 6), mask=prefix)
        np.testing.assert_array_equal(matrix(again), matrix(op))


def test_a_mask_of_entries_is_a_block_of_the_dense_hessian() -> None:
    params, batch = small()
    dense = ref.dense_of(lambda p: ref.ce(p, batch), params)
    rows = np.arange(8 * 5).reshape(8, 5) % 2 == 0
    mask = {"layer_0": {"kernel": rows, "bias": True}, "layer_1": False}
    full = {"layer_0": {"kernel": rows, "bias": np.ones(5, bool)}, "layer_1": np.zeros(0, bool)}
    with jax.enable_x64(True):
        op = curvature.hessian(ref.ce, params, curvature.cut(batch), mask=mask)
        inside = flat({"bias": full["layer_0"]["bias"], "kernel": rows})
        expected = dense[: len(inside), : len(inside)] * np.outer(inside, inside)
        assert int(op.size) == inside.sum() == 25
        assert relative(matrix(op), expected) < 1e-12
        block = dense[: len(inside), : len(inside)][np.ix_(inside, inside)]
        values = np.linalg.eigvalsh(block)
        found = curvature.sharpness(op, jax.random.key(0), k=30)  # more than there are
        np.testing.assert_allclose(found.value, values[-1], rtol=1e-10)
        np.testing.assert_allclose(found.smallest, values[0], rtol=1e-10)
        assert np.all(np.asarray(found.vector["layer_0"]["kernel"])[~rows] == 0)


def test_a_negative_block_has_a_negative_sharpness() -> None:
    """What is masked adds no zeros to the spectrum."""
    values = jnp.asarray([-3.0, -2.0, -1.0, 5.0, 6.0])
    mask = jnp.arange(5) < 3
    op = curvature.hessian(
        lambda p, batch: jnp.sum(values * p**2) / 2 + 0 * batch.sum(),
        jnp.ones(5),
        jnp.zeros((1, 1)),
        mask=mask,
    )
    found = curvature.sharpness(op, jax.random.key(0))
    np.testing.assert_allclose([found.value, found.smallest], [-1, -3], rtol=1e-5)


# ---- precision ----------------------------------------------------------------------------------


def test_half_precision_parameters_have_a_float32_operator() -> None:
    """Equal, to the bit, to that of the same numbers in float32."""
    params, batch = small()
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    inputs = (jnp.asarray(batch[0], jnp.bfloat16), jnp.asarray(batch[1]))
    op = curvature.hessian(ref.ce, half, curvature.cut(inputs, 4))
    assert {x.dtype for x in jax.tree.leaves(op.like)} == {jnp.dtype(jnp.float32)}
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (half, inputs[0]))
    same = curvature.hessian(ref.ce, wide[0], curvature.cut((wide[1], inputs[1]), 4))
    np.testing.assert_array_equal(matrix(op), matrix(same))
    assert float(curvature.asymmetry(op, jax.random.key(0))) < 1e-5


def test_a_loss_that_computes_in_half_precision_is_refused() -> None:
    data = tiny.images()
    config = models.MLP(width=8, depth=2, precision="bfloat16")
    batches = curvature.cut_dataset(data, 20)
    made = task.of_dataset(models.make(config, 4), data)
    state = tiny_state(made)
    with pytest.raises(ValueError, match="the loss computes in bfloat16: .*precision='float32'"):
        curvature.of_task(made, state, batches)
    wide = dataclasses.replace(config, precision="float32")
    op = curvature.of_task(task.of_dataset(models.make(wide, 4), data), state, batches)
    assert float(curvature.asymmetry(op, jax.random.key(0))) < 1e-4


def test_asymmetry_sees_what_is_not_symmetric() -> None:
    a = jnp.asarray(ref.symmetric(20), jnp.float32)
    skew = jnp.triu(jnp.full((20, 20), 1e-3), 1)
    like, key = jnp.zeros(20), jax.random.key(1)
    assert float(curvature.asymmetry(curvature.operator(lambda v: a @ v, like), key)) < 1e-6
    bad = curvature.operator(lambda v: (a + skew - skew.T) @ v, like)
    assert float(curvature.asymmetry(bad, key)) > 1e-4
    half = a.astype(jnp.bfloat16)
    bad = curvature.operator(lambda v: (half @ v.astype(half.dtype)).astype(v.dtype), like)
    assert float(curvature.asymmetry(bad, key)) < 1e-6  # rounded, but alike


# ---- tasks --------------------------------------------------------------------------------------


def tiny_state(made: Any) -> Any:
    params, extras = jax.jit(made.init)(jax.random.key(0), {})
    return step.given(params, extras)


@pytest.mark.parametrize("kind", ["mlp", "transformer", "convnet"])
def test_of_a_task_and_a_dataset(kind: str) -> None:
    """Its mean loss in evaluation mode, for inputs and tokens; batch norm does not see the cut."""
    p = tiny.problem(kind)
    state = tiny_state(p.task)

    def mean(params: Any) -> jax.Array:
        batch = jax.tree.map(lambda x: x[0], curvature.cut_dataset(p.data))
        return p.task.evaluate(params, state.extras, batch, state.hyperparameters).loss.mean()

    v = vector(state.params)
    expected = jax.jit(lambda w, v: jax.jvp(jax.grad(mean), (w,), (v,))[1])(state.params, v)
    batches = curvature.cut_dataset(p.data, 20)
    op = curvature.of_task(p.task, state, batches, unroll=kind == "convnet")
    np.testing.assert_allclose(flat(apply(op, v)), flat(expected), rtol=2e-4, atol=2e-6)
    again = curvature.of_task(p.task, state, batches, unroll=kind == "convnet")
    assert op.product == again.product and hash(op.product) == hash(again.product)


def test_weights_count() -> None:
    p = tiny.problem("mlp")
    state = tiny_state(p.task)
    batches = curvature.cut_dataset(p.data, 8)
    double = batches.replace(weight=jnp.full(batches.index.shape, 2.0))
    v = vector(state.params)
    one, two = (flat(apply(curvature.of_task(p.task, state, b), v)) for b in (batches, double))
    np.testing.assert_allclose(two, 2 * one, rtol=1e-6)


def test_new_parameters_compile_nothing() -> None:
    traces = []

    def loss(params: Any, batch: Any) -> jax.Array:
        traces.append(1)
        return ref.ce(params, batch)

    params, batch = single(small())
    run = jax.jit(lambda op, v: op(v))
    ops = []
    for scale in (1.0, 2.0):
        here = jax.tree.map(lambda x, s=scale: s * x, params)
        ops.append(curvature.hessian(loss, here, curvature.cut(batch, 4)))
    seen = len(traces)
    run(ops[0], params)
    first = len(traces)
    run(ops[1], params)
    assert first > seen and len(traces) == first


def test_inside_a_vmap_over_replicas() -> None:
    params, batch = single(small())
    others = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)

    def one(params: Any) -> jax.Array:
        op = curvature.hessian(ref.ce, params, curvature.cut(batch, 4))
        return curvature.sharpness(op, jax.random.key(0), k=8).value

    together = jax.jit(jax.vmap(one))(others)
    apart = [jax.jit(one)(jax.tree.map(lambda x, i=i: x[i], others)) for i in range(2)]
    np.testing.assert_allclose(together, apart, rtol=1e-5)


# ---- other maps ---------------------------------------------------------------------------------


def test_preconditioned_has_the_eigenvalues_of_the_quotient() -> None:
    a = ref.symmetric(12) + 3 * np.eye(12)
    p = np.random.default_rng(1).uniform(0.1, 2, 12)
    expected = np.sort(np.linalg.eigvals(a / p[:, None]).real)
    with jax.enable_x64(True):
        inner = curvature.operator(lambda v: jnp.asarray(a) @ v, jnp.zeros(12))
        op = curvature.preconditioned(inner, jnp.asarray(p))
        found = matrix(op)
    np.testing.assert_allclose(found, found.T, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(np.linalg.eigvalsh(found), expected, rtol=1e-10)


def test_packed_is_the_same_map() -> None:
    params, batch = single(small())
    op = curvature.hessian(ref.ce, params, curvature.cut(batch))
    v = vector(params)
    found = jax.jit(curvature.packed(op))(ravel_pytree(v)[0])
    np.testing.assert_array_equal(found, flat(jax.jit(lambda v: apply(op, v))(v)))


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": lambda p, b: ref.predict(p, b)}, "a loss must return a scalar"),
        ({"batches": small()[1]}, r"batches must be arrays \[microbatches, examples"),
        ({"mask": {"layer_0": False, "layer_1": False}}, "the mask leaves no parameter"),
        ({"mask": {"layer_0": 1, "layer_1": False}}, "a mask has bools.*got int"),
        ({"mask": {"layer_0": np.ones(2, bool), "layer_1": True}}, "the mask of 'layer_0/bias'"),
        ({"params": {"n": np.arange(3)}}, "parameter 'n' is int32, not floats: mask it out"),
    ],
)
def test_bad_input_is_refused(change: dict, message: str) -> None:
    params, batch = single(small())
    given = {"loss": ref.ce, "params": params, "batches": curvature.cut(batch, 4), "mask": None}
    given |= change
    if "params" in change:
        given["loss"] = lambda p, b: p["n"].sum().astype(jnp.float32)
    with pytest.raises(ValueError, match=message):
        curvature.hessian(given["loss"], given["params"], given["batches"], mask=given["mask"])


def test_other_bad_input_is_refused() -> None:
    params, batch = single(small())
    with pytest.raises(ValueError, match="size must divide the 12 examples, got 5: 4 and 6 do"):
        curvature.cut(batch, 5)
    with pytest.raises(ValueError, match=r"must have one length, the examples, got \[12, 13\]"):
        curvature.cut((batch[0], np.zeros(13)))
    with pytest.raises(ValueError, match="no parameter's path matches 'conv'"):
        curvature.select(params, "conv")
    op = curvature.hessian(ref.ce, params, curvature.cut(batch))
    with pytest.raises(ValueError, match="the diagonal must be a tree like the vectors"):
        curvature.preconditioned(op, jnp.ones(3))


@pytest.mark.parametrize("size", [5, 7, 12, 8, 1])
def test_a_dataset_is_cut_into_any_size(size: int) -> None:
    """A smaller last microbatch, filled up with examples of weight 0, changes nothing."""
    rng = np.random.default_rng(0)
    data = of_arrays(rng.normal(size=(12, 3)).astype(np.float32), np.arange(12) % 4)
    net = task.of_function(
        lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"],
        init=lambda key: {"a": jax.random.normal(key, (3, 3)), "b": jax.random.normal(key, (3, 4))},
    )
    state = step.given(net.init(jax.random.key(0), {})[0])
    batches = curvature.cut_dataset(data, size)
    assert batches.x.shape == (-(-12 // size), size, 3)
    whole = curvature.cut_dataset(data)

    def predict(params: Any, batch: Any) -> jax.Array:
        return net.evaluate(params, {}, batch, {}).logits

    makers = [
        lambda b: curvature.of_task(net, state, b),
        lambda b: curvature.fisher(predict, state.params, b),
        lambda b: curvature.fisher(predict, state.params, b, likelihood="gaussian"),
    ]
    for make in makers:
        np.testing.assert_allclose(matrix(make(batches)), matrix(make(whole)), rtol=2e-5, atol=2e-6)


def test_the_digits_are_cut() -> None:
    """1,347 examples, 3 x 449."""
    data = load(DataConfig()).train
    batches = curvature.cut_dataset(data, 256)
    assert batches.x.shape[:2] == (6, 256) and batches.weight is not None
    weight = np.asarray(batches.weight).reshape(-1)
    np.testing.assert_allclose(weight.sum(dtype=np.float64), 6 * 256, rtol=1e-6)
    assert (weight[1347:] == 0).all()
    with pytest.raises(ValueError, match="size must be at most the 1347 examples, got 2000"):
        curvature.cut_dataset(data, 2000)


def test_a_loss_that_is_no_mean_is_refused() -> None:
    params, batch = single(small())
    batches = curvature.cut(batch, 4)

    def normed(params: Any, batch: Any) -> jax.Array:  # as batch norm in training mode
        x, y = batch
        x = (x - x.mean(0, keepdims=True)) / (x.std(0, keepdims=True) + 1e-3)
        return ref.ce(params, (x, y))

    for loss in (lambda p, b: 4 * len(b[1]) * ref.ce(p, b), normed):
        with pytest.raises(
            ValueError, match="a loss must be the mean over the examples of a batch"
        ):
            curvature.hessian(loss, params, batches)
        curvature.hessian(loss, params, curvature.cut(batch))  # in one there is nothing to mistake


def test_a_traced_loss_is_not_looked_at() -> None:
    """Inside a compiled function its numbers are not known, whatever its arguments are."""
    params, batch = jax.tree.map(jnp.asarray, single(small()))
    batches, v = curvature.cut(batch, 4), vector(params)

    @jax.jit
    def product(scale: jax.Array, v: Any) -> Any:
        return curvature.hessian(lambda p, b: scale * ref.ce(p, b), params, batches)(v)

    found = product(jnp.float32(2), v)
    wanted = curvature.hessian(ref.ce, params, batches)(v)
    np.testing.assert_allclose(flat(found), 2 * flat(wanted), rtol=1e-5, atol=1e-6)


def test_a_loss_that_leaves_out_the_weights_is_refused() -> None:
    data = load(DataConfig(num_train=20)).train
    batches = curvature.cut_dataset(data, 8)
    params = {"w": jnp.ones((64, 10))}

    def loss(params: Any, batch: Any) -> jax.Array:
        logits = batch.x.reshape(len(batch.x), -1) @ params["w"]
        return losses.cross_entropy(logits, batch.y).mean()

    with pytest.raises(ValueError, match="must be the mean of batch.weight times the loss"):
        curvature.hessian(loss, params, batches)


def test_the_losses_of_the_library_fit() -> None:
    """``losses`` are per example; their mean is the loss of the outputs."""
    params, batch = single(small())

    def mean(outputs: jax.Array, batch: Any) -> jax.Array:
        return losses.cross_entropy(outputs, jnp.asarray(batch[1])).mean()

    ours = curvature.gauss_newton(ref.predict, mean, params, curvature.cut(batch))
    fisher = curvature.fisher(ref.predict, params, curvature.cut(batch))
    np.testing.assert_allclose(matrix(ours), matrix(fisher), rtol=1e-4, atol=1e-6)
