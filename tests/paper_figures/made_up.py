"""Runs of data_diet whose numbers are made up, so that the effect of every claim is known."""

import math
import zlib
from pathlib import Path

import numpy as np
import polars as pl

from dynamics import record

REPLICAS, EXAMPLES, SCORINGS, DRAWS = 4, 60, 4, 2
FRACTIONS = (0.2, 0.3, 0.5)
EPOCHS = (0.0, 1.0, 5.0, 20.0)
DROPPED = (0.0, 0.05, 0.1, 0.25, 0.7)
CONFIG = {
    "kind": "Config",
    "data": {"kind": "DataConfig", "source": "digits"},
    "model": {"kind": "MLP", "width": 128, "depth": 2},
    "train": {"kind": "Train", "optimizer": {"kind": "SGD", "learning_rate": 0.02}},
    "score": {"kind": "Scoring", "epochs": list(EPOCHS), "draws": DRAWS, "replicas": 2},
    "noise": 0.0,
    "seed": 0,
}
SCALE = "digits, 60 examples, clean labels, MLP 2 x 128"
NOISY_SCALE = "digits, 60 examples, 20 % wrong labels, MLP 2 x 128"

# Points of accuracy above a random subset, for every replica.
PRUNING = {"el2n_hard": 2.0, "grand_hard": 1.5, "el2n_easy": -9.0, "grand_init_hard": -1.75,
           "input_norm_hard": -1.5}  # fmt: skip
TIMING = {
    0.0: {("el2n_hard", 0.0): -20.0, ("grand_hard", 0.0): -5.0, ("el2n_hard", 1.0): 1.0,
          ("el2n_hard", 5.0): 2.0, ("el2n_hard", 20.0): 2.25, ("grand_hard", 5.0): 1.5},
    0.2: {("el2n_hard", 0.0): -25.0, ("grand_hard", 0.0): -6.0, ("el2n_hard", 1.0): -62.0,
          ("el2n_hard", 5.0): -60.0, ("el2n_hard", 20.0): -50.0},
}  # fmt: skip
WINDOW = {
    0.0: {0.0: 2.5, 0.05: 1.5, 0.1: 1.0, 0.25: -1.0, 0.7: -14.0},
    0.2: {0.0: -60.0, 0.05: -40.0, 0.1: -5.0, 0.25: 13.0, 0.7: 7.0},
}
TRANSFER = {
    0.0: {("own", "own"): 2.5, ("own", "model"): 2.25, ("own", "rate"): 2.0,
          ("model", "model"): 3.0, ("model", "own"): 2.5, ("model", "rate"): 2.0,
          ("rate", "rate"): 2.0, ("rate", "own"): 2.25, ("rate", "model"): 1.0},
    0.2: {("own", "own"): -62.0, ("own", "model"): -61.0, ("own", "rate"): -60.0,
          ("model", "model"): -60.0, ("model", "own"): -59.0, ("model", "rate"): -55.0,
          ("rate", "rate"): -58.0, ("rate", "own"): -57.0, ("rate", "model"): -56.0},
}  # fmt: skip
RESCORING = {  # at the end; in the epoch before it ``again`` is 4 lower with wrong labels
    0.0: {"full": 2.0, "once": 1.5, "again": 2.25, "random": 0.0, "random_again": 1.0},
    0.2: {"full": 5.0, "once": -60.0, "again": -20.0, "random": 0.0, "random_again": 3.0},
}


def pruning(above=None, fractions=FRACTIONS, replicas=REPLICAS, arrays=None, study=(), **config):
    """A run of ``Pruning``: random is at 80 % + one point per replica + 10 x fraction."""
    above = PRUNING if above is None else above
    cells = [({"method": "full", "fraction": 1.0}, 17.0)]
    for fraction in fractions:
        for method, points in {"random": 0.0, **above}.items():
            cells.append(({"method": method, "fraction": fraction}, 10 * fraction + points))
    study = {"methods": ["random", *above], "scored_at": 5.0, "epochs": 20.0, **dict(study)}
    return made("Pruning", cells, replicas, scored() if arrays is None else arrays, study, config)


