"""Tables of members, and what comes back joined to them: each against an obvious loop."""

from typing import Any

import jax
import numpy as np
import polars as pl
import pytest
import tiny

from dynamics import fit, mesh, scores, training
from dynamics.probes import Evaluate, Forgetting, Score
from dynamics.record import Array
from dynamics.training import Trained
from dynamics.types import Results

POINTS = [{"seed": 3, "noise": 0.1}, {"seed": 2**31 - 1, "noise": 0.2}]


def cells(p: int) -> list[dict[str, Any]]:
    """The second point has a method more."""
    plain = [{"method": "plain"}, {"method": "elr", "elr_lambda": 3.0}]
    return plain if p == 0 else [*plain, {"method": "half", "keep": 5}]


@pytest.fixture(scope="module")
def members() -> pl.DataFrame:
    return training.table(POINTS, cells, 2)


def test_a_table_has_a_member_for_each_point_cell_and_replica(members: pl.DataFrame) -> None:
    expected = []
    for p, point in enumerate(POINTS):
        for cell in cells(p):
            for replica in range(2):
                row = {"member": len(expected), "point": p, **point, "replica": replica}
                row |= {"method": None, "elr_lambda": None, "keep": None} | cell
                expected.append(row)
    assert members.rows(named=True) == expected
    assert members.columns == [*expected[0]]


def test_cells_are_those_of_their_point() -> None:
    asked = []

    def one(p: int) -> list[dict[str, Any]]:
        asked.append(p)
        return [{}]

    found = training.table([{"seed": 0}] * 3, one, 1)
    assert asked == [0, 1, 2] and found["point"].to_list() == [0, 1, 2]
    assert found.columns == ["member", "point", "seed", "replica"]


@pytest.mark.parametrize("purposes", [(), (7,), (7, 2)])
def test_keys_are_folded_one_by_one(members: pl.DataFrame, purposes: tuple[int, ...]) -> None:
    found = training.keys(members, *purposes)
    for k, row in enumerate(members.rows(named=True)):
        key = jax.random.key(row["seed"])
        for part in (*purposes, row["replica"]):
            key = jax.random.fold_in(key, part)
        np.testing.assert_array_equal(jax.random.key_data(found[k]), jax.random.key_data(key))


def test_a_key_depends_on_seed_purposes_and_replica_alone(members: pl.DataFrame) -> None:
    whole = jax.random.key_data(training.keys(members, 1))
    some = members.filter(pl.col("method") == "elr")[::-1]
    np.testing.assert_array_equal(
        jax.random.key_data(training.keys(some, 1)), whole[some["member"].to_numpy()]
    )
    assert len({tuple(key) for key in np.asarray(whole)}) == 4  # two seeds, two replicas


def test_column(members: pl.DataFrame) -> None:
    def one(name: str, default: float) -> list[float]:
        rows = members.rows(named=True)
        return [float(default if row.get(name) is None else row[name]) for row in rows]

    for name in ("noise", "elr_lambda", "keep", "nothing"):
        found = training.column(members, name, 4.5)
        assert found.dtype == np.float64 and found.tolist() == one(name, 4.5)


# ---- trained ------------------------------------------------------------------------------------


def probes(p: tiny.Problem) -> list[Any]:
    return [Evaluate(3), Forgetting(len(p.data), 3)]


@pytest.fixture(scope="module")
def ran() -> tuple[pl.DataFrame, Trained, Results]:
    """Members numbered otherwise than they lie, one of which diverges."""
    p = tiny.problem("mlp", 6, momentum=0.0, nesterov=False)
    rates = [0.02, 1e30, 0.05]
    members = training.table([{"seed": 0}], lambda _: [{"learning_rate": r} for r in rates], 1)
    members = members.with_columns(member=pl.Series([7, 5, 9], dtype=pl.UInt32))
    roots, scalars = training.keys(members, 1), p.rule.hyperparameters()
    stream = tiny.batches(p, 3)
    data = {"train": p.data, "test": p.data}
    options = {"probes": probes(p), "record_every": 1, "data": data}
    found = training.train(members, roots, p.task, p.rule, stream, 6, mesh.make(), **options)
    state = fit.init(
        p.task, p.optimizer, roots, scalars | {"learning_rate": np.float32(rates)}, mesh.make()
    )
    plain = fit.fit(p.task, p.optimizer, state, stream, 6, mesh.make(), **options)
    return members, found, plain


def joined_by_hand(members: pl.DataFrame, frame: pl.DataFrame, diverged: list) -> list[dict]:
    rows = []
    for row in frame.rows(named=True):
        own = members.row(row["member"], named=True) | {"diverged": diverged[row["member"]]}
        rows.append(own | {n: v for n, v in row.items() if n != "member"})
    return rows


