"""Run directories: readable whatever happened to the process that wrote them."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamics import record
from dynamics.config import Positive, Replica, Seed, fingerprint, frozen, to_dict
from dynamics.record import (
    Recorder,
    RecordError,
    Run,
    Table,
    completed,
    read,
    read_all,
    runs,
    write,
)

FEW = settings(derandomize=True, deadline=None, max_examples=25)


@frozen
class Net:
    width: int = 3
    cuts: tuple[float, ...] = (0.5, 0.25)


@frozen
class Point:
    rate: Annotated[Positive, Replica] = 0.5
    seed: Annotated[Seed, Replica] = 0
    net: Net = Net()
    limit: float | None = None


COLUMNS = {
    "step": np.array([0, 0, 5]),
    "loss": np.array([1.5, np.nan, -np.inf]),
    "method": np.array(["random", "el2n_hard", "ü"]),
    "good": np.array([True, False, True]),
}
TABLE = Table(
    rows=COLUMNS | {"kept": np.array([1, 2, 3], np.int32), "f": np.float32([0.1, np.nan, np.inf])},
    arrays={
        "el2n.score@5": np.arange(6, dtype=np.float32).reshape(2, 3),
        "one": np.array(3.5),
        "none": np.zeros((0, 4), np.int64),
        "diverged": np.array([np.inf, 7.0]),
    },
)


def assert_rows(found: Any, wanted: Any) -> None:
    names = list(found.columns) if hasattr(found, "columns") else list(found)
    assert names == list(wanted)
    for name in names:
        np.testing.assert_array_equal(np.asarray(found[name]), wanted[name], err_msg=name)


def assert_table(found: Table, wanted: Table) -> None:
    assert_rows(found.rows, wanted.rows)
    assert found.arrays.keys() == wanted.arrays.keys()
    for name, value in wanted.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], value)
        assert found.arrays[name].dtype == value.dtype
    for name, value in wanted.rows.items():
        if value.dtype.kind != "U":
            assert found.rows[name].dtype == value.dtype, name


def table_of(run: Run) -> Table:
    return Table({name: run.rows[name].to_numpy() for name in run.rows.columns}, run.arrays)


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path / "run", Point(), {"data": "d1"})


# ---- a run that is going on ---------------------------------------------------------------------


def test_what_is_there_from_the_start(recorder: Recorder) -> None:
    run = read(recorder.path)
    assert run.config == json.loads(json.dumps(to_dict(Point())))
    assert run.fingerprint == "run" and not run.done and len(run.rows) == 0 and run.arrays == {}
    assert run.provenance["data"] == "d1" and run.provenance["command"] == sys.argv
    assert run.provenance["versions"]["numpy"] == np.__version__
    git = run.provenance["git"]
    assert git is None or (len(git) == 40 and isinstance(run.provenance["dirty"], str))


def test_rows_come_back(recorder: Recorder) -> None:
    recorder.append(COLUMNS)
    assert_rows(read(recorder.path).rows, COLUMNS)
    recorder.append({"step": np.array([9]), "accuracy": np.array([0.25])})
    rows = read(str(recorder.path)).rows
    assert len(rows) == 4 and rows["step"].to_list() == [0, 0, 5, 9]
    np.testing.assert_array_equal(rows["accuracy"].to_numpy(), [np.nan] * 3 + [0.25])
    assert np.isnan(rows["loss"].to_numpy()[3])


@FEW
@given(values=st.lists(st.floats(), min_size=1, max_size=5))
def test_numbers_come_back_to_the_last_bit(tmp_path_factory: Any, values: Any) -> None:
    recorder = Recorder(tmp_path_factory.mktemp("run"), Point())
    recorder.append({"x": np.array(values)})
    np.testing.assert_array_equal(read(recorder.path).rows["x"].to_numpy(), np.array(values))


def test_columns_must_be_equally_long(recorder: Recorder) -> None:
    recorder.append({"a": np.arange(2)})
    with pytest.raises(ValueError):
        recorder.append({"a": np.arange(2), "b": np.arange(3)})
    assert len(read(recorder.path).rows) == 2
    recorder.append({})
    recorder.append({"a": np.arange(0)})
    assert len(read(recorder.path).rows) == 2


def half(recorder: Recorder, text: bytes = b'{"step": 12, "lo') -> None:
    with (recorder.path / "rows.jsonl").open("ab") as file:
        file.write(text)


def test_half_a_row_is_dropped(recorder: Recorder) -> None:
    recorder.append(COLUMNS)
    for cut in (b"{", b'{"step": 12, "loss": 3', b'{"step": 12}'):  # no newline: not complete
        half(recorder, cut)
        assert_rows(read(recorder.path).rows, COLUMNS)
        recorder.rewind(os.path.getsize(recorder.path / "rows.jsonl") - len(cut))


def test_a_process_that_follows_a_killed_one_may_append(recorder: Recorder) -> None:
    recorder.append({"step": np.array([1, 2])})
    half(recorder)
    Recorder(recorder.path, Point()).append({"step": np.array([3])})
    assert read(recorder.path).rows["step"].to_list() == [1, 2, 3]


def test_rewind(recorder: Recorder) -> None:
    assert recorder.rewind(0) == []
    recorder.append({"step": np.array([1, 2])})
    position = recorder.position()
    recorder.append({"step": np.array([3])})
    half(recorder)
    rows = Recorder(recorder.path, Point()).rewind(position)
    assert rows == [{"step": 1}, {"step": 2}]
    recorder.append({"step": np.array([7])})
    assert read(recorder.path).rows["step"].to_list() == [1, 2, 7]
    assert recorder.rewind(recorder.position()) == [{"step": 1}, {"step": 2}, {"step": 7}]
    assert recorder.rewind(0) == [] and recorder.position() == 0


def test_lost_rows_are_an_error(recorder: Recorder) -> None:
    with pytest.raises(RecordError, match="0 bytes.*made with 5"):
        recorder.rewind(5)
    recorder.append({"step": np.array([1, 2])})
    position = recorder.position()
    os.truncate(recorder.path / "rows.jsonl", position - 1)
    with pytest.raises(RecordError, match=f"{position - 1} bytes.*made with {position}"):
        recorder.rewind(position)


def test_arrays_come_back(recorder: Recorder) -> None:
    for name, value in TABLE.arrays.items():
        recorder.array(name, value)
        np.testing.assert_array_equal(recorder.arrays()[name], value)
    recorder.array("one", np.array(4.5))
    assert recorder.arrays()["one"] == 4.5
    assert recorder.arrays().keys() == read(recorder.path).arrays.keys() == TABLE.arrays.keys()


def test_no_run(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(RecordError, match="no config.json"):
            read(path)


# ---- damage: an error, or what was written ------------------------------------------------------


def flip_each_byte(file: Path) -> Iterator[None]:
    """One bit of about fifty bytes over the file, one at a time; then truncated, then gone."""
    content = file.read_bytes()
    for at in range(0, len(content), max(1, len(content) // 50)):
        changed = bytearray(content)
        changed[at] ^= 1 << at % 8
        file.write_bytes(changed)
        yield
    file.write_bytes(content[: len(content) // 2])
    yield
    file.unlink()
    yield
    file.write_bytes(content)


@pytest.mark.parametrize("finished", [False, True], ids=["live", "finished"])
def test_damage_is_never_read_as_data(tmp_path: Path, finished: bool) -> None:
    recorder = Recorder(tmp_path / "run", Point(), {"data": "d1"})
    recorder.append(COLUMNS)
    recorder.append(COLUMNS)
    recorder.array("a", np.arange(5))
    if finished:
        recorder.finish(TABLE)
    whole, refused = read(recorder.path), 0
    for file in [p for p in recorder.path.rglob("*") if p.is_file()]:
        for _ in flip_each_byte(file):
            try:
                found = read(recorder.path)
            except RecordError as error:
                assert str(recorder.path) in str(error)
                refused += 1
                continue
            if found.done != finished or (file.name == "sums.jsonl" and len(found.rows) < 6):
                continue  # the first rows of a run that goes on
            assert found.config == whole.config and found.provenance["data"] == "d1"
            assert found.rows.equals(whole.rows, null_equal=True), file
            if file.name != "sums.jsonl":
                assert found.arrays.keys() == whole.arrays.keys(), file
            for name, value in found.arrays.items():
                assert value.tobytes() == whole.arrays[name].tobytes(), file
    assert refused > 100


def test_damaged_rows_are_not_continued(recorder: Recorder) -> None:
    recorder.append({"step": np.array([11, 12])})
    position = recorder.position()
    recorder.append({"step": np.array([13])})
    recorder.array("a", np.zeros(2))
    rows = (recorder.path / "rows.jsonl").read_bytes()
    (recorder.path / "rows.jsonl").write_bytes(rows.replace(b"13", b"14"))
    assert recorder.rewind(position) == [{"step": 11}, {"step": 12}]  # it was to go in any case
    (recorder.path / "rows.jsonl").write_bytes(rows[:position].replace(b"12", b"13"))
    with pytest.raises(RecordError, match="rows.jsonl was changed after it was written: restore"):
        Recorder(recorder.path, Point()).rewind(position)
    (recorder.path / "arrays" / "a.npz").unlink()
    with pytest.raises(RecordError, match="has lost its arrays/a.npz: restore"):
        recorder.arrays()


def test_a_result_without_its_mark_is_not_computed_again(recorder: Recorder) -> None:
    recorder.finish(TABLE)
    (recorder.path / "done.json").unlink()
    with pytest.raises(RecordError, match="was finished and has lost its done.json: restore"):
        Recorder(recorder.path, Point())


def test_what_can_not_be_written_says_where_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecordError, match=r"file/a.json can't be written \(Not a dir.*start again"):
        write(tmp_path / "file" / "a.json", "text")


def test_arrays_by_a_clock_that_was_reset(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The zip format knows no time before 1980, and a machine without a clock starts in 1970."""
    real = time.localtime
    monkeypatch.setattr(time, "localtime", lambda at=None: real(0))
    recorder.array("a", np.arange(3))
    np.testing.assert_array_equal(recorder.arrays()["a"], np.arange(3))


