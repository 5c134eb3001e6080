"""A run of study Ranking whose scores are made up, so that what they rank is known."""

from pathlib import Path

import numpy as np
import polars as pl

from dynamics import record, statistics

N, CLASSES, REPLICAS, SHOWN = 90, 3, 6, 2
EPOCHS = (0.0, 1.0, 5.0, 20.0)
LOW = ("logit_margin", "pvi", "aum", "confidence")  # hard is low


def ranking(
    *, noise=0.2, spread=0.0, replicas=REPLICAS, hardness=None, source="digits", color=False
):
    """Every example has one hardness, wrong labels first; every score is a monotone function of it.

    Before training they all rank by the norm of the input, which has no part in it. ``spread`` is
    the noise of each replica.
    """
    rng = np.random.default_rng(3)
    labels = np.arange(N) % CLASSES
    wrong = (np.arange(N) // CLASSES) % 5 < 5 * noise
    order = rng.permutation(N)
    hardness = (order + N * wrong) / N if hardness is None else hardness
    norm = 8.0 + rng.permutation(N) / N

    def each(values):
        return (values + spread * rng.normal(size=(replicas, N))).astype(np.float32)

    arrays = {"grand@0": each(1.5 * norm), "input_norm": norm.astype(np.float32)}
    for kind in ("el2n", "loss", "entropy", "logit_margin"):
        arrays[f"{kind}@0"] = each(rng.permutation(N) / N)
    streamed = ("pvi", "vog", "forgetting", "aum", "confidence", "variability")
    for epoch in EPOCHS[1:]:
        for kind in ("el2n", "grand", "loss", "entropy", "logit_margin", *streamed):
            values = np.exp(hardness) if kind == "grand" else hardness
            arrays[f"{kind}@{epoch:g}"] = each(-values if kind in LOW else values)
        arrays[f"vog@{epoch:g}"] = each(rng.permutation(N) / N)
    arrays["tracin"] = each(hardness)
    arrays |= {
        "index": np.arange(N, dtype=np.int32),
        "labels": labels.astype(np.int32),
        "clean": np.where(wrong, (labels + 1) % CLASSES, labels).astype(np.int32),
        "mislabelled": wrong,
        "diverged": np.full(replicas, np.inf),
    }
    mean = arrays["el2n@5"].astype(np.float64).mean(axis=0)
    by_class = [[r for r in np.argsort(mean) if labels[r] == c] for c in range(CLASSES)]
    shown = [[c[::-1][:SHOWN] for c in by_class], [c[:SHOWN] for c in by_class]]
    arrays["shown"] = np.array(shown, dtype=np.int32)
    size = (8, 8, 3) if color else (8, 8)
    arrays["shown_images"] = rng.integers(0, 255, (2, CLASSES, SHOWN, *size)).astype(np.uint8)
    rows = []
    for epoch in EPOCHS:
        for replica, one in enumerate(arrays[f"el2n@{epoch:g}"]):
            auc = statistics.auc(one, wrong) if noise else np.nan
            rows.append(("ranking", "el2n", epoch, replica, auc))
        rows.append(("ranking", "el2n", epoch, -1, 0.5))
    names = ["stage", "score", "epoch", "replica", "auc"]
    config = {
        "kind": "Config",
        "data": {"kind": "DataConfig", "source": source},
        "model": {"kind": "MLP", "width": 128, "depth": 2},
        "score": {"kind": "Scoring", "epochs": list(EPOCHS), "replicas": replicas},
        "study": {"kind": "Ranking", "scored_at": 5.0, "shown": SHOWN},
        "noise": noise,
        "seed": 0,
    }
    table = pl.DataFrame(rows, schema=names, orient="row")
    return record.Run(
        Path("runs/data_diet/made-up"),
        f"{round(100 * noise):016x}",
        config,
        {},
        table,
        arrays,
        True,
    )


def with_array(run, name, value):
    """The run with another array, without it for None."""
    rest = {k: v for k, v in run.arrays.items() if k != name}
    return run._replace(arrays=rest if value is None else rest | {name: value})


def with_config(run, **values):
    """The run with other values at the top of its config."""
    return run._replace(config=run.config | values)


def claims_of(figure, *runs):
    """The claims by what they measure."""
    return {claim.quantity: claim for claim in figure.measure(runs)}
