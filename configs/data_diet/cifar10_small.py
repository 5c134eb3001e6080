"""Data Diet on 2,000 CIFAR-10 images with a small ResNet: minutes on a CPU. Needs DYNAMICS_DATA.

python -m experiments data_diet configs/data_diet/cifar10_small.py

Says what the method does at this size, which is not what the paper measured at full size.
"""

from dynamics.config import grid
from dynamics.data import DataConfig
from dynamics.models import ResNet
from dynamics.optim import SGD, Steps
from dynamics.training import Train
from experiments.data_diet import Config, Pruning, Ranking, Scoring

config = Config(
    data=DataConfig(source="cifar10", num_train=2_000, num_test=1_000),
    model=ResNet(depth=8, width=8),
    train=Train(
        optimizer=SGD(
            learning_rate=0.1,
            momentum=0.9,
            weight_decay=5e-4,
            schedule=Steps(milestones=(0.6, 0.85), decay=0.2),
        ),
        batch_size=50,
        augment="crop_flip",
    ),
    score=Scoring(epochs=(0.0, 4.0), horizon=10.0, draws=3, replicas=2),
    study=Pruning(
        fractions=(0.3,),
        methods=("random", "el2n_hard", "el2n_easy", "grand_init_hard"),
        scored_at=4.0,
        replicas=3,
        epochs=10.0,
    ),
)
sweep = grid(config, {"study": [config.study, Ranking(scored_at=4.0)], "noise": [0.0, 0.2]})
