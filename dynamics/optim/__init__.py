"""Optimizers from configs, whose scalars may differ between the replicas of one program.

A rule is one file with one frozen config, a member of ``Optimizer``, and these methods:

``make(num_steps)``: the optimizer of a run of so many steps. Configs that differ in ``Replica``
numbers alone give the same object, so that a program compiled with it is found again.
``hyperparameters()``: the scalars that this optimizer reads from the state.
``threshold(learning_rate, hyperparameters=)``: how sharp a quadratic the rule can descend.
``preconditioner(opt_state, hyperparameters)``: what it divides by, or None if by nothing.
"""

from dynamics.optim.adam import Adam
from dynamics.optim.schedule import Constant, Cosine, Linear, Schedule, Steps, factor, rate
from dynamics.optim.sgd import SGD
from dynamics.optim.transforms import by_fan_in, by_hyperparameters, independent_decay

__all__ = [
    "SGD",
    "Adam",
    "Constant",
    "Cosine",
    "Linear",
    "Optimizer",
    "Schedule",
    "Steps",
    "by_fan_in",
    "by_hyperparameters",
    "factor",
    "independent_decay",
    "rate",
]

Optimizer = SGD | Adam
