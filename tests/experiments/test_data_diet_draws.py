"""What an interval of the Data Diet studies covers: each retraining has scores of its own.

The whole protocol but the networks is run on a toy whose truth is known exactly.
"""

from typing import Any

import numpy as np
import polars as pl

from dynamics import statistics
from dynamics.data import DataConfig
from dynamics.models import MLP
from dynamics.record import Array
from dynamics.training import Train
from experiments import data_diet
from experiments.data_diet import Config, Pruning, Scoring, scoring
from experiments.data_diet.bank import Bank
from experiments.data_diet.retraining import subset

N, HARD, KEPT, REPLICAS, RUNS = 60, 6, 0.3, 8, 2
TIMES = 200


def bank(rng: np.random.Generator, draws: int = REPLICAS, runs: int = RUNS) -> Bank:
    """Scores of ``runs`` runs a draw: six examples are hard, all others are noise in every run."""
    hardness = np.where(np.arange(N) < HARD, 100.0, 0.0)
    el2n = (hardness + rng.normal(size=(1, draws * runs, N))).astype(np.float32)
    labels = rng.integers(0, 10, (draws, N)).astype(np.int32)
    arrays = {
        "el2n": Array(el2n, ("epoch", "replica", "example"), {"epoch": np.array([5.0])}),
        "labels": Array(labels, ("draw", "example")),
        "mislabelled": Array(labels > 7, ("draw", "example")),
        "index": Array(np.arange(N), ("example",)),
    }
    replica = np.arange(draws * runs)
    frame = pl.DataFrame({"draw": replica // runs, "replica": replica})
    return Bank(arrays, frame.with_columns(diverged=pl.lit(None, pl.Int64)))


def coverage(shared: bool) -> float:
    """How often the interval of hard - random holds the truth, over runs of the whole protocol.

    An example is worth ``worth`` points, a network the mean of what it is trained on, and noise of
    its own. Truth: the hard ones are kept, the rest of the subset is any, as good as another.
    """
    rng, held = np.random.default_rng(0), 0
    worth = rng.normal(size=N)
    count = round(KEPT * N)
    rest = (count - HARD) * worth[HARD:].mean()
    truth = (worth[:HARD].sum() + rest) / count - worth.mean()
    for seed in range(TIMES):
        point = Config(
            seed=seed,
            score=Scoring(draws=REPLICAS, replicas=RUNS),
            study=Pruning(replicas=REPLICAS),
        )
        (own,) = scoring.drawn([bank(rng)], REPLICAS)
        own = [own[0]] * REPLICAS if shared else own
        hard, random = (
            subset(point, own, method, KEPT, {}, at=5.0).rows for method in ("el2n_hard", "random")
        )
        noise = 0.05 * rng.normal(size=(2, REPLICAS))
        trained = [
            np.array([worth[rows].mean() for rows in kept]) + own_noise
            for kept, own_noise in zip((hard, random), noise, strict=True)
        ]
        found = statistics.paired(*trained, num_resamples=7000)
        held += found.low <= truth <= found.high
    return held / TIMES


def test_intervals_over_draws_cover_the_truth_as_often_as_they_say() -> None:
    """Nominal 95 %, to within four standard errors of the count."""
    error = np.sqrt(0.95 * 0.05 / TIMES)
    assert abs(coverage(shared=False) - 0.95) <= 4 * error


def test_intervals_over_retrainings_by_the_same_scores_do_not() -> None:
    """The negative control: what retrainings share is in no interval over them."""
    assert coverage(shared=True) <= 0.8


def test_draws_share_no_run_and_no_label() -> None:
    whole = bank(np.random.default_rng(1), draws=3)
    parts = [whole.draw(d) for d in range(3)]
    together = np.concatenate([part.at("el2n", 5.0) for part in parts])
    np.testing.assert_array_equal(together, whole.at("el2n", 5.0))
    assert [part.runs["replica"].to_list() for part in parts] == [[0, 1], [2, 3], [4, 5]]
    for d, part in enumerate(parts):
        np.testing.assert_array_equal(part["labels"], whole["labels"][d])
        np.testing.assert_array_equal(
            part.mean("el2n", 5.0), part.at("el2n", 5.0).astype(float).mean(axis=0)
        )
        assert part["labels"].shape == part["mislabelled"].shape == part["index"].shape == (N,)


def test_runs_on_the_same_labels_are_averaged_together() -> None:
    noisy = bank(np.random.default_rng(2), draws=3)
    assert [len(one.runs) for one in noisy.alike()] == [2, 2, 2]
    same = np.tile(noisy["labels"][:1], (3, 1))
    arrays = noisy.arrays | {"labels": Array(same, ("draw", "example"))}
    (clean,) = Bank(arrays, noisy.runs).alike()
    assert clean.at("el2n", 5.0).shape == (6, N) and clean["labels"].shape == (N,)


def test_a_draw_is_the_same_however_many_there_are_and_the_first_is_the_seeds_own() -> None:
    assert scoring.seed_of(7, 0) == 7
    assert len({scoring.seed_of(seed, draw) for seed in range(20) for draw in range(20)}) == 400


def test_every_retraining_has_the_labels_and_the_choice_of_its_own_draw(monkeypatch: Any) -> None:
    config = Config(
        data=DataConfig(num_train=120, num_test=60),
        model=MLP(width=8, depth=1),
        train=Train(batch_size=20),
        score=Scoring(epochs=(1.0,), draws=2, replicas=2),
        study=Pruning(fractions=(0.3,), methods=("random", "el2n_hard"), scored_at=1.0, replicas=2,
                      epochs=1.0),
        noise=0.3,
    )  # fmt: skip
    called, fitted = [], scoring.fitted

    def watched(job: Any, config: Any, members: pl.DataFrame, *args: Any, **options: Any) -> Any:
        called.append((members, options))
        return fitted(job, config, members, *args, **options)

    monkeypatch.setattr(scoring, "fitted", watched)
    found = data_diet.run(config, data_diet.load(config))
    labels, el2n = (found.arrays[name].values for name in ("labels", "el2n"))
    assert (labels[0] != labels[1]).mean() > 0.3
    (scorers, scored), (members, trained) = called
    np.testing.assert_array_equal(scored["labels"], labels[scorers["draw"].to_numpy()])
    np.testing.assert_array_equal(trained["labels"], labels[members["replica"].to_numpy()])
    for k, member in enumerate(members.rows(named=True)):
        if member["method"] == "el2n_hard":
            own = el2n[2 * member["replica"] : 2 * member["replica"] + 2].mean(axis=0)
            kept = trained["rows"][k, : trained["sizes"][k]]
            assert own[kept].min() >= np.delete(own, kept).max()
