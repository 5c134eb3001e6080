"""The error barrier between children on digits, clean and with wrong labels: minutes on a CPU.

python -m experiments sweep data_diet configs/data_diet/digits_connectivity.py
"""

from dynamics.config import grid
from dynamics.models import MLP
from dynamics.optim import SGD
from dynamics.training import Train
from experiments.data_diet import Config, Connectivity, Scoring

config = Config(
    model=MLP(width=128, depth=1),
    train=Train(optimizer=SGD(learning_rate=0.05, momentum=0.9), batch_size=32),
    score=Scoring(epochs=(5.0,), draws=8, replicas=4),
    study=Connectivity(replicas=8, epochs=40.0),
    noise=0.2,
)
sweep = grid(config, {"noise": [0.0, 0.1, 0.2]})
