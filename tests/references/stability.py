"""Slow and obvious: companion matrices, the mean-square operator as a matrix, descent in numpy."""

import itertools

import numpy as np


def companion(rule, s, eta, beta=0.0, decay=0.0):
    """The matrix of one update of (theta, m) on 1/2 s theta^2, written out rule by rule."""
    one = np.eye(2)
    theta, m = one[0], one[1]
    if rule == "gd":
        return np.stack([theta - eta * (s + decay) * theta, 0 * m])
    if rule in ("heavy ball", "nesterov"):
        g = (s + decay) * theta
        after = beta * m + g
        step = g + beta * after if rule == "nesterov" else after
        return np.stack([theta - eta * step, after])
    g = s * theta
    after = beta * m + (1 - beta) * g
    if rule == "ema":
        return np.stack([theta - eta * after, after])
    if rule == "nadam":
        return np.stack([theta - eta * (beta * after + (1 - beta) * g), after])
    shrunk = {"decoupled": eta * decay, "independent": decay}[rule]
    return np.stack([(1 - shrunk) * theta - eta * after, after])


def bisected(rule, eta, beta=0.0, decay=0.0):
    """The s > 0 above which an eigenvalue of the companion matrix leaves the unit circle."""

    def grows(s):
        return abs(np.linalg.eigvals(companion(rule, s, eta, beta, decay))).max() > 1

    low, high = 1e-9, 1.0
    while not grows(high):
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if grows(middle) else (middle, high)
    return (low + high) / 2


def mean_square_matrix(x, eta, batch, replacement=True):
    """f64[p^2, p^2]: E over every batch of the Kronecker square of (I - eta H_B)."""
    n, p = x.shape
    batches = (
        itertools.product(range(n), repeat=batch)
        if replacement
        else itertools.combinations(range(n), batch)
    )
    total, count = np.zeros((p * p, p * p)), 0
    for rows in batches:
        step = np.eye(p) - eta * x[list(rows)].T @ x[list(rows)] / batch
        total += np.kron(step, step)
        count += 1
    return total / count


def mean_square_radius(x, eta, c):
    """The spectral radius of Phi as a dense matrix, where x spans the whole space."""
    n, p = x.shape
    h = x.T @ x / n
    keep = np.eye(p) - eta * h
    rows = [np.outer(np.outer(one, one).ravel(), np.outer(one, one).ravel()) for one in x]
    phi = np.kron(keep, keep) + eta**2 * c * (np.mean(rows, axis=0) - np.kron(h, h))
    return abs(np.linalg.eigvals(phi)).max()


def critical(x, c):
    """The learning rate at which that is 1, by bisection."""
    low, high = 0.0, 4 / np.linalg.eigvalsh(x.T @ x / len(x))[-1]
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if mean_square_radius(x, middle, c) > 1 else (middle, high)
    return low


def diagonal_net(x, y, u, v, eta, rows):
    """SGD on 1/2 mean (<u^2 - v^2, x> - y)^2 over the given rows of each step."""
    for chosen in rows:
        error = (x[chosen] @ (u * u - v * v) - y[chosen]) / len(chosen)
        slope = 2 * x[chosen].T @ error
        u, v = u - eta * slope * u, v + eta * slope * v
    return u, v


def logistic(signed, gamma, steps, normalised=False):
    """f64[steps + 1, d]: descent on mean log(1 + exp(-signed theta)) from 0, rule by rule."""
    theta, path = np.zeros(signed.shape[1]), []
    for _ in range(steps + 1):
        path.append(theta)
        weights = 1 / (1 + np.exp(np.minimum(signed @ theta, 700.0)))
        weights = weights / (weights.sum() if normalised else len(weights))
        theta = theta + gamma * weights @ signed
    return np.stack(path)


def symmetric(m, x, eta, steps):
    """Gradient descent on 1/4 |x x^T - m|^2."""
    for _ in range(steps):
        x = x - eta * (x @ x.T - m) @ x
    return x


def asymmetric(m, f, g, eta, steps):
    """Gradient descent on 1/2 |f g^T - m|^2."""
    for _ in range(steps):
        error = f @ g.T - m
        f, g = f - eta * error @ g, g - eta * error.T @ f
    return f, g


def subgradient(a, y, u, eta, decay, steps, absolute=True):
    """u <- u - eta decay^t D u, D the mean of sign (or of the residual itself) times sym(A)."""
    sym = (a + a.transpose(0, 2, 1)) / 2
    for t in range(steps):
        residual = np.einsum("mij,ij->m", a, u @ u.T) - y
        weight = np.sign(residual) if absolute else residual
        u = u - eta * decay**t * np.einsum("m,mij->ij", weight, sym) @ u / len(a)
    return u