def scored():
    """Arrays of Pruning: EL2N and GraNd in the same order, GraNd at init in the norm's."""
    rng = np.random.default_rng(0)
    scores = rng.lognormal(size=(SCORINGS, EXAMPLES)).astype(np.float32)
    norm = rng.normal(8, 1, size=EXAMPLES).astype(np.float32)
    return {
        "el2n": scores,
        "grand": 5 * scores,
        "grand_init": np.stack([1.5 * norm] * SCORINGS),
        "input_norm": norm,
    }


def timing(noise=0.0, above=None, replicas=REPLICAS, **config):
    """A run of ``Timing``: random is at 80 % + one point per replica, all data 2 above."""
    cells = [({"method": m, "scored_at": None}, p) for m, p in (("full", 2.0), ("random", 0.0))]
    for (method, epoch), points in (TIMING[noise] if above is None else above).items():
        cells.append(({"method": method, "scored_at": epoch}, points))
    study = {"kept": 0.3, "methods": ["el2n", "grand"], "epochs": 20.0}
    if noise and above is None:
        cells.append(({"method": "grand_hard", "scored_at": 5.0}, -60.0))
    return made("Timing", cells, replicas, {}, study, {"noise": noise} | config)


def window(noise=0.0, above=None, replicas=REPLICAS, **config):
    """A run of ``Window``, as above."""
    rest = (("full", 2.0), ("random", 0.0), ("easy", 7.0 if noise else -14.0))
    cells = [({"method": m, "dropped": None}, p) for m, p in rest]
    for dropped, points in (WINDOW[noise] if above is None else above).items():
        cells.append(({"method": "window", "dropped": dropped}, points))
    study = {"kept": 0.3, "dropped": list(DROPPED), "scored_at": 5.0, "epochs": 20.0}
    return made("Window", cells, replicas, {}, study, {"noise": noise} | config)


def transfer(noise=0.0, above=None, replicas=REPLICAS, arrays=None, **config):
    """A run of ``Transfer``, as above; every setting ranks the examples alike."""
    cells = []
    for target in ("own", "model", "rate"):
        cells += [({"target": target, "source": s}, p) for s, p in (("full", 2.0), ("random", 0.0))]
    for (target, source), points in (TRANSFER[noise] if above is None else above).items():
        cells.append(({"target": target, "source": source}, points))
    score = np.tile(np.linspace(0, 1, EXAMPLES), (SCORINGS, 1))
    arrays = arrays or {f"el2n_{s}": k * score for k, s in enumerate(("own", "model", "rate"), 1)}
    study = {"model": {"kind": "MLP", "width": 32, "depth": 1}, "learning_rate": 0.1, "kept": 0.3,
             "scored_at": 5.0, "epochs": 20.0}  # fmt: skip
    return made("Transfer", cells, replicas, arrays, study, {"noise": noise} | config)


def rescoring(noise=0.0, above=None, replicas=REPLICAS, **config):
    """A run of ``Rescoring``, as above: choices at epochs 2 and 5, the end at 8."""
    cells = []
    for method, points in (RESCORING[noise] if above is None else above).items():
        before = points - 4 if method == "again" and noise else points
        overlap = 0.25 if method.endswith("again") else 1.0
        for epoch, at, part in ((2.0, 0.0, None), (5.0, before, overlap), (8.0, points, 1.0)):
            part = None if method == "full" else part
            cells.append(({"method": method, "epoch": epoch, "overlap": part}, at))
    study = {"kept": 0.3, "warmup": 2.0, "every": 3.0, "epochs": 8.0}
    return made("Rescoring", cells, replicas, {}, study, {"noise": noise} | config)


