"""The edge of stability on 500 of scikit-learn's digits: a minute or two on two CPU cores.

python -m experiments stability configs/stability/digits.py
python -m experiments sweep stability configs/stability/digits.py    # all below
python -m experiments stability configs/stability/digits.py --study spectra
"""

from dynamics.config import grid
from dynamics.data import DataConfig
from dynamics.models import MLP
from experiments.stability import Batches, Config, Edge, Spectra

config = Config(
    data=DataConfig(num_train=500),
    model=MLP(width=32, depth=2, activation="tanh"),
    study=Edge(replicas=3),
)
sweep = (
    *grid(config, {"study": [Spectra()], "loss": ["cross_entropy", "squared_error"]}),
    *grid(config, {"study": [Batches(replicas=3), config.study]}),
)
