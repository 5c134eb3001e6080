"""Data Diet on 10,000 MNIST images: some minutes on two CPU cores. Needs DYNAMICS_DATA.

python -m experiments data_diet configs/data_diet/mnist.py
"""

from dynamics.data import DataConfig
from dynamics.models import MLP
from dynamics.optim import Train
from experiments.data_diet import Config, Pruning, Scoring

config = Config(
    data=DataConfig(source="mnist", num_train=10_000),
    model=MLP(width=128, depth=1),
    train=Train(weight_decay=5e-4),
    score=Scoring(epochs=2.0, replicas=4),
    prune=Pruning(fractions=(0.2, 0.3, 0.5), replicas=6, epochs=3.0),
)
