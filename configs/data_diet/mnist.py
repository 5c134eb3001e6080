"""Data Diet on 20,000 MNIST images: two minutes on two CPU cores. Needs DYNAMICS_DATA.

python -m experiments data_diet configs/data_diet/mnist.py
"""

from dynamics.data import DataConfig
from dynamics.models import MLP
from dynamics.optim import Train
from experiments.data_diet import Config, Pruning, Scoring

config = Config(
    data=DataConfig(source="mnist", num_train=20_000),
    model=MLP(width=128, depth=1),
    train=Train(weight_decay=5e-4),
    score=Scoring(epochs=2.0, replicas=10),
    prune=Pruning(fractions=(0.2, 0.3, 0.5), replicas=6, epochs=3.0),
)
