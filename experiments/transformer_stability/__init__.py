"""Small transformers at large learning rates: what instabilities of large ones look like in them.

Attention logits grow with the learning rate and with width until a network can't learn; normalised
queries and keys hold them. Each intervention changes one thing of a recipe (AdamW with independent
decay, clipping, warm-up, cosine), and all are paired: the same initialisation and order of batches.
Characters are predicted on a scale that two CPU cores train in minutes.

Departures: learned positions instead of rotary ones, weights from a Gaussian that is not truncated.

Reference: Wortsman et al. 2023, arXiv 2309.14322.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dynamics import mesh as meshes
from dynamics import models, optim, record, task
from dynamics.data import sources
from dynamics.data.sources import Splits
from dynamics.data.text import load_text
from dynamics.models.transformer import TransformerModule
from dynamics.probes import Attention, Evaluate, Outputs, Updates
from dynamics.record import Recorder, Table
from dynamics.types import Dataset, Results, Task
from experiments import training
from experiments.transformer_stability.config import Changes, Config, Rates, Text, Widths

__all__ = ["Changes", "Config", "Rates", "Text", "Widths", "load", "run", "sweep"]

TRAINING = 0  # purpose of the seed
FIRST_MLP = "block_0/mlp/up/kernel"
MEASURED = {  # a probe's metric -> column
    "test.loss": "test_loss",
    "test.accuracy": "test_accuracy",
    "outputs.log_z": "log_z",
    "outputs.rms": "output_rms",
    f"sizes.grad_{FIRST_MLP}": "grad_rms",
    f"sizes.update_{FIRST_MLP}": "update_rms",
}


class Cell(NamedTuple):
    """What differs within a study, beside the seed."""

    width: int
    intervention: str
    rate: float


class Program(NamedTuple):
    """What is compiled apart; cells of one program train together."""

    width: int
    qk_norm: bool
    mu_param: bool
    long_warmup: bool

    def __str__(self) -> str:
        parts = [name for name in self._fields[1:] if getattr(self, name)]
        return "-".join([f"d{self.width}", *parts])


def load(config: Config, folder: Path | str | None = None) -> Splits:
    """The text of a config; DataError says what is missing."""
    text = config.data
    fraction = text.test_fraction
    path = text.file if text.source == "file" else None
    return load_text(path, context=text.context, test_fraction=fraction, folder=folder)[0]


def run(
    config: Config, data: Splits, mesh: Mesh | None = None, *, store: Path | str | None = None
) -> Table:
    """One point of ``sweep``."""
    return sweep((config,), data, mesh, store=store)[0]


def sweep(
    configs: Sequence[Config],
    data: Splits,
    mesh: Mesh | None = None,
    *,
    store: Path | str | None = None,
) -> list[Table]:
    """The study at every point; points differ in Replica fields only.

    Rows of stage ``rates`` or ``widths``, for each (width, intervention, rate, replica, step)
    measured: ``test_loss`` (nats a byte, nan after a run diverged) and ``test_accuracy``;
    ``max_logit``, and ``max_logit_<i>`` and ``entropy_<i>`` of each block (``probes.Attention``);
    ``log_z``, ``output_rms`` (``probes.Outputs``); ``grad_rms`` and ``update_rms`` of the first MLP
    layer (``probes.Updates``); ``parameters``, those of the net without embeddings and head; and
    ``diverged``, the step. Of ``Widths`` all but attention only before and after. Array: ``index``
    i32[N]. ValueError: a batch or a mesh that does not suit the data or the population.
    """
    _check(configs, data, mesh)
    about = {"data": sources.digest(data.train) + sources.digest(data.test), "source": data.name}
    folder = None if store is None else Path(store, "transformer_stability")

    def compute(points: Sequence[Config], recorder: Recorder | None) -> list[Table]:
        return _tables(points, data, mesh, recorder)

    return record.completed(folder, configs, compute, about)


def cells(point: Config) -> list[Cell]:
    """What the study of a point compares."""
    study = point.study
    return [Cell(*c) for c in itertools.product(study.widths, study.interventions, study.rates)]


def program_of(cell: Cell) -> Program:
    """What the cell's width and intervention make of the program."""
    changed = (cell.intervention == name for name in Program._fields[1:])
    return Program(cell.width, *changed)


def scalars_of(cell: Cell, point: Config) -> dict[str, float]:
    """The hyperparameters of a cell: what its rate and intervention make of the recipe's.

    Under the independent rule a decay of rate * lambda is the usual decay lambda.
    """
    decays = {"no_decay": 0.0, "scaled_decay": cell.rate * point.changes.scaled_decay}
    return {
        "learning_rate": cell.rate,
        "weight_decay": decays.get(cell.intervention, point.train.weight_decay),
        "z_loss": point.changes.z_loss if cell.intervention == "z_loss" else 0.0,
    }


def settings_of(program: Program, point: Config) -> optim.Train:
    """What the program makes of the recipe."""
    train, changes = point.train, point.changes
    assert isinstance(train.schedule, optim.Cosine | optim.Linear)
    schedule = train.schedule
    if program.long_warmup:
        schedule = dataclasses.replace(schedule, warmup=changes.warmup)
    base = changes.base_fan_in if program.mu_param else 0
    return dataclasses.replace(train, schedule=schedule, base_fan_in=base)


