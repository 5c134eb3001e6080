"""Data Diet on scikit-learn's digits: under a minute on two CPU cores, the sweep about five.

python -m experiments data_diet configs/data_diet/digits.py
python -m experiments sweep data_diet configs/data_diet/digits.py    # every study, clean and noisy
"""

from dynamics.config import grid
from dynamics.models import MLP
from dynamics.optim import SGD
from dynamics.training import Train
from experiments.data_diet import (
    Config,
    Pruning,
    Ranking,
    Rescoring,
    Scoring,
    Timing,
    Transfer,
    Velocity,
    Window,
)

config = Config(
    model=MLP(width=128, depth=2),
    train=Train(optimizer=SGD(learning_rate=0.02, momentum=0.9, weight_decay=5e-4), batch_size=64),
    score=Scoring(replicas=20, also=("vog", "pvi")),  # GraNd at init needs more than the usual 10
    study=Pruning(replicas=10, epochs=20.0),
)
studies = [Pruning(), Timing(), Window(), Ranking(), Transfer(), Rescoring(), Velocity()]
sweep = grid(config, {"study": studies, "noise": [0.2, 0.0]})  # the last one names the figure
