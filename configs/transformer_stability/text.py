"""The same on a text of the data folder, at two widths: an hour on two cores.

python -m experiments transformer_stability configs/transformer_stability/text.py
python -m experiments sweep transformer_stability configs/transformer_stability/text.py
"""

from dynamics.config import grid
from experiments.transformer_stability import Config, Rates, Text, Widths

config = Config(
    data=Text(source="file", file="text/tinyshakespeare.txt"),
    study=Rates(
        interventions=("none", "qk_norm", "z_loss", "scaled_decay", "mu_param"), widths=(32, 64)
    ),
)
sweep = grid(config, {"study": [config.study, Widths()]})
