"""The theory of early learning: every study in about a minute on two CPU cores.

python -m experiments early_learning_theory configs/early_learning_theory/default.py
python -m experiments sweep early_learning_theory configs/early_learning_theory/default.py
"""

from dynamics.config import grid
from experiments.early_learning_theory import Basin, Config, Distillation, Phases

config = Config(study=Phases())
sweep = grid(config, {"study": [Phases(), Basin(), Distillation()]})
