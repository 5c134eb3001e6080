"""Data Diet on all 60,000 MNIST images: minutes on two CPU cores. Needs DYNAMICS_DATA.

python -m experiments data_diet configs/data_diet/mnist.py
python -m experiments sweep data_diet configs/data_diet/mnist.py    # every study, clean and noisy
"""

from dynamics.config import grid
from dynamics.data import DataConfig
from dynamics.models import MLP
from dynamics.optim import SGD
from dynamics.training import Train
from experiments.data_diet import Config, Pruning, Ranking, Scoring, Timing, Window

config = Config(
    data=DataConfig(source="mnist"),
    model=MLP(width=128, depth=1),
    train=Train(optimizer=SGD(weight_decay=5e-4)),
    score=Scoring(epochs=(0.0, 1.0, 2.0), draws=4, replicas=3),
    study=Pruning(fractions=(0.2, 0.5), scored_at=2.0, replicas=4, epochs=3.0),
)
studies = [
    config.study,
    Timing(kept=0.2, replicas=4, epochs=3.0),
    Window(
        kept=0.2, dropped=(0.0, 0.1, 0.2, 0.25, 0.3, 0.5), scored_at=2.0, replicas=4, epochs=3.0
    ),
    Ranking(scored_at=2.0),
]
sweep = grid(config, {"study": studies, "noise": [0.0, 0.2]})
