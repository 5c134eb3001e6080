"""Segmentation from noisy outlines, a disk and a square: five minutes on two CPU cores, the
sweep of both studies ten.

python -m experiments segmentation_noise configs/segmentation_noise/shapes.py
python -m experiments sweep segmentation_noise configs/segmentation_noise/shapes.py
"""

from dynamics.config import grid
from dynamics.models import Unet
from dynamics.optim import Adam
from dynamics.training import Train
from experiments.segmentation_noise import Comparison, Config, Timing

config = Config(
    model=Unet(width=8, levels=2, norm="none"),
    train=Train(optimizer=Adam(learning_rate=3e-3), batch_size=5),
    epochs=60,
    study=Comparison(replicas=4),
)
sweep = grid(config, {"study": [Timing(replicas=4), Comparison(replicas=4)]})
