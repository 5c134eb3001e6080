"""Memorisation of wrong labels on 4,000 images of CIFAR-10: a convnet, many minutes on two cores.

python -m experiments early_learning configs/early_learning/cifar10_small.py
"""

from dynamics.data import DataConfig
from dynamics.models import Convnet
from dynamics.optim import SGD, Cosine
from dynamics.training import Train
from experiments.early_learning import Config, Curves

config = Config(
    data=DataConfig(source="cifar10", num_train=4000, num_test=1000),
    model=Convnet(channels=(16, 32, 64), norm="batch"),
    train=Train(
        optimizer=SGD(
            learning_rate=0.02,
            momentum=0.9,
            nesterov=False,
            weight_decay=1e-3,
            schedule=Cosine(final=0.05),
        ),
        batch_size=100,
    ),
    epochs=30.0,
    noise="symmetric",
    rate=0.4,
    strength=3.0,
    beta=0.7,
    study=Curves(replicas=2, every=2.0, detected_at=(4.0,)),
)
