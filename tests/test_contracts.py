"""The contracts of ``dynamics.testing``, over every task, optimizer, probe, revision and score."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from dynamics import models, optim, probes, scores, task, testing
from dynamics.data import shapes
from dynamics.data.rows import subset
from dynamics.data.stream import doubled, resident
from dynamics.models.transformer import TransformerModule
from dynamics.revise import Adele
from dynamics.task.multiscale import multiscale
from dynamics.types import Aux, Task

IMAGES, TOKENS = tiny.images(24), tiny.tokens(24)
MLP = task.of_dataset(models.make(models.MLP(width=8, depth=1), 4), IMAGES)
ELR = {"elr_lambda": 3.0, "elr_beta": 0.7}
PIXELS = shapes.shapes(0, n=12, noise=0.5)
UNET = models.make(models.Unet(width=2, levels=1, norm="none"), shapes.NUM_CLASSES)
TRANSFORMER = TransformerModule(models.Transformer(width=8, depth=1, num_heads=2, max_length=8), 8)
NET = task.of_dataset(TRANSFORMER, TOKENS)


def linear(params: Any, x: jax.Array) -> jax.Array:
    return x.reshape(len(x), -1) @ params["w"]


def slow(*values: Any, id: str) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow, id=id)


FUNCTION = task.of_function(linear, init=lambda key: {"w": jax.random.normal(key, (36, 4))})
CONVNET = task.of_dataset(models.make(models.Convnet(channels=(4,), norm="batch"), 4), IMAGES)


@pytest.mark.parametrize(
    ("made", "data", "scalars", "options"),
    [
        pytest.param(MLP, IMAGES, {}, {}, id="mlp"),
        pytest.param(task.elr(MLP, 24, 4), IMAGES, ELR, {}, id="elr"),
        slow(FUNCTION, IMAGES, {}, {}, id="function"),
        slow(CONVNET, IMAGES, {}, {}, id="convnet"),
        slow(NET, TOKENS, {}, {}, id="transformer"),
        slow(task.z_loss(NET), TOKENS, {"z_loss": 1e-2}, {}, id="z_loss"),
        slow(
            task.elr_plus(MLP, 24, 4, ramp=0), IMAGES, ELR, {"stream": doubled}, id="elr_plus"
        ),
        slow(
            multiscale(task.of_dataset(UNET, PIXELS)), PIXELS, {"consistency": 1.0}, {},
            id="multiscale",
        ),
    ],
)  # fmt: skip
def test_tasks(made: Task, data: Any, scalars: Any, options: Any) -> None:
    testing.check_task(made, data, scalars, **options)


RULES = [
    optim.SGD(learning_rate=0.02, weight_decay=1e-3),
    optim.Adam(learning_rate=1e-2, clip_norm=1.0),
    optim.SGD(momentum=0.0, nesterov=False, schedule=optim.Cosine(warmup=0.5)),
    optim.Adam(independent_decay=True, weight_decay=1e-3),
]


@pytest.mark.parametrize(
    "rule", [RULES[0], *(pytest.param(r, marks=pytest.mark.slow) for r in RULES[1:])], ids=str
)
def test_optimizers(rule: Any) -> None:
    testing.check_optimizer(rule.make(6), rule.hyperparameters())


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(optax.polyak_sgd(), id="polyak_sgd"),
        slow(optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()), id="plateau"),
        slow(
            optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10)),
            id="backtracking",
        ),
        slow(optax.contrib.schedule_free_sgd(0.1), id="schedule_free"),
        slow(optax.lion(1e-3), id="lion"),
        slow(optax.MultiSteps(optax.adam(1e-2), 2), id="MultiSteps"),
    ],
)
def test_optimizers_of_optax(optimizer: Any) -> None:
    made = optimizer.gradient_transformation() if hasattr(
        optimizer, "gradient_transformation"
    ) else optimizer  # fmt: skip
    testing.check_optimizer(made)


LABELS = np.stack([(IMAGES.y + k) % 4 for k in range(testing.MEMBERS)])
GROUPS = np.arange(8).reshape(2, 4)
PROBES = {
    "Evaluate": lambda: probes.Evaluate(3),
    "Forgetting": lambda: probes.Forgetting(24, 3),
    "AreaUnderMargin": lambda: probes.AreaUnderMargin(24, 3),
    "Cartography": lambda: probes.Cartography(24, 3),
    "Score": lambda: probes.Score(scores.el2n, 3, "el2n"),
    "VarianceOfGradients": lambda: probes.VarianceOfGradients(3),
    "Sharpness": lambda: probes.Sharpness(3, cold=4, warm=3),
    "BatchSharpness": lambda: probes.BatchSharpness(3, batch_size=4, num_batches=2),
    "Spectrum": lambda: probes.Spectrum(3, k=3, num=2),
    "KernelVelocity": lambda: probes.KernelVelocity(3, GROUPS),
}


@pytest.mark.parametrize(
    "name", [n if n in ("Evaluate", "Forgetting") else slow(n, id=n) for n in PROBES]
)
def test_probes(name: str) -> None:
    testing.check_probe(PROBES[name], MLP, IMAGES)


@pytest.mark.slow
def test_probes_that_hold_something_for_each_member() -> None:
    def memory(k: int) -> Any:
        return lambda: probes.Memorisation(3, LABELS[:k], IMAGES.y)

    testing.check_probe(memory(testing.MEMBERS), MLP, IMAGES, members=memory)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: probes.Attention(TRANSFORMER, 3, on="train"),
        lambda: probes.Outputs(TRANSFORMER, 3, on="train"),
        lambda: probes.Updates(("block_0/mlp/up/kernel",), 3, on="train"),
    ],
)
def test_probes_of_transformers(make: Any) -> None:
    testing.check_probe(make, NET, TOKENS, rule=optim.Adam())


@pytest.mark.slow
def test_revisions() -> None:
    labels = np.stack([np.asarray(PIXELS.y)] * testing.MEMBERS)

    def stream(k: int) -> Any:
        return resident(PIXELS, 4, k, labels=labels[:k])

    def adele() -> Any:
        return Adele(num_classes=shapes.NUM_CLASSES, every=3, epochs=2)

    testing.check_revision(adele, task.of_dataset(UNET, PIXELS), PIXELS, stream)


NAMES = ("el2n", "grand", "loss", "entropy", "logit_margin", "grand_last_layer")


@pytest.mark.parametrize("name", [n if n == "grand" else slow(n, id=n) for n in NAMES])
def test_scores(name: str) -> None:
    testing.check_score(getattr(scores, name), MLP, IMAGES)


# ---- what is broken is said ---------------------------------------------------------------------


def test_a_task_whose_examples_depend_on_each_other_is_found() -> None:
    def evaluate(params: Any, extras: Any, batch: Any, hyperparameters: Any) -> Aux:
        aux = MLP.evaluate(params, extras, batch, hyperparameters)
        return Aux(aux.loss - aux.loss.mean(), aux.logits, aux.y, aux.index)

    with pytest.raises(AssertionError, match="losses in evaluation mode, of other batches"):
        testing.check_task(MLP._replace(evaluate=evaluate), IMAGES)


def test_a_task_that_draws_from_elsewhere_is_found() -> None:
    count = iter(range(1000))

    def init(key: Any, hyperparameters: Any) -> Any:
        return MLP.init(jax.random.fold_in(key, next(count)), hyperparameters)

    with pytest.raises(AssertionError, match="init with the same key"):
        testing.check_task(MLP._replace(init=init), IMAGES)


def test_a_score_of_the_whole_batch_is_found() -> None:
    def rank(made: Any, state: Any, batch: Any) -> jax.Array:
        found = jax.lax.stop_gradient(scores.loss(made, state, batch))
        return found / jnp.float32(len(batch.index))

    with pytest.raises(AssertionError, match="scores in batches of another size"):
        testing.check_score(rank, MLP, IMAGES)


def test_a_part_of_a_dataset_is_scored_as_in_the_whole() -> None:
    made = functools.partial(task.elr, MLP)
    testing.check_score(scores.el2n, made(24, 4), subset(IMAGES, np.arange(3, 20)), ELR)
