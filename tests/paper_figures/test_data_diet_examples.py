"""Images whose hardness is made up: which are shown, and what is marked, is known."""

import csv

import numpy as np
import pytest
from made_up_scores import (
    CLASSES,
    DRAWS,
    REPLICAS,
    SHOWN,
    claims_of,
    ranking,
    value,
    with_array,
    with_config,
    with_score,
)

from dynamics import statistics
from paper_figures import data_diet_examples as figure

ENDS = "2 hardest - 2 easiest of each class"
WRONG = f"wrong, {ENDS}"
AGREED = f"{ENDS}, chosen by 2 runs, measured by 2 others"
AGREED_CLEAN = f"{ENDS}, chosen by 4 runs, measured by 4 others"
INPUTS = "|wrong, 2 largest - 2 smallest inputs of each class|"
INPUTS_CLEAN = "|2 largest - 2 smallest inputs of each class|"
MARKED = "wrong labels among the shown"


def by_hand(run, values, by):
    labels, out = value(run, "labels")[0], []
    for c in range(CLASSES):
        mine = sorted(np.flatnonzero(labels == c), key=lambda row: by[row])
        out.append(values[mine[-SHOWN:]].mean() - values[mine[:SHOWN]].mean())
    return np.mean(out)


def test_the_hardest_are_all_wrong_and_the_easiest_none():
    run = ranking()
    claims = claims_of(figure, run)
    assert list(claims) == [WRONG, AGREED, INPUTS]
    assert (claims[WRONG].effect, claims[WRONG].interval) == (1.0, (1.0, 1.0))
    assert claims[WRONG].holds and claims[WRONG].seeds == DRAWS
    el2n = value(run, "el2n", 5.0)[0].astype(float)
    assert claims[AGREED].effect == pytest.approx(by_hand(run, el2n, el2n))
    wrong = value(run, "mislabelled")[0].astype(float)
    expected = abs(by_hand(run, wrong, value(run, "input_norm")))
    assert claims[INPUTS].effect == pytest.approx(expected)
    assert claims[INPUTS].kind == "control"


def test_clean_labels_have_another_control():
    run = ranking(noise=0.0)
    claims = claims_of(figure, run)
    assert list(claims) == [AGREED_CLEAN, INPUTS_CLEAN, MARKED]
    el2n = value(run, "el2n", 5.0)[0].astype(float)
    expected = abs(by_hand(run, el2n, value(run, "input_norm")))
    assert claims[INPUTS_CLEAN].effect == pytest.approx(expected)
    assert (claims[MARKED].effect, claims[MARKED].holds) == (0.0, True)


def test_a_score_of_noise_does_not_agree():
    run = ranking()
    noise = np.random.default_rng(0).random(value(run, "el2n", 5.0).shape).astype(np.float32)
    run = with_score(run, "el2n", 5.0, noise)
    mean = noise[: REPLICAS // DRAWS].astype(float).mean(axis=0)  # of the first draw
    labels = value(run, "labels")[0]
    by_class = [[r for r in np.argsort(mean) if labels[r] == c] for c in range(CLASSES)]
    shown = np.array([[c[::-1][:SHOWN] for c in by_class], [c[:SHOWN] for c in by_class]])
    claims = claims_of(figure, with_array(run, "shown", shown))
    assert not claims[AGREED].holds and abs(claims[AGREED].effect) < 0.2


def test_wrong_labels_among_the_easiest_do_not_hold():
    wrong = value(ranking(), "mislabelled")[0]
    easy = ranking(hardness=np.arange(len(wrong)) / len(wrong) - wrong)
    claims = claims_of(figure, easy)
    assert (claims[WRONG].effect, claims[WRONG].holds) == (-1.0, False)


def test_the_table_names_the_examples(tmp_path):
    run = ranking()
    paths, claims = figure.draw([run], tmp_path)
    assert claims == figure.measure([run])
    with paths["csv"].open() as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 2 * CLASSES * SHOWN
    assert [int(row["index"]) for row in rows] == value(run, "shown").ravel().tolist()
    hard = [row for row in rows if row["panel"] == "a"]
    assert all(row["series"] != f"true class {row['x']}" for row in hard)
    assert all(r["series"] == f"true class {r['x']}" for r in rows if r["panel"] == "b")


def test_cifar10_is_called_what_it_is(tmp_path):
    run = ranking(source="cifar10", color=True)
    assert figure._caption(figure._study([run]), CLASSES).startswith("CIFAR-10, 90 examples")
    run = run._replace(provenance={"source": "cifar10 (JPEG)"})
    _, claims = figure.draw([run], tmp_path)
    assert all(claim.scale.startswith("CIFAR-10 (JPEG), 90 examples") for claim in claims)
    caption = figure._caption(figure._study([run]), CLASSES)
    assert caption.startswith("CIFAR-10 (JPEG)")
    assert figure._classes(figure._study([run])) == ["0", "1", "2"]  # these aren't its ten


def test_equal_images_and_floats_are_drawn(tmp_path):
    images = np.zeros((2, CLASSES, SHOWN, 8, 8), np.float32)
    figure.draw([with_array(ranking(), "shown_images", images)], tmp_path)
    assert (tmp_path / "data_diet_examples.pdf").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("value", "text"), [(1.234, "1.23"), (0.123, "0.12"), (0.0512, "0.051"), (1e-5, "<.001")]
)
def test_scores_are_printed_short(value, text):
    assert figure._number(value) == text


def test_the_same_bytes_twice(tmp_path):
    one, _ = figure.draw([ranking(spread=0.01)], tmp_path / "one")
    other, _ = figure.draw([ranking(spread=0.01)], tmp_path / "other")
    for suffix in one:
        assert one[suffix].read_bytes() == other[suffix].read_bytes()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda r: with_array(r, "shown", None), "no array 'shown': its data are no images"),
        (lambda r: with_array(r, "shown_images", None), r"must be images for .*got \(0,\)"),
        (lambda r: with_array(r, "shown_images", np.ones((2, 3, 2, 64))), "must be images for"),
        (lambda r: with_array(r, "shown", value(r, "shown") + 80), "rows below 90"),
        (lambda r: with_array(r, "shown", value(r, "shown")[::-1]), "not the examples of extreme"),
        (lambda r: with_array(r, "clean", None), "no array 'clean'"),
        (lambda r: with_config(r, study={"kind": "Ranking"}), "no 'study.scored_at'"),
        (lambda r: ranking(replicas=3), "score.replicas must be >= 4 .* got 1"),
    ],
)
def test_what_a_run_lacks_is_named(tmp_path, broken, message):
    with pytest.raises(ValueError, match=f"data_diet run 0000000000000014.*{message}"):
        figure.draw([broken(ranking())], tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_experiments_choice_is_ours():
    """The rows of extremes are those of the stable order that ``rank`` takes."""
    run = ranking(spread=0.2)
    study = figure._study([run])
    mean = value(run, "el2n", 5.0)[: REPLICAS // DRAWS].astype(float).mean(axis=0)
    np.testing.assert_array_equal(study.extremes(mean, 0), value(run, "shown"))
    assert statistics.spearman(mean, value(run, "el2n", 5.0)[0]) > 0.5
