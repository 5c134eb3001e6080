"""The plans of docs/scaling.md: ``python -m benchmarks.plans [NAME ...] [--on v5e:4x4 ...]``.

Nothing is run, so no data are needed: what the examples are does not change a program. libtpu is.
"""

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from dynamics import fit, mesh, models, optim, plan, scores, task
from dynamics.data.stream import resident
from dynamics.models.resnet import ResNetModule
from dynamics.probes import Score, Sharpness
from dynamics.types import Dataset
from experiments import plan as words

STEPS = 1000


class Stemmed(nn.Module):
    """ResNet-50 behind the stem of large images, which ours for 32 x 32 does not have."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits of [B, 224, 224, 3]: 7x7 with stride 2 and a max-pool, then 56 x 56."""
        h = nn.Conv(64, (7, 7), (2, 2), use_bias=False, dtype=jnp.bfloat16, name="first")(x)
        h = nn.max_pool(h, (3, 3), (2, 2), "SAME").astype(jnp.float32)
        net = models.ResNet(depth=50, precision="bfloat16")
        return ResNetModule(net, 1000, name="rest")(h, train=train)


def examples(count: int, *shape: int, tokens: bool = False) -> Dataset:
    """Zeros that take no memory, as they would be stored."""
    kind, size = (np.uint16, 0) if tokens else (np.uint8, shape[-1])
    x = np.broadcast_to(kind(0), (count, *shape))
    y = np.broadcast_to(np.int32(0), x.shape if tokens else (count,))
    index = np.arange(count, dtype=np.int32)
    return Dataset(x, y, index, np.zeros(size, np.float32), np.ones(size, np.float32))


def resnet50(on: list, kind: str) -> plan.Planned:
    """EL2N of images of 224 x 224 by 10 replicas; training at batch 256 beside it."""
    data = examples(512, 224, 224, 3)  # 1.28 million go through the same programs
    net = task.of_dataset(Stemmed(), data)
    el2n = Score(scores.el2n, net, data, 1, "el2n")
    where = mesh.make(10, 1, 1, devices=on)
    return planned(net, data, optim.Train(batch_size=256, momentum=0.9), 10, where, [el2n])


def transformer(on: list, kind: str) -> plan.Planned:
    """1.1e9 parameters, Adam, a sequence of 1,024 tokens a chip; sharpness by 10 products."""
    data = examples(4096, 1024, tokens=True)
    net = models.Transformer(
        width=2048, depth=20, num_heads=16, max_length=1024, precision="bfloat16"
    )
    made = task.of_dataset(models.make(net, 32768), data)
    some = examples(len(on), 1024, tokens=True)
    sharpness = Sharpness(made, some, 100, cold=10)
    train = optim.Train(rule="adam", batch_size=len(on), weight_decay=0.1)
    where = mesh.make(1, len(on), 1, devices=on)
    return planned(made, data, train, 1, where, [sharpness], mesh.FULLY_SHARDED)


def population(on: list, kind: str) -> plan.Planned:
    """1,000 replicas of 64-128-128-10 on digits, on the mesh of least time."""
    data = examples(1437, 8, 8, 1)
    net = task.of_dataset(models.make(models.MLP(width=128, depth=2), 10), data)
    train = optim.Train(batch_size=64, momentum=0.9)
    work = planned(net, data, train, 1000, mesh.make(devices=on)).work()
    best = words.ranked(work, len(on), words.CHIPS.get(kind, words.CORE))[0]
    el2n = Score(scores.el2n, net, data, 1, "el2n")
    return planned(net, data, train, 1000, mesh.make(*best, devices=on), [el2n])


def planned(
    net: task.Task,
    data: Dataset,
    train: optim.Train,
    replicas: int,
    where: Mesh,
    probes: list | None = None,
    rules: mesh.Rules = mesh.TENSOR_PARALLEL,
) -> plan.Planned:
    """What ``fit`` would run."""
    optimizer, scalars = optim.make(train, STEPS), optim.hyperparameters(train)
    keys = jax.random.split(jax.random.key(0), replicas)
    state = fit.init(net, optimizer, keys, scalars, where, rules)
    stream = resident(data, train.batch_size, replicas)
    try:
        fit.fit(net, optimizer, state, stream, STEPS, where, probes=probes or (), rules=rules)
    except plan.Planned as found:
        return found
    raise ValueError(f"{where} is of this machine: give a mesh of mesh.topology(name)")


PLANS: dict[str, Callable[[list, str], plan.Planned]] = {
    "resnet50": resnet50,
    "transformer": transformer,
    "population": population,
}


def main() -> None:
    """Print every plan, and how long it took."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plans", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PLANS))
    parser.add_argument("--on", nargs="+", default=["v5e:4x4", "v5p:4x4x4"])
    options = parser.parse_args()
    mesh.start(cache=False)
    for topology in options.on:
        for name in options.names or PLANS:
            began, kind = time.monotonic(), topology.partition(":")[0]
            found = PLANS[name](mesh.topology(topology), kind).compile()
            print("\n".join(words.report(found, topology, words.CHIPS.get(kind))))
            print(f"({name}, planned in {time.monotonic() - began:.0f} s)\n", flush=True)


if __name__ == "__main__":
    main()
