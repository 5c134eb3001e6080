"""Small transformers at large learning rates: what instabilities of large ones look like in them.

Attention logits grow with the learning rate and with width until a network can't learn; normalised
queries and keys hold them. Each intervention changes one thing of a recipe (AdamW with independent
decay, clipping, warm-up, cosine), and all are paired: the same initialisation and order of batches.
Characters are predicted on a scale that two CPU cores train in minutes.

Departures: learned positions instead of rotary ones, weights from a Gaussian that is not truncated.

Reference: Wortsman et al. 2023, arXiv 2309.14322.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl

from dynamics import models, optim, task, training
from dynamics.data.rows import subset
from dynamics.data.sources import Splits
from dynamics.data.stream import stream
from dynamics.data.text import load_text
from dynamics.models.transformer import TransformerModule
from dynamics.probes import Attention, Evaluate, Outputs, Updates
from dynamics.record import Findings
from dynamics.training import Trained
from dynamics.types import Dataset, Task
from experiments.experiment import Experiment, Job, check_mesh, indices
from experiments.transformer_stability.config import Changes, Config, Rates, Text, Widths

__all__ = ["EXPERIMENT", "Changes", "Config", "Rates", "Text", "Widths", "load", "run", "sweep"]

TRAINING = 0  # purpose of the seed
APART = ("qk_norm", "mu_param", "long_warmup")  # interventions that are programs of their own
FIRST_MLP = "block_0/mlp/up/kernel"
MEASURED = {  # probe -> column -> metric; the columns of attention are called as its metrics
    "test": {"test_loss": "loss", "test_accuracy": "accuracy"},
    "outputs": {"log_z": "log_z", "output_rms": "rms"},
    "sizes": {"grad_rms": f"grad_{FIRST_MLP}", "update_rms": f"update_{FIRST_MLP}"},
}


def load(config: Config, folder: Path | str | None = None) -> Splits:
    """The text of a config; DataError says what is missing."""
    text = config.data
    fraction = text.test_fraction
    path = text.file if text.source == "file" else None
    return load_text(path, context=text.context, test_fraction=fraction, folder=folder)[0]


def study(job: Job[Config, Rates | Widths]) -> Findings:
    """Frame ``rates`` or ``widths``, for each (width, intervention, rate, replica, step) measured,
    for as long as a run had not ``diverged`` (the step; null: never).

    ``test_loss`` (nats a byte) and ``test_accuracy``; ``max_logit``, and ``max_logit_<i>`` and
    ``entropy_<i>`` of each block (``probes.Attention``); ``log_z``, ``output_rms``
    (``probes.Outputs``); ``grad_rms`` and ``update_rms`` of the first MLP layer
    (``probes.Updates``); and ``parameters``, those of the net without embeddings and head. Of
    ``Widths`` all but attention only before and after, null between. Array: ``index`` i32[N].
    """
    trained = training.by_program(members(job), "program", functools.partial(_trained, job))
    frame, at = trained.measured["attention"], ["member", "step"]
    attention = [name for name in frame.columns if name.startswith(("max_logit", "entropy"))]
    for probe, columns in MEASURED.items():
        part = trained.measured[probe].select(*at, **{c: pl.col(m) for c, m in columns.items()})
        frame = frame.join(part, on=at, how="left", maintain_order="left")
        attention += columns
    names = ("point", "width", "intervention", "rate", "replica", "step", "diverged", "parameters")
    frame = frame.with_columns(pl.col("update_rms").fill_nan(None))  # there is none at step 0
    name = type(job.study).__name__.lower()
    return Findings({name: frame.select(*names, *attention)}, indices(job.data.train))


def members(job: Job[Config, Rates | Widths]) -> pl.DataFrame:
    """The members of a study, and by which ``program`` each is trained."""

    def cells(point: Config, study: Rates | Widths) -> list[Mapping[str, Any]]:
        return [
            {"width": width, "intervention": name, "rate": rate}
            | {"program": f"d{width}-{name}" if name in APART else f"d{width}"}
            | point.optimizer.hyperparameters()
            | scalars_of(name, rate, point)
            for width, name, rate in itertools.product(
                study.widths, study.interventions, study.rates
            )
        ]

    return job.members(cells, job.study.replicas)


def scalars_of(intervention: str, rate: float, point: Config) -> dict[str, float]:
    """The hyperparameters that a rate and an intervention make of the recipe's.

    Under the independent rule a decay of rate * lambda is the usual decay lambda.
    """
    decays = {"no_decay": 0.0, "scaled_decay": rate * point.changes.scaled_decay}
    return {
        "learning_rate": rate,
        "weight_decay": decays.get(intervention, point.optimizer.weight_decay),
        "z_loss": point.changes.z_loss if intervention == "z_loss" else 0.0,
    }


def rule_of(intervention: str, point: Config) -> optim.Adam:
    """The optimizer that an intervention makes of the recipe's."""
    rule, changes = point.optimizer, point.changes
    if intervention == "mu_param":
        return dataclasses.replace(rule, base_fan_in=changes.base_fan_in)
    if intervention == "long_warmup":
        schedule = dataclasses.replace(rule.schedule, warmup=changes.warmup)
        return dataclasses.replace(rule, schedule=schedule)
    return rule


