"""Data Diet on scikit-learn's digits: about a minute on two CPU cores.

python -m experiments data_diet configs/data_diet/digits.py
"""

from dynamics.models import MLP
from dynamics.optim import Train
from experiments.data_diet import Config, Pruning, Scoring

config = Config(
    model=MLP(width=128, depth=2),
    train=Train(learning_rate=0.02, momentum=0.9, weight_decay=5e-4, batch_size=64),
    score=Scoring(epochs=5.0, replicas=20),  # GraNd at initialisation needs more than the usual 10
    prune=Pruning(fractions=(0.1, 0.2, 0.3, 0.5, 0.7), replicas=10, epochs=20.0),
)
