"""A run of study Ranking whose scores are made up, so that what they rank is known."""

from pathlib import Path

import numpy as np
import polars as pl

from dynamics import record, statistics
from dynamics.record import Array

N, CLASSES, REPLICAS, DRAWS, SHOWN = 90, 3, 8, 2, 2
EPOCHS = (0.0, 1.0, 5.0, 20.0)
LOW = ("logit_margin", "pvi", "aum", "confidence")  # hard is low


def ranking(
    *,
    noise=0.2,
    spread=0.0,
    replicas=REPLICAS,
    draws=DRAWS,
    hardness=None,
    source="digits",
    color=False,
):
    """Every example has one hardness, wrong labels first; every score is a monotone function of it.

    Before training they all rank by the norm of the input, which has no part in it. ``spread`` is
    the noise of each replica. ``draws`` share the labels, and have ``replicas`` between them.
    """
    rng, draws = np.random.default_rng(3), min(draws, replicas)
    labels = np.arange(N) % CLASSES
    wrong = (np.arange(N) // CLASSES) % 5 < 5 * noise
    order = rng.permutation(N)
    hardness = (order + N * wrong) / N if hardness is None else hardness
    norm = 8.0 + rng.permutation(N) / N

    def each(values):
        return (values + spread * rng.normal(size=(replicas, N))).astype(np.float32)

    found = {("grand", 0.0): each(1.5 * norm)}
    for kind in ("el2n", "loss", "entropy", "logit_margin"):
        found[kind, 0.0] = each(rng.permutation(N) / N)
    streamed = ("pvi", "vog", "forgetting", "aum", "confidence", "variability")
    for epoch in EPOCHS[1:]:
        for kind in ("el2n", "grand", "loss", "entropy", "logit_margin", *streamed):
            values = np.exp(hardness) if kind == "grand" else hardness
            found[kind, epoch] = each(-values if kind in LOW else values)
        found["vog", epoch] = each(rng.permutation(N) / N)
    arrays = stacked(found) | {"tracin": Array(each(hardness), ("replica", "example"))}
    about = {
        "input_norm": norm.astype(np.float32),
        "index": np.arange(N, dtype=np.int32),
        "labels": np.tile(labels.astype(np.int32), (draws, 1)),
        "clean": np.where(wrong, (labels + 1) % CLASSES, labels).astype(np.int32),
        "mislabelled": np.tile(wrong, (draws, 1)),
    }
    dims = {1: ("example",), 2: ("draw", "example")}
    arrays |= {name: Array(value, dims[value.ndim]) for name, value in about.items()}
    alike = replicas // draws if noise else replicas  # runs on the labels of the first draw
    mean = found["el2n", 5.0][:alike].astype(np.float64).mean(axis=0)
    by_class = [[r for r in np.argsort(mean) if labels[r] == c] for c in range(CLASSES)]
    shown = [[c[::-1][:SHOWN] for c in by_class], [c[:SHOWN] for c in by_class]]
    dims = ("end", "class", "place")
    arrays["shown"] = Array(np.array(shown, dtype=np.int32), dims)
    size = (8, 8, 3) if color else (8, 8)
    images = rng.integers(0, 255, (2, CLASSES, SHOWN, *size)).astype(np.uint8)
    arrays["shown_images"] = Array(images, (*dims, "y", "x", "channel")[: images.ndim])
    rows = []
    for epoch in EPOCHS:
        for replica, one in enumerate(found["el2n", epoch]):
            auc = statistics.auc(one, wrong) if noise else None
            rows.append({"score": "el2n", "epoch": epoch, "replica": replica, "auc": auc})
        rows.append({"score": "el2n", "epoch": epoch, "replica": None, "auc": 0.5})
    config = {
        "kind": "Config",
        "data": {"kind": "DataConfig", "source": source},
        "model": {"kind": "MLP", "width": 128, "depth": 2},
        "score": {
            "kind": "Scoring",
            "epochs": list(EPOCHS),
            "draws": draws,
            "replicas": replicas // draws,
        },
        "study": {"kind": "Ranking", "scored_at": 5.0, "shown": SHOWN},
        "noise": noise,
        "seed": 0,
    }
    frames = {"ranking": record.frame(rows), "scored": scored(replicas, draws=draws)}
    path, fingerprint = Path("runs/data_diet/made-up"), f"{round(100 * noise):016x}"
    return record.Run(path, fingerprint, config, {}, frames, arrays, True)


def stacked(found):
    """(kind, epoch) -> [replica, example] as arrays by kind, with dim epoch."""
    arrays = {}
    for kind in dict.fromkeys(kind for kind, _ in found):
        epochs = sorted(epoch for other, epoch in found if other == kind)
        values = np.stack([found[kind, epoch] for epoch in epochs])
        arrays[kind] = Array(values, ("epoch", "replica", "example"), {"epoch": np.array(epochs)})
    return arrays


def scored(replicas, diverged=None, draws=DRAWS):
    """Frame ``scored`` of runs that did not diverge, or each at the step given."""
    steps, types = [diverged] * replicas, {"replica": pl.Int64, "diverged": pl.Int64}
    own = [replica * draws // replicas for replica in range(replicas)]
    found = {"draw": own, "replica": range(replicas), "diverged": steps}
    return pl.DataFrame(found, schema_overrides=types)


def value(run, name, epoch=None):
    """The values of an array, at an epoch if it has some."""
    return run.arrays[name].at(**({} if epoch is None else {"epoch": epoch})).values


def with_score(run, kind, epoch, values):
    """The run with another score at an epoch, or without it for None."""
    stored = run.arrays[kind]
    found = {(kind, e): stored.at(epoch=e).values for e in stored.coords["epoch"]}
    del found[kind, epoch]
    found |= {} if values is None else {(kind, epoch): values}
    return run._replace(arrays={k: v for k, v in run.arrays.items() if k != kind} | stacked(found))


def with_array(run, name, value):
    """The run with other values of an array, without it for None."""
    rest = {k: v for k, v in run.arrays.items() if k != name}
    if value is None:
        return run._replace(arrays=rest)
    value, old = np.asarray(value), run.arrays[name]
    same = value.ndim == old.values.ndim
    dims = old.dims if same else tuple(f"axis_{i}" for i in range(value.ndim))
    return run._replace(arrays=rest | {name: Array(value, dims, old.coords if same else {})})


def with_config(run, **values):
    """The run with other values at the top of its config."""
    return run._replace(config=run.config | values)


def claims_of(figure, *runs):
    """The claims by what they measure."""
    return {claim.quantity: claim for claim in figure.measure(runs)}