def module_of(width: int, intervention: str, config: Config, data: Splits) -> TransformerModule:
    """The network of a width and an intervention."""
    net = models.Transformer(
        width=width,
        depth=config.depth,
        num_heads=width // config.head_width,
        max_length=config.data.context,
        qk_norm=intervention == "qk_norm",
    )
    return TransformerModule(net, data.num_classes)


def parameters(net: Task) -> int:
    """How many, without embeddings and the output layer."""
    shapes, _ = jax.eval_shape(net.init, jax.random.key(0), {})
    outside = ("token_embedding", "position_embedding", "head")
    inside = {name: tree for name, tree in shapes.items() if name not in outside}
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(inside))


def _trained(job: Job[Config, Rates | Widths], group: pl.DataFrame) -> Trained:
    """The members of a program."""
    config, data, (width, name) = job.config, job.data, group.select("width", "intervention").row(0)
    module = module_of(width, name, config, data)
    net = task.z_loss(task.of_dataset(module, data.train))
    roots, program = training.keys(group, TRAINING), group["program"][0]
    sizes = {"test": config.validation, "probed": config.probed}
    return training.train(
        group.with_columns(parameters=pl.lit(parameters(net))),
        roots,
        net,
        rule_of(name, config),
        stream(data.train, config.batch_size, roots),
        job.study.last if isinstance(job.study, Widths) else config.steps,
        job.mesh,
        total=config.steps,
        scalars={"z_loss": 0.0},
        store=job.stage(program),
        name=program,
        probes=_probes(module, job.study),
        data={name: evenly(data.test, size) for name, size in sizes.items()},
    )


def _probes(module: TransformerModule, study: Rates | Widths) -> list[Any]:
    if isinstance(study, Widths):
        often, rest = (0, *range(study.first, study.last + 1)), (0, study.last)
    else:
        often = rest = study.every
    return [
        Evaluate(rest, on="test"),
        Attention(module, often, on="probed"),
        Outputs(module, rest, on="probed"),
        Updates((FIRST_MLP,), rest, on="probed"),
    ]


def evenly(data: Dataset, count: int) -> Dataset:
    """``count`` examples, or all if there are fewer, evenly apart."""
    return subset(data, np.linspace(0, len(data) - 1, min(count, len(data))).astype(np.int32))


def check(job: Job[Config, Any]) -> None:
    """ValueError unless the points of a job suit their data and mesh."""
    batch, n = job.config.batch_size, len(job.data.train)
    if batch > n:
        raise ValueError(f"batch_size must be <= the {n} training windows, got {batch}")
    for group in members(job).partition_by("program"):
        check_mesh(job.mesh, len(group), batch)


EXPERIMENT = Experiment("transformer_stability", load, study, check)
run, sweep = EXPERIMENT.run, EXPERIMENT.sweep
