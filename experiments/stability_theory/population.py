"""What the studies share: every replica's own examples, all of them at every step."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynamics.data.stream import whole
from dynamics.types import Dataset, PyTree, Results, Stream, TrainState


def own_seed(seed: int, replica: int) -> int:
    """Of what a replica of a point draws."""
    return int(np.random.SeedSequence([seed, replica]).generate_state(1)[0])


def stream(data: np.ndarray) -> Stream:
    """Of f32[K, n, ...], targets among them: labels would be integers."""
    n, rank = data.shape[1], (1,) * (data.ndim - 2)  # of one example
    y, index = np.zeros(n, np.int32), np.arange(n, dtype=np.int32)
    zero, one = np.zeros(rank, np.float32), np.ones(rank, np.float32)
    return whole(Dataset(data[0], y, index, zero, one), len(data), inputs=data)


def started(state: TrainState, params: PyTree) -> TrainState:
    """The state with other parameters [K, ...], in the precision of its own."""
    given = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), params, state.params)
    return dataclasses.replace(state, params=given)


def looks(results: Results, name: str) -> dict[str, np.ndarray]:
    """The rows that probe ``name`` wrote, its metrics without their prefix; ``place`` in [K]."""
    rows = results.rows
    chosen = np.isnan(rows.get("loss", np.full(len(rows["step"]), np.nan)))  # steps' rows have one
    prefix = f"{name}."
    found = {n[len(prefix) :]: v[chosen] for n, v in rows.items() if n.startswith(prefix)}
    return found | {
        "step": rows["step"][chosen],
        "place": rows["replica"][chosen].astype(np.int64),
    }


def logarithmic(steps: int, measured: int) -> tuple[int, ...]:
    """About so many steps from 0 to the last, evenly in their logarithm."""
    return tuple(np.unique([0, *np.geomspace(1, steps, measured).round().astype(int)]).tolist())


def columns(names: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> dict[str, np.ndarray]:
    """Rows as named columns."""
    return {n: np.array(v) for n, v in zip(names, zip(*rows, strict=True), strict=True)}
