"""Optimizers as the papers print them, in float64."""

import numpy as np


def sgd(
    w, gradient, num_steps, *, learning_rate, momentum, weight_decay, nesterov, factor=lambda t: 1.0
):
    """Heavy ball and Nesterov as in Sutskever et al. 2013, L2 in the gradient: every iterate."""
    w, m, out = np.array(w, np.float64), np.zeros(len(w)), []
    for t in range(num_steps):
        g = gradient(w) + weight_decay * w
        m = momentum * m + g
        direction = g + momentum * m if nesterov else m
        w = w - learning_rate * factor(t) * direction
        out.append(w)
    return np.stack(out)


def sgd_look_ahead(w, gradient, num_steps, *, learning_rate, momentum):
    """Nesterov's own form: the gradient at the point that the momentum leads to.

    v <- momentum v - lr grad(w + momentum v), w <- w + v: equation 3 and 4 of Sutskever et al.
    What a framework stores is w + momentum v.
    """
    w, v, out = np.array(w, np.float64), np.zeros(len(w)), []
    for _ in range(num_steps):
        v = momentum * v - learning_rate * gradient(w + momentum * v)
        w = w + v
        out.append(w + momentum * v)
    return np.stack(out)


def adam(
    w, gradient, num_steps, *, learning_rate, momentum, second_moment, epsilon, weight_decay,
    factor=lambda t: 1.0,
):  # fmt: skip
    """Kingma and Ba 2015, algorithm 1, with Loshchilov and Hutter's decoupled decay."""
    w, m, v, out = np.array(w, np.float64), np.zeros(len(w)), np.zeros(len(w)), []
    for t in range(num_steps):
        g = gradient(w)
        m = momentum * m + (1 - momentum) * g
        v = second_moment * v + (1 - second_moment) * g**2
        m_hat, v_hat = m / (1 - momentum ** (t + 1)), v / (1 - second_moment ** (t + 1))
        rate = learning_rate * factor(t)
        w = w - rate * m_hat / (np.sqrt(v_hat) + epsilon) - rate * weight_decay * w
        out.append(w)
    return np.stack(out)
