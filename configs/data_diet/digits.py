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

# Each of ten retrainings goes by the average of ten runs of its own, the number of the paper: 100
# of 5 epochs, for what 20 of 20 and as many on blank inputs cost. Late scores: four runs a draw.
late = Scoring(draws=10, replicas=4, also=("vog", "pvi"))
config = Config(
    model=MLP(width=128, depth=2),
    train=Train(optimizer=SGD(learning_rate=0.02, momentum=0.9, weight_decay=5e-4), batch_size=64),
    score=Scoring(epochs=(0.0, 5.0), draws=10, replicas=10),
    study=Pruning(replicas=10, epochs=20.0),
)
early = grid(
    config,
    {"study": [Pruning(), Window(), Transfer(), Rescoring(), Velocity()], "noise": [0.2, 0.0]},
)  # the last one names the figure
sweep = early + grid(config, {"score": [late], "study": [Timing(), Ranking()], "noise": [0.2, 0.0]})
