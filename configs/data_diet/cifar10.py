"""Data Diet as in the paper: CIFAR-10, ResNet-18, 200 epochs, 4 retrainings by 10 runs each.

python -m experiments data_diet configs/data_diet/cifar10.py    # on an accelerator

Needs DYNAMICS_DATA.

Expected: 124 trainings of 200 epochs and 40 of 20, 4.2e18 FLOPs in all (3 x 0.557 G multiply-adds
an image): computed, not measured, 11 hours at 100 TFLOP/s. In the paper, 50 % kept by EL2N loses
nothing, and GraNd at initialisation, which it prunes 50 % by, does not reproduce (arXiv 2303.14753:
95.2 % against 92.2 % test accuracy, 93.5 % for a random half).

Differs from the reference code: a crop for each image, not one for a batch.
"""

from dynamics.config import grid
from dynamics.data import DataConfig
from dynamics.models import ResNet
from dynamics.optim import SGD, Steps
from dynamics.training import Train
from experiments.data_diet import Config, Connectivity, Pruning, Ranking, Scoring, Timing, Window

config = Config(
    data=DataConfig(source="cifar10"),
    model=ResNet(depth=18, width=64, precision="bfloat16"),
    train=Train(
        optimizer=SGD(
            learning_rate=0.1,
            momentum=0.9,
            weight_decay=5e-4,
            schedule=Steps(milestones=(0.3, 0.6, 0.8), decay=0.2),
        ),
        batch_size=128,
        augment="crop_flip",
    ),
    score=Scoring(epochs=(0.0, 1.0, 2.0, 5.0, 10.0, 20.0), horizon=200.0, draws=4, replicas=10),
    study=Pruning(fractions=(0.2, 0.3, 0.4, 0.5, 0.75), scored_at=20.0, replicas=4, epochs=200.0),
)
studies = [
    config.study,
    Timing(kept=0.5, replicas=4, epochs=200.0),
    Window(
        kept=0.4,
        dropped=(0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.6),
        scored_at=10.0,
        replicas=4,
        epochs=200.0,
    ),
    Ranking(scored_at=20.0),
    Connectivity(
        spawn=(0.0, 1.0, 5.0, 20.0), examples=1000, scored_at=20.0, replicas=4, epochs=200.0
    ),
]
sweep = grid(config, {"study": studies, "noise": [0.0, 0.1]})
