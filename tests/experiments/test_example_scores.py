"""What the scores say on digits: checks S1-S10 of the specification, with paired seeds."""

from typing import Any

import numpy as np
import pytest

from dynamics import config as configs
from dynamics.optim import SGD
from dynamics.statistics import auc, spearman
from dynamics.training import Train
from experiments import data_diet
from experiments.data_diet import Config, Ranking, Scoring
from experiments.data_diet.bank import Bank

NOISE = (0.0, 0.1, 0.2, 0.4)


@pytest.fixture(scope="module")
def banks() -> dict[float, Bank]:
    """Scores of 10 runs at each noise rate."""
    score = Scoring(draws=1, replicas=10, also=("vog", "pvi"))
    points = configs.grid(Config(score=score, study=Ranking()), {"noise": NOISE})
    found = data_diet.sweep(points, data_diet.load(points[0]))
    return {
        noise: Bank(one.arrays, one.frames["scored"]).draw(0)
        for noise, one in zip(NOISE, found, strict=True)
    }


def test_el2n_ranks_as_grand_does(banks: Any) -> None:  # S1
    for noise, least in ((0.0, 0.97), (0.2, 0.95), (0.4, 0.93)):
        for epoch in (1, 2, 5, 10, 20):
            el2n, grand = (banks[noise].mean(score, epoch) for score in ("el2n", "grand"))
            assert spearman(el2n, grand) >= least, (noise, epoch)


def test_grand_at_initialisation_knows_nothing_of_the_labels(banks: Any) -> None:  # S3
    clean, noisy = banks[0.0], banks[0.2]
    start = clean.mean("grand", 0)
    assert abs(spearman(start, clean.mean("el2n", 10))) <= 0.3
    assert 0.42 <= auc(noisy.mean("grand", 0), noisy["mislabelled"]) <= 0.62


def test_averaging_over_runs_helps(banks: Any) -> None:  # S4
    runs = banks[0.0].at("el2n", 5).astype(np.float64)
    halves = spearman(runs[:5].mean(0), runs[5:].mean(0))
    pairs = [spearman(runs[i], runs[i + 1]) for i in range(0, 10, 2)]
    assert halves >= 0.90 and halves > np.mean(pairs) + 0.03


def test_early_scores_predict_late_ones(banks: Any) -> None:  # S5
    early, late = (banks[0.0].mean("el2n", epoch) for epoch in (5, 20))
    assert spearman(early, late) >= 0.90


@pytest.mark.parametrize("noise", [0.1, 0.2, 0.4])
def test_early_el2n_and_aum_find_wrong_labels(banks: Any, noise: float) -> None:  # S6, S7
    bank, wrong = banks[noise], banks[noise]["mislabelled"]
    assert wrong.sum() == round(noise * 1347)
    for epoch in (2, 5, 10):
        assert auc(bank.mean("el2n", epoch), wrong) >= 0.98
        assert min(auc(one, wrong) for one in bank.at("el2n", epoch)) >= 0.95
    assert auc(-bank.mean("aum", 20), wrong) >= 0.98


def test_memorisation_hides_wrong_labels_from_el2n_but_not_from_aum() -> None:  # S8
    score = Scoring(epochs=(2.0, 40.0), draws=1, replicas=8)
    train = Train(optimizer=SGD(learning_rate=0.05))
    config = Config(train=train, score=score, study=Ranking(scored_at=2.0), noise=0.2)
    found = data_diet.run(config, data_diet.load(config))
    bank = Bank(found.arrays, found.frames["scored"]).draw(0)
    wrong = bank["mislabelled"]
    early, late = (auc(bank.mean("el2n", epoch), wrong) for epoch in (2, 40))
    assert early - late >= 0.03
    assert auc(-bank.mean("aum", 40), wrong) > late + 0.02


def test_variance_of_gradients_does_not_find_wrong_labels(banks: Any) -> None:
    """S9, a negative result: VoG ranks them no better than chance; TracIn and PVI find them."""
    bank, wrong = banks[0.2], banks[0.2]["mislabelled"]
    assert auc(bank.mean("vog", 20), wrong) <= 0.6
    assert auc(bank.mean("tracin"), wrong) >= 0.95
    assert auc(-bank.mean("pvi", 5), wrong) >= 0.95


def test_forgetting_needs_something_to_forget(banks: Any) -> None:
    """S10: on clean digits most examples are never forgotten and tie; with wrong labels
    forgetting ranks as EL2N does.
    """
    single = banks[0.0].at("forgetting", 20)[0]
    assert np.mean(single == 0) >= 0.8
    bank = banks[0.2]
    assert spearman(bank.mean("forgetting", 20), bank.mean("el2n", 5)) >= 0.7
