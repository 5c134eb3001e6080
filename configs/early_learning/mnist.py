"""Memorisation of wrong labels on MNIST, 60,000 examples: minutes on two CPU cores.

python -m experiments early_learning configs/early_learning/mnist.py
python -m experiments sweep early_learning configs/early_learning/mnist.py    # and rates
"""

from dynamics.config import grid
from dynamics.data import DataConfig
from dynamics.models import MLP
from dynamics.optim import Train
from experiments.early_learning import Config, Curves, Plus, Rates

config = Config(
    data=DataConfig(source="mnist"),
    model=MLP(width=256, depth=2),
    train=Train(
        learning_rate=0.02, momentum=0.9, nesterov=False, weight_decay=1e-3, batch_size=128
    ),
    epochs=40.0,
    rate=0.4,
    strength=7.0,
    beta=0.7,
    plus=Plus(ramp=9_000),
    study=Curves(replicas=3, every=2.0, detected_at=(2.0,)),
)
sweep = grid(config, {"study": [Rates(replicas=3), config.study]})
