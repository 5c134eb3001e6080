"""PVI: the bits about its label that a model family gets out of an example's input."""

import dataclasses
import math

import numpy as np
from jaxtyping import Array, Float

from dynamics.types import Dataset

Nats = Float[Array | np.ndarray, "*n"]


def pvi(loss: Nats, null_loss: Nats) -> Nats:
    """``log2 f[x](y) - log2 f[null](y) = (null_loss - loss) / ln 2``, in bits; low is hard.

    From the cross-entropy in nats (``scores.loss``) of every example under the model, and under a
    null model: one of the same family, trained on ``blank(data)``. At its optimum f[null](y) is the
    frequency of the label, so the mean over the examples is at most their label entropy H(Y).
    Negative: the model does worse on the example than knowing no input.

    Cost: the training of the null model, and a forward pass of each of the two. Reference:
    Ethayarajh, Choi and Swayamdipta 2022, arXiv 2110.08420.
    """
    return (null_loss - loss) / math.log(2)


def blank(data: Dataset) -> Dataset:
    """The same examples with inputs that say nothing: 0 after normalisation, token 0 everywhere.

    Inputs are stored as the mean itself, in its float32 (uint8 could not hold it), and as a
    read-only view of one example: they need no memory on the host.
    """
    tokens = np.size(data.std) == 0
    nothing = np.zeros((), data.x.dtype) if tokens else np.asarray(data.mean, np.float32)
    return dataclasses.replace(data, x=np.broadcast_to(nothing, data.x.shape))
