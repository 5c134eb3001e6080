"""ELR and ELR+ as their papers' algorithms read: one example at a time, a dict for the memory."""

import jax
import jax.numpy as jnp
import numpy as np


def softmax(z):
    """Of one vector."""
    powers = np.exp(np.asarray(z, np.float64) - np.max(z))
    return powers / powers.sum()


def visit(memory, index, z, beta, clip=1e-4):
    """Move the target of one example, and give it."""
    p = np.clip(softmax(z), clip, 1 - clip)
    memory[index] = beta * memory.get(index, np.zeros(len(p))) + (1 - beta) * p / p.sum()
    return memory[index]


def term(z, t, clip=1e-4):
    """log(1 - <p, t>) of one example."""
    return np.log(1 - np.dot(np.clip(softmax(z), clip, 1 - clip), t))


def gradient(z, t):
    """p_c (<p, t> - t_c) / (1 - <p, t>): lemma 2 with the sum over classes carried out."""
    p, t = softmax(z), np.asarray(t, np.float64)
    return p * (p @ t - t) / (1 - p @ t)


def kl(logits, targets):
    """-sum_c t_c log p_c: the regulariser that appendix C of the paper shows to fail."""
    return -jnp.sum(targets * jax.nn.log_softmax(logits, axis=-1), axis=-1)


def ramp(step, length):
    """exp(-5 (1 - s / length)^2), as published code writes it."""
    s = min(max(step, 0.0), length)
    return float(np.exp(-5.0 * (1.0 - s / length) ** 2))
