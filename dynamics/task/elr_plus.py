"""ELR+: two networks, each held to what the other's weight average says of unmixed examples."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dynamics import losses
from dynamics.task.elr import check, scalars, table_shape
from dynamics.task.methods import of_methods
from dynamics.types import NO_SCALARS, Aux, Batch, Key, PyTree, Scalars, Task, Written

Net = Literal["first", "second"]
NETS: tuple[Net, ...] = ("first", "second")


def elr_plus(
    inner: Task,
    num_examples: int,
    num_classes: int,
    *,
    mixup: float = 1.0,
    decay: float = 0.997,
    ramp: int = 40_000,
    ramp_lambda: bool = False,
    reweight: bool = False,
    reads: Net = "first",
) -> Task:
    """Two networks of ``inner`` in one state; the entries of a batch go to them by turns.

    Feed it with ``data.stream.doubled``, so that each network has its own order. At step s, for
    network k and its half of the batch, with l = max(l', 1 - l'), l' ~ Beta(mixup, mixup) and j the
    batch in reverse: x = l x_i + (1 - l) x_j, y and the targets likewise; the target of i moves to
    the softmax of the other network's average on x_i, unmixed:
    t_i = elr_beta t_i + (1 - elr_beta) p_i. Loss: CE(z(x), y) + w elr_lambda log(1 - <p(x), t>),
    the mean over the half, added over networks. Averages of the parameters decay by
    decay r(s), r(s) = exp(-5 (1 - s/ramp)^2) up to s = ramp, or by min(1 - 1/s, decay) if ``ramp``
    is 0; w = r(s) with ``ramp_lambda`` (their CIFAR-100), else 1. ``reweight`` (CIFAR-100, too)
    multiplies the mixed label by the mixed target and divides by the sum.

    A pass of the other network's average is in training mode, and leaves no batch statistics.
    ``inner``'s own loss is not used, its logits are. ``evaluate``: the mean of both networks'
    logits. ``aux``: of the mixed inputs, ``y`` of the example that weighs more. Features, and what
    else reads weights, are of the network ``reads``: for the other make the task again with
    ``reads="second"``, which trains as this one and takes the same state. Microbatches count as
    steps. State: twice inner's, twice its parameters, and 8 rows C bytes. Cost: two gradient
    evaluations and two forward passes of a half. ValueError, when traced: inputs that are no
    floats, an odd batch; at once: another network than these two; by ``fit``, before: another
    number of examples than the stream's dataset has.

    Reference: Liu et al. 2020, arXiv 2007.00151, algorithm 2 and appendix G; label re-weighting and
    the other ramp are their code's, which also draws another noise for each network: not so here.
    """
    check(inner, num_examples, num_classes)
    if reads not in NETS:
        raise ValueError(f"reads must be one of {NETS}, got {reads!r}")
    return of_methods(
        _ElrPlus(inner, num_examples, num_classes, mixup, decay, ramp, ramp_lambda, reweight, reads)
    )


@dataclass(frozen=True)
class _ElrPlus:
    inner: Task
    num_examples: int
    num_classes: int
    mixup: float
    decay: float
    ramp: int
    ramp_lambda: bool
    reweight: bool
    reads: Net

    def init(self, key: Key, hyperparameters: Scalars = NO_SCALARS) -> tuple[PyTree, PyTree]:
        made = {
            net: self.inner.init(jax.random.fold_in(key, k), hyperparameters)
            for k, net in enumerate(NETS)
        }
        shape = table_shape(self.num_examples, self.num_classes)
        params = {net: p for net, (p, _) in made.items()}
        return params, {
            "inner": {net: extras for net, (_, extras) in made.items()},
            "averages": jax.tree.map(jnp.copy, params),  # a buffer of its own, to be donated
            "targets": {net: jnp.zeros(shape, jnp.float32) for net in NETS},
            "steps": jnp.int32(0),
        }

    def loss(
        self, params: PyTree, extras: PyTree, batch: Batch, key: Key, hyperparameters: Scalars
    ) -> tuple[jax.Array, tuple[PyTree, Aux]]:
        strength, beta = scalars(hyperparameters, "elr_lambda", "elr_beta")
        halves, steps = _halves(batch), extras["steps"]
        averages = _averaged(extras["averages"], params, _decay(steps, self.decay, self.ramp))
        if self.ramp_lambda:
            strength = strength * _ramp(steps, self.ramp)
        total, inside, targets, found = jnp.float32(0), {}, {}, []
        for k, (net, other) in enumerate(zip(NETS, NETS[::-1], strict=True)):
            mine, own = halves[k], jax.random.fold_in(key, k)
            _, (_, seen) = self.inner.loss(
                averages[other], extras["inner"][other], mine, own, hyperparameters
            )
            p = jax.lax.stop_gradient(jax.nn.softmax(seen.logits.astype(jnp.float32), axis=-1))
            moved = beta * extras["targets"][net][mine.index] + (1 - beta) * p
            share = _share(own, self.mixup)
            mixed = dataclasses.replace(mine, x=_mixed(mine.x, share))
            _, (inside[net], aux) = self.inner.loss(
                params[net], extras["inner"][net], mixed, own, hyperparameters
            )
            each = _cross_entropy(aux.logits, mine.y, share, moved if self.reweight else None)
            held = losses.elr(aux.logits, _mixed(moved, share))
            weight = jnp.float32(1) if batch.weight is None else mine.weight
            total += (weight * (each + strength * held)).mean()
            targets[net] = Written(mine.index, moved)
            found.append((aux.logits, each, held.mean()))
        logits, each = (jnp.stack(xs, axis=1) for xs in list(zip(*found, strict=True))[:2])
        aux = Aux(
            loss=each.reshape(-1),
            logits=logits.reshape(-1, self.num_classes),
            y=batch.y,
            index=batch.index,
            scalars={"elr": (found[0][2] + found[1][2]) / 2},
        )
        extras = {"inner": inside, "averages": averages, "targets": targets, "steps": steps + 1}
        return total, (extras, aux)

    def evaluate(
        self, params: PyTree, extras: PyTree, batch: Batch, hyperparameters: Scalars
    ) -> Aux:
        found = [
            self.inner.evaluate(params[net], extras["inner"][net], batch, hyperparameters).logits
            for net in NETS
        ]
        logits = (found[0] + found[1]) / 2
        each = losses.cross_entropy(logits, batch.y)
        return Aux(loss=each, logits=logits, y=batch.y, index=batch.index)

    def network(self, params: PyTree, extras: PyTree) -> tuple[PyTree, PyTree]:
        return self.inner.network(params[self.reads], extras["inner"][self.reads])

    def layout(self, extras: PyTree) -> PyTree:
        return {
            "inner": {net: self.inner.layout(extras["inner"][net]) for net in NETS},
            "averages": "parameters",
            "targets": "examples",
            "steps": "replicated",
        }

    @property
    def bare(self) -> Task:
        return self.inner.bare or self.inner


def _halves(batch: Batch) -> list[Batch]:
    """The even and the odd entries: halves of a batch that is split over devices stay there."""
    if not jnp.issubdtype(batch.x.dtype, jnp.floating):
        raise ValueError(f"elr_plus mixes inputs, which must be floats, got {batch.x.dtype}")
    if len(batch.index) % 2:
        raise ValueError(
            f"elr_plus needs an even batch, half of it for each network, got {len(batch.index)}: "
            "use data.stream.doubled"
        )
    pairs = jax.tree.map(lambda x: x.reshape(-1, 2, *x.shape[1:]), batch)
    return [jax.tree.map(lambda x, k=k: x[:, k], pairs) for k in range(2)]


def _share(key: Key, mixup: float) -> jax.Array:
    drawn = jax.random.beta(key, mixup, mixup)
    return jnp.maximum(drawn, 1 - drawn)


def _mixed(x: jax.Array, share: jax.Array) -> jax.Array:
    return share * x + (1 - share) * x[::-1]


def _cross_entropy(
    logits: jax.Array, labels: jax.Array, share: jax.Array, targets: jax.Array | None
) -> jax.Array:
    """Against the mixed labels, times the mixed targets if given."""
    if targets is None:
        each, other = (losses.cross_entropy(logits, y) for y in (labels, labels[::-1]))
        return share * each + (1 - share) * other
    onehot = losses.at_label(logits, labels).astype(jnp.float32)
    wanted = _mixed(onehot, share) * _mixed(targets, share)
    wanted /= wanted.sum(axis=-1, keepdims=True)
    known = losses.counted(labels) | losses.counted(labels[::-1])
    wanted = jnp.where(known[:, None], wanted, 0)
    return -jnp.sum(wanted * jax.nn.log_softmax(logits, axis=-1), axis=-1)


def _averaged(averages: PyTree, params: PyTree, decay: jax.Array) -> PyTree:
    """The average before the parameters of now, which the last step left, and with them."""
    return jax.tree.map(
        lambda a, p: decay * a + (1 - decay) * jax.lax.stop_gradient(p), averages, params
    )


def _decay(steps: jax.Array, decay: float, ramp: int) -> jax.Array:
    """Of the average that takes in the parameters after ``steps`` steps."""
    if ramp:
        return decay * _ramp(steps, ramp)
    done = steps.astype(jnp.float32)
    return jnp.minimum(1 - 1 / jnp.maximum(done, 1), decay)


def _ramp(steps: jax.Array, ramp: int) -> jax.Array:
    left: Any = 1 - jnp.minimum(steps.astype(jnp.float32) / max(ramp, 1), 1)
    return jnp.exp(-5 * left**2)
