"""The plans of docs/scaling.md: ``python -m benchmarks.plans [NAME ...] [--on v5e:4x4 ...]``.

Nothing is run, so no data are needed: what the examples are does not change a program. libtpu is.
"""

import argparse
import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from dynamics import fit, mesh, models, optim, plan, population, scores, task
from dynamics.data.stream import resident
from dynamics.models.resnet import ResNetModule
from dynamics.probes import Score, Sharpness
from dynamics.training import Train
from dynamics.types import Batch, Dataset, Task, TrainState
from runner import plan as words

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
    return Dataset(x, y, np.zeros(size, np.float32), np.ones(size, np.float32))


def resnet50(on: list, topology: str) -> Iterator[str]:
    """EL2N of 256 images of 224 x 224 by 10 replicas; no step."""
    net, chip = task.of_dataset(Stemmed(), examples(1, 224, 224, 3)), chip_of(topology)
    where = mesh.make(2, len(on) // 2, 1, devices=on)
    keys = jax.random.split(jax.random.key(0), 10)
    state = fit.init(net, optim.SGD().make(STEPS), keys, {}, where)
    images = mesh.placed(Batch(*batch_of(256, 224, 224, 3)), mesh.everywhere(where))

    def score(state: TrainState, batch: Batch) -> jax.Array:
        return mesh.whole_here(scores.el2n(net, state, mesh.split_here(batch)))

    el2n = population.spread(score, where, "vmap")
    compiled = jax.jit(el2n).lower(state, images).compile()
    found = plan.read("el2n of 256 images", compiled, where)
    yield from words.described(found, chip, dict(where.shape), "a batch")
    yield f"  parameters, optimizer, statistics: {plan.held(state) / 1e6:,.0f} MB a chip"
    if chip:
        rate = 256 / max(words.times(found, chip, dict(where.shape)))
        yield f"  at most {rate:,.0f} images a second, {rate * 150528 / 1e9:.2f} GB fed"
        yield f"  1.28 million images: at least {1.28e6 / rate:.0f} s"


def batch_of(count: int, *shape: int) -> tuple[Any, Any, Any]:
    """Shapes of inputs, labels and places."""
    labels = jax.ShapeDtypeStruct((count,), np.int32)
    return jax.ShapeDtypeStruct((count, *shape), np.float32), labels, labels


def transformer(on: list, topology: str) -> Iterator[str]:
    """1.1e9 parameters, Adam, a sequence of 1,024 tokens a chip; sharpness by 10 products."""
    data = examples(4096, 1024, tokens=True)
    net = models.Transformer(width=2048, depth=20, num_heads=16, max_length=1024)
    some = examples(len(on), 1024, tokens=True)  # of a product
    half = dataclasses.replace(net, precision="bfloat16")
    exact, made = (task.of_dataset(models.make(one, 32768), data) for one in (net, half))
    made = made._replace(evaluate=exact.evaluate)  # curvature is of the loss in float32
    train = Train(optimizer=optim.Adam(weight_decay=0.1), batch_size=len(on))
    where = mesh.make(1, len(on), 1, devices=on)
    sharpness = Sharpness(100, on="some", cold=10)
    seen = {"some": some}
    found = planned(made, data, train, 1, where, [sharpness], mesh.FULLY_SHARDED, seen).compile()
    yield from words.report(found, topology, chip_of(topology))


def many(on: list, topology: str) -> Iterator[str]:
    """1,000 and 1,024 replicas of 64-128-128-10 on digits, on the mesh of least time."""
    data, chip = examples(1437, 8, 8, 1), chip_of(topology)
    net = task.of_dataset(models.make(models.MLP(width=128, depth=2), 10), data)
    train = Train(optimizer=optim.SGD(momentum=0.9), batch_size=64)
    el2n = Score(scores.el2n, 1, "el2n")
    for count in (1000, 1024):
        work = planned(net, data, train, count, mesh.make(devices=on)).work()
        best = words.ranked(work, len(on), chip or words.CORE, words.fewest(on))[0]
        where = mesh.make(*best, devices=on)
        found = planned(net, data, train, count, where, [el2n]).compile()
        yield from words.report(found, topology, chip)


def chip_of(topology: str) -> words.Chip | None:
    """The public figures of its chips."""
    return words.CHIPS.get(topology.partition(":")[0])


def planned(
    net: Task,
    data: Dataset,
    train: Train,
    replicas: int,
    where: Mesh,
    probes: list | None = None,
    rules: mesh.Rules = mesh.TENSOR_PARALLEL,
    seen: Mapping[str, Dataset] | None = None,
) -> plan.Planned:
    """What ``fit`` would run; probes see the data as train, or those given."""
    rule = train.optimizer
    optimizer, scalars = rule.make(STEPS), rule.hyperparameters()
    keys = jax.random.split(jax.random.key(0), replicas)
    state = fit.init(net, optimizer, keys, scalars, where, rules)
    stream = resident(data, train.batch_size, replicas)
    try:
        fit.fit(
            *(net, optimizer, state, stream, STEPS, where),
            probes=probes or (),
            data=seen or {"train": data},
            rules=rules,
        )
    except plan.Planned as found:
        return found
    raise ValueError(f"{where} is of this machine: give a mesh of mesh.topology(name)")


PLANS = {"many": many, "resnet50": resnet50, "transformer": transformer}


def main() -> None:
    """Print every plan, and how long it took."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plans", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PLANS))
    parser.add_argument("--on", nargs="+", default=["v5e:4x4", "v5p:4x4x4"])
    options = parser.parse_args()
    mesh.start(cache=False)
    for topology in options.on:
        for name in options.names or PLANS:
            began = time.monotonic()
            print("\n".join(PLANS[name](mesh.topology(topology), topology)))
            print(f"({name} on {topology}: {time.monotonic() - began:.0f} s)\n", flush=True)


if __name__ == "__main__":
    main()
