"""Hidden features of a network, and what their singular values say."""

from dynamics.representation.features import features, of_layer
from dynamics.representation.spectrum import (
    centred,
    consistency,
    covariance,
    dominance,
    largest_singular_value_ratio,
    nmtune,
    shares,
    singular_value_entropy,
    unit,
)

__all__ = [
    "centred",
    "consistency",
    "covariance",
    "dominance",
    "features",
    "largest_singular_value_ratio",
    "nmtune",
    "of_layer",
    "shares",
    "singular_value_entropy",
    "unit",
]
