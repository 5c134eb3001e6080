"""Gradients of any function of one example, one example at a time, summed in float64."""

import functools

import jax
import numpy as np

# tiny nets spend their time in the compiler
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def gradients(loss, params, shared, examples, *, chosen=lambda name: True, jit=jit):
    """[B, P] float64: the leaves whose path is ``chosen``, flat; integers have none."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    values = [value for _, value in leaves]
    ours = [
        i
        for i, (name, x) in enumerate(zip(names, values, strict=True))
        if chosen(name) and jax.numpy.issubdtype(jax.dtypes.result_type(x), np.floating)
    ]

    def of_ours(mine, one):
        mixed = list(values)
        for i, value in zip(ours, mine, strict=True):
            mixed[i] = value
        return loss(jax.tree.unflatten(treedef, mixed), shared, one)

    gradient, out = jit(jax.grad(of_ours)), []
    for i in range(len(jax.tree.leaves(examples)[0])):
        found = gradient([values[j] for j in ours], jax.tree.map(lambda x, i=i: x[i], examples))
        flat = [np.asarray(g.astype("float32"), np.float64).ravel() for g in found]
        out.append(np.concatenate(flat))
    return np.stack(out)


def norms(each):
    """Their lengths."""
    return np.sqrt((each**2).sum(axis=1))