def run_of(experiment, config, frames, arrays=(), fingerprint="00c0ffee"):
    """A finished run of frames (rows, or a frame) and arrays (axes of plain ones have no names)."""
    frames = {
        name: rows if isinstance(rows, pl.DataFrame) else record.frame(rows)
        for name, rows in frames.items()
    }
    arrays = {name: array_of(value) for name, value in dict(arrays).items()}
    path = Path("runs", experiment, "made-up")
    return record.Run(path, fingerprint, config, {}, frames, arrays, done=True)


def array_of(value, dims=None, **coords):
    """A labelled array; a plain one gets dims axis_0, axis_1 and so on."""
    if isinstance(value, record.Array):
        return value
    value = np.asarray(value)
    return record.Array(value, dims or tuple(f"axis_{i}" for i in range(value.ndim)), coords)


def with_rows(run, change, name=None):
    """The run with a frame of it changed: that of its study, or another."""
    name = name or run.config["study"]["kind"].lower()
    return run._replace(frames=run.frames | {name: change(run.frames[name])})


def made(kind, cells, replicas, arrays, study, config):
    """A run of rows and arrays, each accuracy exact: 80 % + one point per replica + points."""
    rows = [
        {
            **cell,
            "rarest": 5,
            "replica": s,
            "test_accuracy": (80 + s + points) / 100,
        }
        for cell, points in cells
        for s in reversed(range(replicas))
    ]
    arrays = {"index": np.arange(EXAMPLES, dtype=np.int32), **arrays}
    config = {**CONFIG, "study": {"kind": kind, "replicas": replicas, **study}, **config}
    fingerprint = f"{zlib.crc32(str(config).encode()):08x}00c0ffee"
    scored = [{"draw": r // 2, "replica": r, "diverged": None} for r in range(SCORINGS)]
    frames = {kind.lower(): rows, "scored": scored}
    return run_of("data_diet", config, frames, arrays, fingerprint)


def claims_of(module, *runs):
    """The claims of a figure by what they measure."""
    found = module.measure(list(runs))
    claims = {claim.quantity: claim for claim in found}
    assert len(claims) == len(found) or len(runs) > 1
    return claims


def failed(claims):
    """What does not hold."""
    return [quantity for quantity, claim in claims.items() if not claim.holds]


def without_rows(run, **equal):
    """The run without the rows that have all these values."""
    keep = pl.lit(False)
    for column, value in equal.items():
        keep = keep | (pl.col(column) != value)
    return with_rows(run, lambda frame: frame.filter(keep))


def without_array(run, name):
    """The run without an array."""
    return run._replace(arrays={k: v for k, v in run.arrays.items() if k != name})


def with_array(run, name, value):
    """The run with another array."""
    return run._replace(arrays=run.arrays | {name: array_of(value)})


def with_accuracy(run, value):
    """The run with one accuracy everywhere."""
    return with_rows(run, lambda frame: frame.with_columns(test_accuracy=pl.lit(value)))


def with_study(run, **values):
    """The run with other values of its study; None takes one out."""
    study = {k: v for k, v in {**run.config["study"], **values}.items() if v is not None}
    return run._replace(config={**run.config, "study": study})


def expected(claims, wanted, *, scale=SCALE):
    """Assert effects, gates, kinds and intervals without spread, in this order."""
    assert list(claims) == list(wanted)
    for quantity, (effect, gate, kind) in wanted.items():
        claim = claims[quantity]
        assert math.isclose(claim.effect, effect, abs_tol=1e-9), quantity
        assert all(math.isclose(end, effect, abs_tol=1e-9) for end in claim.interval), quantity
        assert (claim.gate, claim.kind, claim.scale) == (gate, kind, scale)
        runs = DRAWS if claim.scale == NOISY_SCALE else SCORINGS  # wrong labels are drawn, too
        assert claim.seeds == (runs if "Spearman" in quantity else REPLICAS)
        assert claim.holds, quantity