# ---- whole files or none ------------------------------------------------------------------------


class Killed(BaseException):
    pass


def killing(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The process dies when it renames for the ``after``-th time."""
    left, real = [after], os.replace

    def replace(a: Any, b: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        real(a, b)

    monkeypatch.setattr(os, "replace", replace)


def test_a_failed_write_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.json", "old")
    with monkeypatch.context() as patch:
        killing(patch, 0)
        with pytest.raises(Killed):
            write(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old"
    write(tmp_path / "a.json", b"newer")
    assert (tmp_path / "a.json").read_bytes() == b"newer"


def test_what_a_killed_process_left_is_cleaned(recorder: Recorder) -> None:
    for folder in (recorder.path, recorder.path / "arrays"):
        (folder / ".x.npz.123.tmp").write_bytes(b"half")
    recorder.array("kept", np.zeros(1))
    again = Recorder(recorder.path, Point())
    assert not list(recorder.path.rglob("*.tmp")) and again.arrays().keys() == {"kept"}


@pytest.mark.parametrize("after", range(2))
def test_killed_while_it_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Not yet a run, or one: never a third thing."""
    with monkeypatch.context() as patch:
        killing(patch, after)
        with pytest.raises(Killed):
            Recorder(tmp_path, Point())
    with pytest.raises(RecordError):
        read(tmp_path)
    assert runs(tmp_path.parent, tmp_path.name) == []
    Recorder(tmp_path, Point())
    assert not read(tmp_path).done


@pytest.mark.parametrize("after", range(len(TABLE.arrays) + 2))
def test_killed_while_it_finishes(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Until it is done the live rows count, and finishing again finishes."""
    recorder.append({"step": np.array([1])})
    with monkeypatch.context() as patch:
        killing(patch, after)
        with pytest.raises(Killed):
            recorder.finish(TABLE)
    again = Recorder(recorder.path, Point())
    again.append({"step": np.array([2])})
    run = read(recorder.path)
    assert not run.done and run.rows["step"].to_list() == [1, 2]
    again.finish(TABLE)
    assert read(recorder.path).done
    assert_table(table_of(read(recorder.path)), TABLE._replace(arrays=dict(sorted(TABLE.arrays.items()))))  # noqa: E501  # fmt: skip


def test_finishing(recorder: Recorder) -> None:
    recorder.append({"step": np.array([1])})
    recorder.array("of a probe", np.zeros(3))
    recorder.finish(TABLE)
    run = read(recorder.path)
    assert run.done and not (recorder.path / "rows.jsonl").exists()
    assert_table(table_of(run), TABLE)
    assert "of a probe" not in run.arrays


def test_killed_after_it_is_done(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tidied up last does not belong to the result."""
    recorder.append({"step": np.array([1])})
    recorder.array("of a probe", np.zeros(3))

    def unlink(*args: Any, **kwargs: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(Killed):
            recorder.finish(TABLE)
    run = read(recorder.path)
    if run.done:
        assert_table(table_of(run), TABLE)


def test_an_empty_table(recorder: Recorder) -> None:
    recorder.finish(Table({}, {}))
    run = read(recorder.path)
    assert run.done and len(run.rows) == 0 and run.arrays == {}


# ---- points that are computed once --------------------------------------------------------------

POINTS = tuple(Point(rate=r, seed=s) for r in (0.5, 1.0) for s in (0, 1))
ABOUT = {"data": "d1"}


def table(point: Point) -> Table:
    rows = {
        "x": np.array([point.rate, np.nan]),
        "kept": np.array([point.seed, 2], np.int32),
        "method": np.array(["a", "b"]),
    }
    return Table(rows, {"w": np.full((2, 2), point.rate, np.float32), "a.b@3": np.arange(3)})


class Compute:
    """Remembers what it was asked."""

    def __init__(self, fail: bool = False):
        self.asked: list[Any] = []
        self.recorders: list[Any] = []
        self.fail = fail

    def __call__(self, points: Any, recorder: Any) -> list[Table]:
        self.asked.append(tuple(points))
        self.recorders.append(recorder)
        if recorder is not None:
            recorder.append({"step": np.array([1])})
            recorder.array("carry", np.zeros(2))
        if self.fail:
            raise Killed
        return [table(p) for p in points]


def test_with_and_without_a_folder_the_tables_are_equal(tmp_path: Path) -> None:
    plain, stored = Compute(), Compute()
    without = completed(None, POINTS, plain, ABOUT)
    within = completed(tmp_path, POINTS, stored, ABOUT)
    again = completed(str(tmp_path), POINTS, Compute(fail=True), ABOUT)
    assert plain.asked == stored.asked == [POINTS] and plain.recorders == [None]
    for a, b, c in zip(without, within, again, strict=True):
        for found in (b, c):
            assert_rows(found.rows, a.rows)
            assert_table(found, a)


def test_missing_points_are_computed_together_and_finished_ones_are_not(tmp_path: Path) -> None:
    compute = Compute()
    completed(tmp_path, POINTS[2:3], compute, ABOUT)
    found = completed(tmp_path, POINTS, compute, ABOUT)
    assert compute.asked == [POINTS[2:3], POINTS[:2] + POINTS[3:]]
    for a, point in zip(found, POINTS, strict=True):
        assert_table(a, table(point))
    homes = {fingerprint(point) for point in POINTS}
    assert {path.name for path in tmp_path.iterdir()} == homes  # the group's directory is gone
    assert all(read(tmp_path / home).done for home in homes)
    assert compute.recorders[0].path == tmp_path / fingerprint(POINTS[2])  # its own
    assert compute.recorders[1].path.name not in homes
    assert completed(tmp_path, POINTS[::-1], compute, ABOUT)[0].rows["x"][0] == POINTS[-1].rate
    assert len(compute.asked) == 2
    assert completed(tmp_path, (), compute, ABOUT) == []


def test_a_killed_group_goes_on_where_it_was(tmp_path: Path) -> None:
    compute = Compute(fail=True)
    with pytest.raises(Killed):
        completed(tmp_path, POINTS, compute, ABOUT)
    compute.fail = False
    completed(tmp_path, POINTS, compute, ABOUT)
    a, b = (recorder.path for recorder in compute.recorders)
    assert a == b and not a.exists()


def test_a_group_that_can_not_be_removed_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Any, ignore_errors: bool = False) -> None:
        if not ignore_errors:  # as rmtree does, without the folder
            raise PermissionError(13, "Permission denied", "_sharding")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        with pytest.raises(RecordError, match="group-.* can't be written .Permission denied"):
            completed(tmp_path, POINTS, Compute(), ABOUT)
    assert len(completed(tmp_path, POINTS, Compute(fail=True), ABOUT)) == len(POINTS)


@pytest.mark.parametrize("points", [POINTS, POINTS[:1]], ids=["group", "alone"])
def test_results_of_other_data_are_refused(tmp_path: Path, points: Any) -> None:
    completed(tmp_path, points, Compute(), ABOUT)
    with pytest.raises(RecordError, match="d1.*d2"):
        completed(tmp_path, points, Compute(), {"data": "d2"})


@pytest.mark.parametrize("points", [POINTS, POINTS[:1]], ids=["group", "alone"])
def test_half_a_run_on_other_data_is_not_continued(tmp_path: Path, points: Any) -> None:
    """Checkpoints of a killed run must not be taken up with data they know nothing of."""
    with pytest.raises(Killed):
        completed(tmp_path, points, Compute(fail=True), ABOUT)
    with pytest.raises(RecordError, match="d1.*d2"):
        completed(tmp_path, points, Compute(), {"data": "d2"})
    completed(tmp_path, points, Compute(), ABOUT)


def test_a_group_that_never_began_is_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before its config was written; then other points are asked for."""
    with monkeypatch.context() as patch:
        killing(patch, 0)
        with pytest.raises(Killed):
            completed(tmp_path, POINTS, Compute(), ABOUT)
    assert len(completed(tmp_path, POINTS[:2], Compute(), ABOUT)) == 2


def test_a_group_killed_while_it_is_stored_goes_on_as_that_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoints hold all its points, and a point that is stored is not stored again."""
    finish, stored = Recorder.finish, []

    def once(self: Recorder, found: Table) -> None:
        if stored:
            raise Killed
        stored.append(self.path)
        finish(self, found)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "finish", once)
        with pytest.raises(Killed):
            completed(tmp_path, POINTS, Compute(), ABOUT)
    compute = Compute()
    found = completed(tmp_path, POINTS, compute, ABOUT)
    assert [list(asked) for asked in compute.asked] == [list(POINTS)]
    for a, point in zip(found, POINTS, strict=True):
        assert_table(a, table(point))


# ---- many runs ----------------------------------------------------------------------------------


def test_runs_are_the_finished_ones_the_newest_last(tmp_path: Path) -> None:
    names = ["c", "a", "b"]
    for age, name in enumerate(names):
        Recorder(tmp_path / "study" / name, Point()).finish(TABLE)
        os.utime(tmp_path / "study" / name / "done.json", ns=(0, 10**9 * (age + 1)))
    Recorder(tmp_path / "study" / "going on", Point())
    Recorder(tmp_path / "other" / "d", Point()).finish(TABLE)
    assert [path.name for path in runs(tmp_path, "study")] == names
    assert runs(tmp_path, "nothing") == [] and runs(tmp_path / "nowhere", "study") == []


def test_read_all_puts_the_config_beside_the_rows(tmp_path: Path) -> None:
    made = [Point(), Point(rate=2.0, limit=0.5, net=Net(width=7, cuts=()))]
    for i, point in enumerate(made):
        rows = {"x": np.arange(2.0) + i} | ({"y": np.array(["a", "b"])} if i else {})
        Recorder(tmp_path / str(i), point).finish(Table(rows, {}))
    going = Recorder(tmp_path / "2", Point(seed=5))
    going.append({"x": np.array([9.0])})
    found = read_all([tmp_path / str(i) for i in range(3)])
    assert found["x"].to_list() == [0, 1, 1, 2, 9]
    assert found["y"].to_list() == [None, None, "a", "b", None]
    assert found["run"].to_list() == ["0", "0", "1", "1", "2"]
    assert found["config.rate"].to_list() == [0.5, 0.5, 2, 2, 0.5]
    assert found["config.seed"].to_list() == [0, 0, 0, 0, 5]
    assert found["config.limit"].to_list() == [None, None, 0.5, 0.5, None]
    assert found["config.net.width"].to_list() == [3, 3, 7, 7, 3]
    assert found["config.net.kind"].to_list() == ["Net"] * 5
    assert found["config.net.cuts"].to_list()[1:3] == [[0.5, 0.25], []]
    assert len(read_all([])) == 0


def test_a_directory_is_read_without_jax(recorder: Recorder) -> None:
    recorder.finish(TABLE)
    code = f"""
import sys
from dynamics import record
run = record.read({str(recorder.path)!r})
assert run.done and len(run.rows) == 3 and run.arrays["one"] == 3.5
assert not any(name == "jax" or name.startswith("jax.") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_git_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    found = record.provenance({"data": "x"})
    assert found["git"] is None and found["dirty"] is None and found["data"] == "x"
    json.dumps(found)
