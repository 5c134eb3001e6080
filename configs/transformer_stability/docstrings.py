"""Small transformers on Python's own documentation: minutes on two cores, and needs no files.

python -m experiments transformer_stability configs/transformer_stability/docstrings.py
python -m experiments sweep transformer_stability configs/transformer_stability/docstrings.py
"""

from dynamics.config import grid
from experiments.transformer_stability import Config, Rates, Widths

config = Config(study=Rates())
sweep = grid(config, {"study": [Rates(), Widths()]})
