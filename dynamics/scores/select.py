"""Which examples to keep, from a score."""

from typing import Literal

import numpy as np
from jaxtyping import Float, Int


def keep(
    scores: Float[np.ndarray, "n"],
    count: int,
    which: Literal["highest", "lowest"],
    *,
    seed: int = 0,
) -> Int[np.ndarray, "{count}"]:
    """The ``count`` examples with the highest or lowest score, in ascending order of index.

    Ties are broken at random by ``seed``: by index would prefer some classes where data are sorted
    by class. ValueError: NaN scores, or a count outside 1..n.
    """
    n = len(scores)
    if which not in ("highest", "lowest"):
        raise ValueError(f"which must be 'highest' or 'lowest', got {which!r}")
    if not 1 <= count <= n:
        raise ValueError(f"count must be in 1..{n}, got {count}")
    if np.isnan(scores).any():
        raise ValueError(f"scores must be numbers, got {int(np.isnan(scores).sum())} NaN of {n}")
    tie = np.random.Generator(np.random.PCG64(seed)).permutation(n)
    order = np.lexsort((tie, -scores if which == "highest" else scores))
    return np.sort(order[:count]).astype(np.int32)
