"""Norms of per-example gradients and passes over a dataset by hand; nothing of ours is imported."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.plain import Lap, Side, mlp

Layers = Sequence[tuple[Any, Any]]  # (weights, bias) of each layer, the output layer last
Check = Callable[[Any], None]  # of the norms that a side found, before any of its laps count


def convnet(params: Layers, x: jax.Array) -> jax.Array:
    """3x3 convolutions, each second one with stride 2; the mean over space, a dense layer."""
    *convolutions, (w_out, b_out) = params
    h, layout, edges = x, ("NHWC", "HWIO", "NHWC"), ((1, 1), (1, 1))
    for i, (w, b) in enumerate(convolutions):
        strides = (1 + i % 2,) * 2
        h = jax.lax.conv_general_dilated(h, w, strides, edges, dimension_numbers=layout)
        h = jax.nn.relu(h + b)
    return h.mean((1, 2)) @ w_out + b_out


def norms(loss: Callable[[Any, Any], jax.Array], params: Any, examples: Any) -> jax.Array:
    """``vmap(grad)``: the gradient of each example's ``loss(params, example)``, and its length."""
    gradients = jax.vmap(jax.grad(loss), (None, 0))(params, examples)
    squares = (jnp.sum(g.reshape(len(g), -1) ** 2, axis=1) for g in jax.tree.leaves(gradients))
    return jnp.sqrt(sum(squares))


def logits(
    params: Layers, x: np.ndarray, mean: float, std: float, batch_size: int, mesh: Mesh
) -> Side:
    """The logits of all examples by MLPs stacked in ``params``: one program, in batches.

    Examples lie on the devices as stored. A CPU takes a replica's weights out of the stack once
    for all batches; elsewhere the replicas of a device are one batched operation.
    """
    spread, everywhere = PartitionSpec(mesh.axis_names[0]), PartitionSpec()
    one_by_one = jax.default_backend() == "cpu"

    def of_batch(params: Layers, rows: jax.Array) -> jax.Array:
        return mlp(params, (rows.astype(jnp.float32) - mean) / std)

    def local(params: Layers, batches: jax.Array) -> jax.Array:
        def over(params: Layers, predict: Callable) -> jax.Array:
            return jax.lax.map(lambda rows: predict(params, rows), batches)

        if one_by_one:
            return jax.lax.map(lambda p: over(p, of_batch), params)
        return over(params, jax.vmap(of_batch, (0, None))).swapaxes(0, 1)

    def run(lap: Lap) -> None:
        count = -(-len(x) // batch_size) * batch_size
        rows = np.minimum(np.arange(count), len(x) - 1).reshape(-1, batch_size)
        batches = jax.device_put(x[rows], NamedSharding(mesh, everywhere))
        program = jax.jit(
            jax.shard_map(
                local, mesh=mesh, in_specs=(spread, everywhere), out_specs=spread, check_vma=False
            )
        )
        while True:
            jax.block_until_ready(program(params, batches))
            lap()

    return run


def torch_norms(
    params: Layers, x: Any, y: Any, *, together: bool, threads: int, calls: int, check: Check
) -> Side:
    """PyTorch's norms: all by torch.func's vmap(grad), or one ``backward`` after the other."""

    def run(lap: Lap) -> None:
        import torch  # pyright: ignore[reportMissingImports]
        from torch.nn import functional  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(threads)
        torch.set_flush_denormal(True)  # as XLA does
        torch.set_float32_matmul_precision("high")  # TF32 where there is one, as XLA does
        device = "cpu" if jax.default_backend() == "cpu" else "cuda"

        def tensor(value: Any, order: dict[int, tuple[int, ...]]) -> Any:
            value = np.array(value)
            value = value.transpose(order.get(value.ndim, range(value.ndim)))
            return torch.from_numpy(np.ascontiguousarray(value)).to(device)

        weights = [
            tuple(tensor(v, {2: (1, 0), 4: (3, 2, 0, 1)}) for v in layer) for layer in params
        ]
        inputs, labels = tensor(x, {4: (0, 3, 1, 2)}), tensor(y, {}).long()
        inputs = inputs if inputs.ndim == 4 else inputs.flatten(1)
        how = _together if together else _one_by_one

        def lengths() -> np.ndarray:
            loss = functools.partial(_torch_loss, functional)
            return how(torch, loss, weights, inputs, labels).cpu().numpy()

        check(lengths())
        while True:
            for _ in range(calls):
                lengths()
            lap()
            torch.set_num_threads(threads)  # another side may have set its own

    return run


def _torch_loss(functional: Any, weights: Any, x: Any, y: Any) -> Any:
    """Of one example."""
    h, (*hidden, (w_out, b_out)) = x[None], weights
    for i, (w, b) in enumerate(hidden):
        if w.ndim == 4:
            h = functional.relu(functional.conv2d(h, w, b, stride=1 + i % 2, padding=1))
        else:
            h = functional.relu(functional.linear(h, w, b))
    h = h.mean((2, 3)) if h.ndim == 4 else h
    return functional.cross_entropy(functional.linear(h, w_out, b_out), y[None])


def _together(torch: Any, loss: Callable, weights: list, x: Any, y: Any) -> Any:
    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, x, y)
    squares = [g.flatten(1).square().sum(1) for layer in gradients for g in layer]
    return torch.stack(squares).sum(0).sqrt()


def _one_by_one(torch: Any, loss: Callable, weights: list, x: Any, y: Any) -> Any:
    leaves = [leaf.requires_grad_() for layer in weights for leaf in layer]
    found = []
    for one, label in zip(x, y, strict=True):
        for leaf in leaves:
            leaf.grad = None
        loss(weights, one, label).backward()
        found.append(sum(leaf.grad.square().sum() for leaf in leaves))
    return torch.stack(found).sqrt()
