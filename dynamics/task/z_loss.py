"""The z-loss: logits whose normaliser drifts away from 1 are pulled back."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from dynamics.losses import over_labels
from dynamics.task.elr import scalars
from dynamics.task.methods import of_methods
from dynamics.types import NO_SCALARS, Aux, Batch, Key, PyTree, Scalars, Task


def z_loss(inner: Task) -> Task:
    """``inner``'s loss + z_loss mean (log Z)^2, Z = sum_c exp(logit_c), in training mode.

    The mean is over the batch, with its weights, and over the tokens of an example that have a
    label. The coefficient
    is the state's hyperparameter ``z_loss``; 0 is ``inner``. A constant added to all logits changes
    no probability, only Z; the term's gradient in logit c is 2 z_loss log Z p_c. ``aux.loss`` is
    inner's; the mean of (log Z)^2 is recorded as ``log_z_squared``. Cost: no forward pass.
    ValueError, when traced: a state without the hyperparameter.

    Reference: Chowdhery et al. 2022, arXiv 2204.02311, section 5, with 1e-4; Wortsman et al. 2023,
    arXiv 2309.14322, section 3.1.2.
    """
    return of_methods(_ZLoss(inner))


@dataclass(frozen=True)
class _ZLoss:
    inner: Task

    def init(self, key: Key, hyperparameters: Scalars = NO_SCALARS) -> tuple[PyTree, PyTree]:
        return self.inner.init(key, hyperparameters)

    def loss(
        self, params: PyTree, extras: PyTree, batch: Batch, key: Key, hyperparameters: Scalars
    ) -> tuple[jax.Array, tuple[PyTree, Aux]]:
        (coefficient,) = scalars(hyperparameters, "z_loss")
        total, (extras, aux) = self.inner.loss(params, extras, batch, key, hyperparameters)
        squares = jax.nn.logsumexp(aux.logits, axis=-1) ** 2
        each = over_labels(squares, batch.y)
        mean = each.mean() if batch.weight is None else (batch.weight * each).mean()
        mean = mean.astype(jnp.result_type(total))
        aux = dataclasses.replace(aux, scalars={**aux.scalars, "log_z_squared": mean})
        return total + coefficient * mean, (extras, aux)

    def evaluate(
        self, params: PyTree, extras: PyTree, batch: Batch, hyperparameters: Scalars
    ) -> Aux:
        return self.inner.evaluate(params, extras, batch, hyperparameters)

    def network(self, params: PyTree, extras: PyTree) -> tuple[PyTree, PyTree]:
        return self.inner.network(params, extras)

    def layout(self, extras: PyTree) -> PyTree:
        return self.inner.layout(extras)

    @property
    def num_examples(self) -> int | None:
        return self.inner.num_examples

    @property
    def bare(self) -> Task | None:
        return self.inner.bare
