"""Spectra of features and their derivatives as written on paper, in float64 numpy."""

import math

import numpy as np


def shares(features):
    sigma = np.linalg.svd(features, compute_uv=False)
    total = math.fsum(sigma)
    return [s / total for s in sigma]


def entropy(features):
    return -math.fsum(q * math.log(q) for q in shares(features))


def ratio(features):
    return -math.log(shares(features)[0])


def dominance(features, top):
    return math.fsum(shares(features)[:top]) / top


def unit(features):
    return np.array([row / math.sqrt(math.fsum(v * v for v in row)) for row in features])


def consistency(z, f):
    return math.fsum(((unit(z) - unit(f)) ** 2).ravel()) / z.size


def covariance(z):
    b, d = z.shape
    total = 0.0
    for i in range(d):
        for j in range(d):
            if i != j:
                a, c = z[:, i] - z[:, i].mean(), z[:, j] - z[:, j].mean()
                total += (math.fsum(a * c) / (b - 1)) ** 2
    return total / d


# ---- derivatives, [n, D] as the features; those of singular values are u_k v_k^T ----------------


def _through(features, by_sigma):
    u, sigma, vt = np.linalg.svd(features, full_matrices=False)
    return (u * by_sigma(sigma)) @ vt


def entropy_gradient(features):
    def by_sigma(sigma):
        q = sigma / sigma.sum()
        return -(np.log(q) - (q * np.log(q)).sum()) / sigma.sum()

    return _through(features, by_sigma)


def ratio_gradient(features):
    """Of -log(sigma_1 / N)."""
    u, sigma, vt = np.linalg.svd(features, full_matrices=False)
    return u @ vt / sigma.sum() - np.outer(u[:, 0], vt[0]) / sigma[0]


def dominance_gradient(features):
    """(u_1 v_1^T N - sigma_1 U V^T) / N^2."""
    u, sigma, vt = np.linalg.svd(features, full_matrices=False)
    total = sigma.sum()
    return (np.outer(u[:, 0], vt[0]) * total - sigma[0] * (u @ vt)) / total**2


def dominance_of_top_gradient(features, top):
    def by_sigma(sigma):
        chosen = (np.arange(len(sigma)) < top) / top
        return chosen / sigma.sum() - sigma[:top].mean() / sigma.sum() ** 2

    return _through(features, by_sigma)


def covariance_gradient(z):
    """4 / (D (B - 1)) Z_c (C - diag C)."""
    b, d = z.shape
    z = z - z.mean(axis=0)
    c = z.T @ z / (b - 1)
    return 4 / (d * (b - 1)) * z @ (c - np.diag(np.diag(c)))


def consistency_gradient(z, f):
    """-2 / (B D ||z_i||) (f_i - <f_i, z_i> z_i), z_i and f_i of length one."""
    lengths = np.linalg.norm(z, axis=1, keepdims=True)
    z_, f_ = z / lengths, f / np.linalg.norm(f, axis=1, keepdims=True)
    along = (z_ * f_).sum(axis=1, keepdims=True)
    return -2 / (z.size * lengths) * (f_ - along * z_)
