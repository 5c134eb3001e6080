"""One number per example, always in the order of the dataset.

A score is a pure function ``(task, state, batch) -> f32[B]`` of one replica in evaluation mode;
``over_examples`` runs it over a dataset, for one state or for a population.
"""

from dynamics.scores.el2n import el2n
from dynamics.scores.examples import over_examples
from dynamics.scores.grand import grand
from dynamics.scores.select import keep

__all__ = ["el2n", "grand", "keep", "over_examples"]