def test_what_was_measured_comes_back_joined_to_the_table(ran: Any) -> None:
    members, found, plain = ran
    diverged = [
        row["step"] if row["status"] == "diverged" else None
        for row in plain.status.rows(named=True)
    ]
    assert diverged[0] is None and diverged[1] in (1, 2) and diverged[2] is None
    assert found.members.rows(named=True) == [
        row | {"diverged": at} for row, at in zip(members.rows(named=True), diverged, strict=True)
    ]
    assert found.rows.rows(named=True) == joined_by_hand(members, plain.rows, diverged)
    assert found.measured.keys() == plain.measured.keys() == {"test"}
    expected = joined_by_hand(members, plain.measured["test"], diverged)
    assert found.measured["test"].rows(named=True) == expected
    own = found.measured["test"].filter(pl.col("member") == 5)  # no row of what came after
    assert own["step"].to_list() == [0] and found.rows.filter(pl.col("member") == 5)[
        "step"
    ].to_list() == list(range(diverged[1]))
    assert found.arrays.keys() == plain.arrays.keys() == {("forgetting", "events")}
    array = found.arrays["forgetting", "events"]
    np.testing.assert_array_equal(array.coords["member"], [7, 5, 9])
    for place, member in enumerate([7, 5, 9]):
        whole = plain.arrays["forgetting", "events"].at(member=place)
        for step in array.coords["step"]:
            there = diverged[place] is None or step <= diverged[place]
            wanted = (
                whole.at(step=step).values if there else np.full(whole.values.shape[1:], np.nan)
            )
            np.testing.assert_array_equal(array.at(member=member, step=step).values, wanted)


def test_from_the_weights_of_others(ran: Any) -> None:
    """With the table's keys: the run of a state whose keys are replaced."""
    members, found, plain = ran
    p = tiny.problem("mlp", 6, momentum=0.0, nesterov=False)
    begun = tiny.start(p, mesh.make(), 3, seed=4, learning_rate=[0.02, 0.01, 0.05])
    roots, stream = training.keys(members, 2), tiny.batches(p, 3)
    on = training.train(members, roots, p.task, p.rule, stream, 6, mesh.make(), start=begun)
    again = fit.fit(p.task, p.optimizer, begun.replace(key=roots), stream, 6, mesh.make())
    assert on.rows["loss"].to_list() == again.rows["loss"].to_list()
    for a, b in zip(jax.tree.leaves(on.state), jax.tree.leaves(again.state), strict=True):
        a, b = (jax.random.key_data(x) if x.dtype == roots.dtype else x for x in (a, b))
        np.testing.assert_array_equal(a, b)


# ---- several programs ---------------------------------------------------------------------------


def made_up(group: pl.DataFrame, **changed: Any) -> Trained:
    """What a program with these members might leave: values that say whose they are."""
    places = group["member"].to_numpy()
    rows = group.join(pl.DataFrame({"step": [0, 1]}), how="cross")
    rows = rows.with_columns(loss=pl.col("member") * 10.0 + pl.col("step"))
    values = np.arange(2)[:, None, None] * 100.0 + places[None, :, None] * np.ones(3)
    coords = {"step": np.array([0, 5]), "member": places} | changed
    method = str(group["method"][0])
    measured = {"test": rows} | ({method: rows.select("member", "step")} if method == "elr" else {})
    arrays = {("p", "x"): Array(values, ("step", "member", "axis_0"), coords)}
    return Trained(group.with_columns(diverged=None), rows, measured, arrays, None)


def test_groups_are_trained_one_by_one_and_come_back_as_one(members: pl.DataFrame) -> None:
    seen = []

    def one(group: pl.DataFrame) -> Trained:
        seen.append((group["method"].unique().to_list(), group["member"].to_list()))
        return made_up(group)

    found = training.by_program(members, "method", one)
    assert seen == [(["plain"], [0, 1, 4, 5]), (["elr"], [2, 3, 6, 7]), (["half"], [8, 9])]
    order = [0, 1, 4, 5, 2, 3, 6, 7, 8, 9]
    assert found.members["member"].to_list() == order and found.state is None
    assert found.rows["loss"].to_list() == [10.0 * m + step for m in order for step in (0, 1)]
    assert found.measured["test"].equals(found.rows)
    assert found.measured["elr"]["member"].unique().sort().to_list() == [2, 3, 6, 7]
    array = found.arrays["p", "x"]
    for member in range(10):
        for i, step in enumerate((0, 5)):
            expected = np.full(3, i * 100.0 + member)
            np.testing.assert_array_equal(array.at(member=member, step=step).values, expected)
    alone = training.by_program(members.filter(pl.col("method") == "elr"), ["method"], made_up)
    assert alone.members["member"].to_list() == [2, 3, 6, 7]


def test_arrays_of_other_steps_are_not_put_beside_each_other(members: pl.DataFrame) -> None:
    def one(group: pl.DataFrame) -> Trained:
        later = {"step": np.array([0, 6])} if group["method"][0] == "elr" else {}
        return made_up(group, **later)

    with pytest.raises(ValueError, match=r"differ in their members only: \{'step': \[0, 5\]"):
        training.by_program(members, "method", one)


# ---- labelled arrays ----------------------------------------------------------------------------


