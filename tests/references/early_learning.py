"""Gradient descent on the logistic loss with early-learning regularization, line by line."""

from typing import Any

import numpy as np

CLIP = 1e-4


def descend(
    theta: np.ndarray, x: np.ndarray, eps: np.ndarray, steps: int, rate: float, held: float,
    beta: float,
) -> list[dict[str, Any]]:  # fmt: skip
    """What is true before each step and after the last, in float64; ``eps`` are +-1."""
    theta, x, n = np.float64(theta), np.float64(x), len(eps)
    targets, found = np.zeros((n, 2)), []
    for _ in range(steps + 1):
        s = x @ theta
        one = 1 / (1 + np.exp(-s))
        p = np.clip(np.stack([1 - one, one], 1), CLIP, 1 - CLIP)
        inside = (one > CLIP) & (one < 1 - CLIP)
        targets = beta * targets + (1 - beta) * p / p.sum(1, keepdims=True)
        pull = -(targets[:, 1] - targets[:, 0]) * one * (1 - one)
        regularizer = inside * pull / (1 - (p * targets).sum(1))
        slope = ((np.tanh(s / 2) - eps) / 2 + held * regularizer) @ x / n
        found.append(
            {
                "cosine": -slope[0] / np.linalg.norm(slope),
                "norm": np.linalg.norm(theta),
                "along": theta[0],
                "kappa": (np.tanh(s / 2) - eps) ** 2,
                "said": s > 0,
                "theta": theta,
            }
        )
        theta = theta - rate * slope
    return found
