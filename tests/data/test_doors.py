"""What comes in as data: taken as what it is, or refused in one sentence that names it."""

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamics import fit, mesh, models, scores, step, task
from dynamics.data import DataConfig, DataError, corrupt, load, of_arrays
from dynamics.data.sources import repeated, split_groups
from dynamics.data.stream import resident, sampled, whole
from dynamics.types import IGNORED

N, C = 24, 4
X = np.random.default_rng(0).normal(size=(N, 5)).astype(np.float32)
Y = (np.arange(N) % C).astype(np.int32)
NET = task.of_function(lambda p, x: x @ p["w"], init=lambda key: {"w": jnp.zeros((5, C))})
STATE = step.given({"w": jnp.ones((5, C))})


def npz(path: Path, **arrays: Any) -> DataConfig:
    np.savez(path, **arrays)
    return DataConfig(source="npz", file=str(path))


# ---- inputs -------------------------------------------------------------------------------------


@given(
    dtype=st.sampled_from(["f2", "f4", "f8", ">f4", "c8", "O", "U3"]),
    bad=st.sampled_from([None, np.nan, np.inf, -np.inf, 1e300]),
    place=st.integers(0, 5 * N - 1),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_inputs_are_finite_numbers_or_refused(dtype: str, bad: float | None, place: int) -> None:
    x = X.astype(dtype)
    if bad is not None:
        with np.errstate(over="ignore"):
            x.reshape(-1)[place] = bad
    if dtype not in ("c8", "O", "U3") and bad is None:
        np.testing.assert_array_equal(of_arrays(x, Y).x, x)
        return
    with pytest.raises(ValueError, match="x must be"):
        of_arrays(x, Y)


def test_the_example_is_named() -> None:
    x = X.copy()
    x[7, 1] = np.nan
    with pytest.raises(ValueError, match="x must be finite in float32, got nan in example 7"):
        of_arrays(x, Y)
    with pytest.raises(ValueError, match=r"x must be a dense array.*x.toarray\(\)"):
        of_arrays(scipy.sparse.csr_matrix(X), Y)
    with pytest.raises(ValueError, match="labels must be finite in float32, got inf in example 3"):
        of_arrays(X, np.where(np.arange(N) == 3, np.inf, 0.5))


def test_columns_of_other_units_are_warned_of(caplog: Any, tmp_path: Path) -> None:
    apart = X * np.array([1, 1, 1, 1, 1e6], np.float32)
    of_arrays(X, Y)
    of_arrays(1e-5 * X * (np.arange(5) > 0), Y)  # a constant column has no spread
    assert not caplog.records
    of_arrays(apart, Y)
    assert "standardise them first" in caplog.text
    loaded = load(npz(tmp_path / "a.npz", x=apart, y=Y)).train  # those of a file are standardised
    np.testing.assert_allclose(((loaded.x - loaded.mean) / loaded.std).std(axis=0), 1, rtol=1e-4)


def test_channels_first_are_refused(tmp_path: Path) -> None:
    images = np.zeros((N, 3, 8, 8), np.uint8)
    with pytest.raises(DataError, match=r"channels last.*transpose\(0, 2, 3, 1\)"):
        load(npz(tmp_path / "a.npz", x=images, y=Y))
    assert load(npz(tmp_path / "b.npz", x=images.transpose(0, 2, 3, 1), y=Y)).num_classes == C


# ---- labels -------------------------------------------------------------------------------------


@given(st.lists(st.one_of(st.integers(-3, C + 2), st.just(IGNORED)), min_size=N, max_size=N))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_labels_are_classes_of_the_network_or_refused(labels: list[int]) -> None:
    y = np.array(labels)
    known = y[y != IGNORED]
    if not len(known) or (0 <= known.min() and known.max() < C):
        found = scores.over_examples(scores.loss, NET, STATE, of_arrays(X, y))
        assert found.shape == (N,)
        return
    with pytest.raises(ValueError, match="labels must be classes 0 to 3, .* 4 outputs"):
        scores.over_examples(scores.loss, NET, STATE, of_arrays(X, y))


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_run_begins_with_labels_of_its_outputs(shift: int) -> None:
    good, moved = of_arrays(X, Y), of_arrays(X, Y + shift)
    even = np.full((1, N), 1 / N)
    streams = {
        "data": resident(moved, 8, 1),
        "own": resident(good, 8, 1, labels=(Y + shift)[None]),
        "drawn": sampled(good, 8, 1, even, labels=(Y + shift)[None]),
        "whole": whole(good, 1, labels=(Y + shift)[None]),
    }
    net = task.of_dataset(models.make(models.MLP(width=4, depth=1), C), good)
    here, rule = mesh.for_population(1), optax.sgd(0.1)
    state = fit.init(net, rule, jax.random.split(jax.random.key(0), 1), {}, here)
    for stream in streams.values():
        with pytest.raises(ValueError, match="labels of the stream must be classes 0 to 3"):
            fit.fit(net, rule, state, stream, 2, here)
    with pytest.raises(ValueError, match="labels of the data set 'test' must be classes 0 to 3"):
        fit.fit(net, rule, state, resident(good, 8, 1), 2, here, data={"test": moved})


def test_noise_takes_integers_of_one_axis_and_says_what_classes_are_empty(caplog: Any) -> None:
    usual = corrupt.symmetric(Y, 0.5, C, 0).labels
    for same in (Y.tolist(), jnp.asarray(Y), Y.astype(np.int64)):
        np.testing.assert_array_equal(corrupt.symmetric(same, 0.5, C, 0).labels, usual)
    for wrong in (Y[:, None], np.eye(C, dtype=int)[Y], Y.astype(str), Y.astype(float)):
        with pytest.raises(ValueError, match="y must be integer labels"):
            corrupt.symmetric(wrong, 0.5, C, 0)
    assert not caplog.records
    corrupt.symmetric(np.array([0, 50, 99])[Y % 3], 0.5, 100, 0)
    assert "97 of 100 classes have no example" in caplog.text


# ---- parts --------------------------------------------------------------------------------------


def test_classes_that_are_only_tested_on_are_named(tmp_path: Path, caplog: Any) -> None:
    load(npz(tmp_path / "a.npz", x_train=X[Y < 3], y_train=Y[Y < 3], x_test=-X, y_test=Y))
    assert "classes [3] are tested on and have no training example" in caplog.text
    caplog.clear()
    load(npz(tmp_path / "b.npz", x=X, y=2 * Y))
    assert "3 of its 7 classes have no example" in caplog.text


def test_examples_in_both_parts_are_counted(tmp_path: Path, caplog: Any) -> None:
    assert repeated(X, np.concatenate([X[:3], -X])) == 3
    load(npz(tmp_path / "a.npz", x=np.repeat(X, 4, axis=0), y=np.repeat(Y, 4)))
    assert "test examples are training examples, too" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load(DataConfig())
    assert not caplog.records  # the digits are all different


@given(st.lists(st.integers(0, 6), min_size=4, max_size=60), st.floats(0.1, 0.9), st.integers(0, 3))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_no_group_is_in_both_parts(groups: list[int], part: float, seed: int) -> None:
    of = np.array(groups)
    try:
        train, test = split_groups(of, part, seed)
    except ValueError as error:
        assert "whole groups" in str(error)
        return
    assert not set(of[train]) & set(of[test]) and len(train) and len(test)
    assert sorted([*train, *test]) == list(range(len(of)))
    assert len(test) <= np.ceil(round(part * len(of), 6))


def test_a_file_with_groups_is_split_by_them(tmp_path: Path) -> None:
    group = np.array([f"patient {i // 4}" for i in range(N)])
    data = load(npz(tmp_path / "a.npz", x=X, y=Y, group=group))
    assert not set(group[data.train.file_row]) & set(group[data.test.file_row])
    with pytest.raises(DataError, match=r"group to be integers or text of shape \(24,\)"):
        load(npz(tmp_path / "b.npz", x=X, y=Y, group=group[:-1]))
