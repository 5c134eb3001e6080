"""One number per example, always in the order of the dataset.

A score is a pure function ``(task, state, batch) -> f32[B]`` of one replica in evaluation mode;
``over_examples`` runs it over a dataset, for one state or for a population.
"""

from dynamics.scores.examples import over_examples
from dynamics.scores.forward import (
    HARD,
    el2n,
    entropy,
    l1_error,
    logit_margin,
    loss,
    probability,
    probability_margin,
)
from dynamics.scores.grand import gradients, grand, grand_last_layer
from dynamics.scores.noise import Joint, confident_joint, relabelled, small_loss
from dynamics.scores.pvi import blank, pvi
from dynamics.scores.select import (
    coverage_centric,
    gradient_variance,
    keep,
    probabilities,
    quotas,
    random,
    window,
)
from dynamics.scores.tracin import tracin, tracin_self
from dynamics.scores.vog import class_normalised, dataset_normalised, input_gradient, vog

__all__ = [
    "HARD",
    "Joint",
    "blank",
    "class_normalised",
    "confident_joint",
    "dataset_normalised",
    "el2n",
    "entropy",
    "grand",
    "input_gradient",
    "keep",
    "l1_error",
    "logit_margin",
    "loss",
    "over_examples",
    "probability",
    "probability_margin",
    "pvi",
    "relabelled",
    "small_loss",
    "vog",
    "coverage_centric",
    "gradient_variance",
    "gradients",
    "grand_last_layer",
    "probabilities",
    "quotas",
    "random",
    "window",
    "tracin",
    "tracin_self",
]