def test_unstack(members: pl.DataFrame) -> None:
    both = members.filter(pl.col("method") != "half").sample(fraction=1.0, shuffle=True, seed=1)
    rng = np.random.default_rng(0)
    places = rng.permutation(10)
    array = Array(
        rng.normal(size=(2, 10, 3)),
        ("step", "member", "example"),
        {"step": np.array([0, 5]), "member": places, "example": np.array(["a", "b", "c"])},
    )
    found = training.unstack(array, both, "method", "point", "replica")
    assert found.dims == ("step", "method", "point", "replica", "example")
    assert found.values.shape == (2, 2, 2, 2, 3) and "member" not in found.coords
    assert found.coords["method"].tolist() == both["method"].unique(maintain_order=True).to_list()
    for row in both.rows(named=True):
        labels = {name: row[name] for name in ("method", "point", "replica")}
        one = found.at(**labels)
        whole = array.at(member=row["member"])
        assert one.dims == whole.dims == ("step", "example")
        np.testing.assert_array_equal(one.values, whole.values)
        np.testing.assert_array_equal(one.coords["example"], whole.coords["example"])


@pytest.mark.parametrize("columns", [("method",), ("method", "point"), ("seed", "replica")])
def test_unstack_wants_one_member_for_each(members: pl.DataFrame, columns: Any) -> None:
    array = Array(np.zeros(10), ("member",), {"member": np.arange(10)})
    with pytest.raises(ValueError, match="10 members are not one for each of"):
        training.unstack(array, members, *columns)


ARRAY = Array(
    np.arange(24).reshape(2, 3, 4),
    ("step", "name", "place"),
    {"step": np.array([5, 20]), "name": np.array(["b", "a", "c"])},
)


def test_at() -> None:
    for i, step in enumerate((5, 20)):
        for j, name in enumerate("bac"):
            for k in range(4):
                one = ARRAY.at(place=k, name=name, step=step)
                assert one.values == 24 // 2 * i + 4 * j + k and (one.dims, one.coords) == ((), {})
            part = ARRAY.at(name=name, step=step)
            assert part.dims == ("place",) and part.coords == {}
            np.testing.assert_array_equal(part.values, ARRAY.values[i, j])
    part = ARRAY.at(name="a")
    assert part.dims == ("step", "place") and part.coords.keys() == {"step"}
    assert ARRAY.at() == ARRAY


def test_among() -> None:
    for labels in (["a"], ["c", "b"], ["b", "a", "c"]):
        found = ARRAY.among("name", labels)
        assert found.dims == ARRAY.dims and found.coords["name"].tolist() == labels
        for label in labels:
            np.testing.assert_array_equal(found.at(name=label).values, ARRAY.at(name=label).values)
    places = ARRAY.among("place", [3, 0])
    np.testing.assert_array_equal(places.values, ARRAY.values[:, :, [3, 0]])
    np.testing.assert_array_equal(places.coords["step"], [5, 20])
    assert places.at(place=3).values.tolist() == ARRAY.values[:, :, 3].tolist()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"member": 0}, r"has no dim 'member', it has \('step', 'name', 'place'\)"),
        ({"step": 6}, r"has no step 6, it has \[.*5.*20.*\]"),
        ({"name": "d"}, "has no name 'd'"),
        ({"place": 4}, "has no place 4"),
        ({"place": -1}, "has no place -1"),
    ],
)
def test_labels_that_are_not_there(labels: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ARRAY.at(**labels)
    ((dim, label),) = labels.items()
    with pytest.raises(ValueError, match=message):
        ARRAY.among(dim, [label])


def test_phases_on_the_same_batches_are_one_run() -> None:
    """Cut in two phases it is the run in one: to the bit, and nothing is measured twice."""
    p = tiny.problem("mlp")
    members = training.table([{"seed": 3}], lambda _: [{"method": "a"}, {"method": "b"}], 1)
    roots, where, calls = training.keys(members, 1), mesh.make(), []

    def until(steps: int) -> Any:
        def phase(start: Any) -> training.Trained:
            calls.append(start)
            probes = [Evaluate(5), Score(scores.el2n, 5, "el2n")]
            data = {"test": p.data, "train": p.data}
            options: Any = {"start": start, "total": 20, "record_every": 1, "probes": probes}
            stream = tiny.batches(p, 2)
            return training.train(
                members, roots, p.task, p.rule, stream, steps, where, data=data, **options
            )

        return phase

    whole, cut = until(20)(None), training.by_phase([until(10), until(20)])
    assert calls[0] is None and calls[1] is None and int(calls[2].step) == 10
    for one, other in ((whole.rows, cut.rows), (whole.measured["test"], cut.measured["test"])):
        assert one.equals(other)
    key = ("el2n", "score")
    np.testing.assert_array_equal(whole.arrays[key].values, cut.arrays[key].values)
    np.testing.assert_array_equal(cut.arrays[key].coords["step"], [0, 5, 10, 15, 20])
    assert whole.members.equals(cut.members)