def module_of(program: Program, config: Config, data: Splits) -> TransformerModule:
    """The network of a program."""
    net = models.Transformer(
        width=program.width,
        depth=config.depth,
        num_heads=program.width // config.head_width,
        max_length=config.data.context,
        qk_norm=program.qk_norm,
    )
    return TransformerModule(net, data.num_classes)


def parameters(net: Task) -> int:
    """How many, without embeddings and the output layer."""
    shapes, _ = jax.eval_shape(net.init, jax.random.key(0))
    outside = ("token_embedding", "position_embedding", "head")
    inside = {name: tree for name, tree in shapes.items() if name not in outside}
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(inside))


def _tables(
    points: Sequence[Config], data: Splits, mesh: Mesh | None, recorder: Recorder | None
) -> list[Table]:
    mine = cells(points[0])  # points differ in no field that makes cells
    parts: list[list[dict[str, np.ndarray]]] = [[] for _ in points]
    for program in dict.fromkeys(program_of(cell) for cell in mine):
        group = [cell for cell in mine if program_of(cell) == program]
        for p, columns in enumerate(_trained(program, points, group, data, mesh, recorder)):
            parts[p].append(columns)
    index = {"index": np.asarray(data.train.index)}
    return [
        Table({name: np.concatenate([part[name] for part in some]) for name in some[0]}, index)
        for some in parts
    ]


def _trained(
    program: Program,
    points: Sequence[Config],
    group: Sequence[Cell],
    data: Splits,
    mesh: Mesh | None,
    recorder: Recorder | None,
) -> list[dict[str, np.ndarray]]:
    """Every replica of every cell of a program, as one population; the rows of each point."""
    first, r, c = points[0], points[0].study.replicas, len(group)
    module = module_of(program, first, data)
    net = task.z_loss(task.of_dataset(module, data.train))
    roots = training.keys([p.seed for p in points], r, TRAINING).reshape(len(points), 1, r)
    scalars = [scalars_of(cell, point) for point in points for cell in group]
    last = first.study.last if isinstance(first.study, Widths) else first.steps
    results = training.train(
        [settings_of(program, p) for p in points],
        jax.numpy.repeat(roots, c, axis=1).reshape(-1),
        *(net, data.train, last, mesh, recorder and recorder.stage(str(program))),
        name=str(program),
        total=first.steps,
        scalars={name: np.repeat([s[name] for s in scalars], r) for name in scalars[0]},
        probes=_probes(module, net, first, data.test),
    )
    found = []
    for p, point in enumerate(points):
        columns = _columns(results, np.arange(p * c * r, (p + 1) * c * r), group, r)
        n = len(columns["step"])
        columns["parameters"] = np.full(n, parameters(net))
        found.append({"stage": np.full(n, type(point.study).__name__.lower()), **columns})
    return found


def _probes(module: TransformerModule, net: Task, config: Config, test: Dataset) -> list[Any]:
    study = config.study
    seen, probed = evenly(test, config.validation), evenly(test, config.probed)
    if isinstance(study, Widths):
        often, rest = (0, *range(study.first, study.last + 1)), (0, study.last)
    else:
        often = rest = study.every
    return [
        Evaluate(net, seen, rest),
        Attention(module, probed, often),
        Outputs(module, probed, rest),
        Updates(net, probed, (FIRST_MLP,), rest),
    ]


def evenly(data: Dataset, count: int) -> Dataset:
    """``count`` examples, or all if there are fewer, evenly apart."""
    rows = np.linspace(0, len(data) - 1, min(count, len(data))).astype(np.int32)
    return dataclasses.replace(data, x=data.x[rows], y=data.y[rows], index=data.index[rows])


def _columns(
    results: Results, here: np.ndarray, group: Sequence[Cell], r: int
) -> dict[str, np.ndarray]:
    """What was measured of one point's replicas."""
    rows = results.rows
    chosen = np.isin(rows["replica"], here) & np.isnan(rows["loss"])  # a probe's row has no loss
    member, step = rows["replica"][chosen].astype(int), rows["step"][chosen]
    cell, diverged = (member - here[0]) // r, results.arrays["diverged"][member]
    columns = {name: np.array([getattr(one, name) for one in group])[cell] for name in Cell._fields}
    columns |= {"replica": member % r, "step": step, "diverged": diverged}
    found = {column: rows[name][chosen] for name, column in MEASURED.items()}
    attention = [name for name in rows if name.startswith("attention.")]
    found |= {name.removeprefix("attention."): rows[name][chosen] for name in attention}
    for name in ("test_loss", "test_accuracy"):  # a frozen replica would show its last state
        found[name] = np.where(step > diverged, np.nan, found[name])
    return columns | found


def _check(points: Sequence[Config], data: Splits, mesh: Mesh | None) -> None:
    """ValueError before anything is computed."""
    first, n = points[0], len(data.train)
    if first.train.batch_size > n:
        raise ValueError(
            f"train.batch_size must be <= the {n} training windows, got {first.train.batch_size}"
        )
    if mesh is not None:
        programs = [program_of(cell) for cell in cells(first)]
        for program in set(programs):
            members = len(points) * programs.count(program) * first.study.replicas
            meshes.check(mesh, members, first.train.batch_size)
