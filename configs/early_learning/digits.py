"""Memorisation of wrong labels on scikit-learn's digits: seconds, the sweep a few minutes.

python -m experiments early_learning configs/early_learning/digits.py
python -m experiments sweep early_learning configs/early_learning/digits.py    # every study
"""

from dynamics.config import grid
from dynamics.data import DataConfig
from dynamics.models import MLP
from dynamics.optim import SGD
from dynamics.training import Train
from experiments.early_learning import Config, Curves, Grid, Plus, Rates

config = Config(
    data=DataConfig(test_fraction=1 / 3),
    model=MLP(width=256, depth=2),
    train=Train(
        optimizer=SGD(learning_rate=0.02, momentum=0.9, nesterov=False, weight_decay=1e-3),
        batch_size=64,
    ),
    epochs=40.0,
    rate=0.4,
    strength=7.0,
    beta=0.7,
    plus=Plus(decay=0.99, ramp=400),
    study=Curves(replicas=10),
)
sweep = grid(config, {"study": [Rates(replicas=5), Grid(replicas=4), Curves(replicas=10)]})
