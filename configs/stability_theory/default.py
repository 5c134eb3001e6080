"""The theory of stability: every study in about a minute on two CPU cores.

python -m experiments stability_theory configs/stability_theory/default.py
python -m experiments sweep stability_theory configs/stability_theory/default.py
"""

from dynamics.config import grid
from experiments.stability_theory import Config, Diagonal, Perceptron, Robust, Sensing

config = Config(study=Diagonal())
sweep = grid(config, {"study": [Diagonal(), Perceptron(), Sensing(), Robust()]})
