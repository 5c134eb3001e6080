"""Run directories: readable whatever happened to the process that wrote them."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamics import record
from dynamics.config import Positive, Replica, Seed, fingerprint, frozen, to_dict
from dynamics.record import (
    FORMAT,
    Array,
    Findings,
    Recorder,
    RecordError,
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
FRAME = pl.DataFrame(
    COLUMNS
    | {"kept": np.array([1, 2, 3], np.int32), "f": np.float32([0.1, np.nan, np.inf])}
    | {"some": pl.Series([None, 2, None], dtype=pl.Int64)}
)
FINDINGS = Findings(
    frames={"test": FRAME, "members@2": FRAME[::-1], "nobody": FRAME.clear()},
    arrays={
        "el2n.score": Array(
            np.arange(6, dtype=np.float32).reshape(2, 3),
            ("step", "example"),
            {"step": np.array([0, 5]), "example": np.array(["a", "b", "ü"])},
        ),
        "one": Array(np.array(3.5), ()),
        "none": Array(
            np.zeros((0, 4), np.int64), ("member", "x"), {"member": np.zeros(0, np.int32)}
        ),
        "rates": Array(np.array([np.inf, 7.0]), ("rate",), {"rate": np.float32([0.1, np.nan])}),
    },
)


def assert_findings(found: Any, wanted: Any) -> None:
    assert found.frames.keys() == wanted.frames.keys()
    for name, frame in wanted.frames.items():
        tiny.assert_frame(found.frames[name], frame, name)
    assert found.arrays.keys() == wanted.arrays.keys()
    for name, array in wanted.arrays.items():
        tiny.assert_array(found.arrays[name], array, name)


def score(step: int, value: float = 0.0) -> tuple[str, str, int, Array]:
    """What a probe measured."""
    return "el2n", "score", step, Array(np.full(3, value + step), ("member",))


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path / "run", Point(), {"data": "d1"})


# ---- a run that is going on ---------------------------------------------------------------------


def test_what_is_there_from_the_start(recorder: Recorder) -> None:
    run = read(recorder.path)
    assert run.config == json.loads(json.dumps(to_dict(Point())))
    assert run.fingerprint == "run" and not run.done and run.frames == {} and run.arrays == {}
    assert run.provenance["format"] == FORMAT
    assert run.provenance["data"] == "d1" and run.provenance["command"] == sys.argv
    assert run.provenance["versions"]["numpy"] == np.__version__
    git = run.provenance["git"]
    assert git is None or (len(git) == 40 and isinstance(run.provenance["dirty"], str))


def test_rows_come_back(recorder: Recorder) -> None:
    recorder.append("rows", COLUMNS)
    tiny.assert_frame(read(recorder.path).frames["rows"], pl.DataFrame(COLUMNS))
    recorder.append("test", {"step": np.array([9]), "accuracy": np.array([0.25])})
    recorder.append("rows", {"step": np.array([9]), "accuracy": np.array([0.25])})
    frames = read(str(recorder.path)).frames
    assert frames["test"].rows(named=True) == [{"step": 9, "accuracy": 0.25}]
    rows = frames["rows"]
    assert len(rows) == 4 and rows["step"].to_list() == [0, 0, 5, 9]
    assert rows["accuracy"].to_list() == [None, None, None, 0.25]  # absence is never NaN
    assert rows["loss"].is_null().to_list() == [False, False, False, True]
    assert rows["loss"].is_nan().to_list()[:3] == [False, True, False]


@FEW
@given(values=st.lists(st.floats(), min_size=1, max_size=5))
def test_numbers_come_back_to_the_last_bit(tmp_path_factory: Any, values: Any) -> None:
    recorder = Recorder(tmp_path_factory.mktemp("run"), Point())
    recorder.append("rows", {"x": np.array(values)})
    found = read(recorder.path).frames["rows"]["x"].to_numpy()
    np.testing.assert_array_equal(found, np.array(values))


def test_columns_must_be_equally_long(recorder: Recorder) -> None:
    recorder.append("f", {"a": np.arange(2)})
    with pytest.raises(ValueError):
        recorder.append("f", {"a": np.arange(2), "b": np.arange(3)})
    assert len(read(recorder.path).frames["f"]) == 2
    recorder.append("f", {})
    recorder.append("f", {"a": np.arange(0)})
    recorder.append("g", {"a": np.arange(0)})
    assert len(read(recorder.path).frames["f"]) == 2 and [*read(recorder.path).frames] == ["f"]


def steps(run: Any, name: str = "rows") -> list[int]:
    return run.frames[name]["step"].to_list()


def half(recorder: Recorder, text: bytes = b'["rows", {"step": 12, "lo') -> None:
    with (recorder.path / "rows.jsonl").open("ab") as file:
        file.write(text)


def test_half_a_row_is_dropped(recorder: Recorder) -> None:
    recorder.append("rows", COLUMNS)
    for cut in (b"[", b'["rows", {"step": 12, "loss": 3', b'["rows", {"step": 12}]'):  # no newline
        half(recorder, cut)
        tiny.assert_frame(read(recorder.path).frames["rows"], pl.DataFrame(COLUMNS))
        again = Recorder(recorder.path, Point())
        again.append("rows", {name: value[:0] for name, value in COLUMNS.items()})
        tiny.assert_frame(read(recorder.path).frames["rows"], pl.DataFrame(COLUMNS))
        again.append("test", {"step": np.array([3])})
        assert steps(read(recorder.path), "test")[-1] == 3


def test_a_process_that_follows_a_killed_one_may_append(recorder: Recorder) -> None:
    recorder.append("rows", {"step": np.array([1, 2])})
    half(recorder)
    with (recorder.path / "sums.jsonl").open("ab") as file:
        file.write(b"[[1")
    Recorder(recorder.path, Point()).append("rows", {"step": np.array([3])})
    assert steps(read(recorder.path)) == [1, 2, 3]


def test_rewind(recorder: Recorder) -> None:
    assert recorder.rewind(None) == {}
    recorder.append("rows", {"step": np.array([1, 2])})
    recorder.append("test", {"step": np.array([2])})
    recorder.measured(*score(2))
    position = json.loads(json.dumps(recorder.position()))
    recorder.append("rows", {"step": np.array([3])})
    recorder.measured(*score(3))
    half(recorder)
    rows = Recorder(recorder.path, Point()).rewind(position)
    assert rows == {"rows": [{"step": 1}, {"step": 2}], "test": [{"step": 2}]}
    assert [piece[2] for piece in recorder.pieces()] == [2]  # arrays of later steps go, too
    again = Recorder(recorder.path, Point())
    again.append("rows", {"step": np.array([7])})
    assert steps(read(recorder.path)) == [1, 2, 7]
    assert again.rewind(again.position())["rows"] == [{"step": 1}, {"step": 2}, {"step": 7}]
    assert again.rewind(None) == {} and again.pieces() == []
    assert again.position() == {"rows": 0, "sums": 0, "crc": 0}


def test_lost_rows_are_an_error(recorder: Recorder) -> None:
    with pytest.raises(RecordError, match="rows.jsonl has 0 bytes.*made with 5"):
        recorder.rewind({"rows": 5, "sums": 0, "crc": 0})
    recorder.append("rows", {"step": np.array([1, 2])})
    recorder.measured(*score(2))
    position = recorder.position()
    for file, size in (("rows.jsonl", position["rows"]), ("sums.jsonl", position["sums"])):
        content = (recorder.path / file).read_bytes()
        os.truncate(recorder.path / file, size - 1)
        said = f"{file} has {size - 1} bytes.*made with {size}"
        with pytest.raises(RecordError, match=said):
            recorder.rewind(position)
        (recorder.path / file).write_bytes(content)
    lines = (recorder.path / "sums.jsonl").read_bytes().splitlines(keepends=True)
    (recorder.path / "sums.jsonl").write_bytes(b"".join(lines[:-1]))  # what vouches for the array
    with pytest.raises(RecordError, match="sums.jsonl has .* bytes.*made with"):
        Recorder(recorder.path, Point()).rewind(position)
    (recorder.path / "sums.jsonl").write_bytes(b"".join(lines[::-1]))
    with pytest.raises(RecordError, match="sums.jsonl was changed after it was written"):
        Recorder(recorder.path, Point()).rewind(position)


def test_arrays_come_back(recorder: Recorder) -> None:
    for name, value in FINDINGS.arrays.items():
        recorder.measured("a", name, 3, value)
        recorder.measured("a.b", name, 3, value)  # "a" and "b.one" are not "a.b" and "one"
        recorder.measured("a", f"b.{name}", 3, value)
        for probe, metric in (("a", name), ("a.b", name), ("a", f"b.{name}")):
            found = {piece[:3]: piece[3] for piece in recorder.pieces()}[probe, metric, 3]
            tiny.assert_array(found, value)
    recorder.measured(*score(20, 0.5))
    recorder.measured(*score(3))
    recorder.measured(*score(20))  # again
    found = read(recorder.path).arrays["el2n.score"]
    expected = Array(
        np.array([[3.0] * 3, [20.0] * 3]), ("step", "member"), {"step": np.array([3, 20])}
    )
    tiny.assert_array(found, expected)


@pytest.mark.parametrize("name", ["", ".", "..", ".a", "a/b", "a,b", "a b", "a\\b", "a\n"])
def test_names_that_no_file_should_have(recorder: Recorder, name: str) -> None:
    array = Array(np.zeros(1), ("member",))
    for call in (
        lambda: recorder.measured(name, "x", 0, array),
        lambda: recorder.measured("x", name, 0, array),
        lambda: recorder.finish(Findings({name: FRAME})),
        lambda: recorder.finish(Findings({}, {name: array})),
        lambda: recorder.stage(name),
    ):
        with pytest.raises(ValueError, match="must be named by letters, digits and _ . @"):
            call()
    assert not read(recorder.path).done


def test_an_array_has_a_name_for_each_axis() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 3\) has dims \('member',\)"):
        record.files.packed(Array(np.zeros((2, 3)), ("member",)))


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
    recorder.append("a", COLUMNS)
    recorder.append("b", COLUMNS)
    for step in (2, 3, 2):
        recorder.measured(*score(step))
    if finished:
        recorder.finish(FINDINGS._replace(frames={"a": FRAME, "c": FRAME[::-1]}))
    whole, refused = read(recorder.path), 0
    for file in [p for p in recorder.path.rglob("*") if p.is_file()]:
        for _ in flip_each_byte(file):
            try:
                found = read(recorder.path)
            except RecordError as error:
                assert str(recorder.path) in str(error)
                refused += 1
                continue
            assert found.done == finished or file.name == "done.json"
            assert found.config == whole.config and found.provenance["data"] == "d1"
            if file.name == "sums.jsonl" and file.stat().st_size < 200:
                assert set(found.frames) <= set(
                    whole.frames
                )  # the first rows of a run that goes on
                continue
            assert_findings(found, whole)
    assert refused > 100
    pair = ("frames/a.parquet", "frames/c.parquet")
    pair = pair if finished else ("arrays/el2n,score,2.npz", "arrays/el2n,score,3.npz")
    one, other = (recorder.path / name for name in pair)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    with pytest.raises(RecordError, match=f"{one.name} was changed after it was written"):
        read(recorder.path)
    one.write_bytes(content)
    assert_findings(read(recorder.path), whole)


def test_damaged_rows_are_not_continued(recorder: Recorder) -> None:
    recorder.append("rows", {"step": np.array([11, 12])})
    recorder.measured(*score(2))
    position = recorder.position()
    recorder.append("rows", {"step": np.array([13])})
    rows = (recorder.path / "rows.jsonl").read_bytes()
    (recorder.path / "rows.jsonl").write_bytes(rows.replace(b"13", b"14"))
    expected = {"rows": [{"step": 11}, {"step": 12}]}
    assert recorder.rewind(position) == expected  # it was to go in any case
    (recorder.path / "rows.jsonl").write_bytes(rows[: position["rows"]].replace(b"12", b"13"))
    with pytest.raises(RecordError, match="rows.jsonl was changed after it was written: restore"):
        Recorder(recorder.path, Point()).rewind(position)
    (recorder.path / "arrays" / "el2n,score,2.npz").unlink()
    with pytest.raises(RecordError, match="has lost its arrays/el2n,score,2.npz: restore"):
        recorder.pieces()


def test_a_mark_of_which_a_name_was_changed_into_another(recorder: Recorder) -> None:
    """Then one of two frames is named twice, and the other not at all: in one flipped bit."""
    recorder.finish(Findings({"b": FRAME, "c": FRAME[:1]}))
    done = recorder.path / "done.json"
    done.write_bytes(done.read_bytes().replace(b'"b"', b'"c"'))
    with pytest.raises(RecordError, match="done.json was changed after it was written"):
        read(recorder.path)


def test_sums_of_which_a_name_was_changed_into_another(recorder: Recorder) -> None:
    recorder.measured(*score(2))
    recorder.measured(*score(3))
    sums = recorder.path / "sums.jsonl"
    sums.write_bytes(sums.read_bytes().replace(b"score,2", b"score,3"))
    with pytest.raises(RecordError, match="sums.jsonl was changed after it was written"):
        read(recorder.path)


def test_another_format_is_refused_in_one_sentence(recorder: Recorder) -> None:
    made = json.loads((recorder.path / "provenance.json").read_text())
    for then in (1, FORMAT + 1):
        old = {n: v for n, v in made.items() if n != "format"} | (
            {"format": then} if then > 1 else {}
        )
        (recorder.path / "provenance.json").write_text(json.dumps(old))
        for call in (lambda: read(recorder.path), lambda: Recorder(recorder.path, Point())):
            said = f"has format {then}, this version reads format {FORMAT}: compute it again"
            with pytest.raises(RecordError, match=said):
                call()


def test_a_result_without_its_mark_is_not_computed_again(recorder: Recorder) -> None:
    recorder.finish(FINDINGS)
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
    recorder.measured("a", "b", 0, Array(np.arange(3), ("member",)))
    np.testing.assert_array_equal(recorder.pieces()[0][3].values, np.arange(3))


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
    recorder.measured(*score(7))
    again = Recorder(recorder.path, Point())
    assert not list(recorder.path.rglob("*.tmp")) and [p[2] for p in again.pieces()] == [7]


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


@pytest.mark.parametrize("after", range(len(FINDINGS.arrays) + len(FINDINGS.frames) + 1))
def test_killed_while_it_finishes(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Until it is done the live rows count, and finishing again finishes."""
    recorder.append("rows", {"step": np.array([1])})
    with monkeypatch.context() as patch:
        killing(patch, after)
        with pytest.raises(Killed):
            recorder.finish(FINDINGS)
    again = Recorder(recorder.path, Point())
    again.append("rows", {"step": np.array([2])})
    run = read(recorder.path)
    assert not run.done and steps(run) == [1, 2] and run.arrays == {}
    again.finish(FINDINGS)
    assert read(recorder.path).done
    assert_findings(read(recorder.path), FINDINGS)


def test_finishing(recorder: Recorder) -> None:
    recorder.append("rows", {"step": np.array([1])})
    recorder.measured(*score(1))
    recorder.finish(FINDINGS)
    run = read(recorder.path)
    assert run.done and not (recorder.path / "rows.jsonl").exists()
    assert_findings(run, FINDINGS)
    files = {f"{name}.npz" for name in FINDINGS.arrays}
    assert {path.name for path in (recorder.path / "arrays").iterdir()} == files


def test_killed_after_it_is_done(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tidied up last does not belong to the result."""
    recorder.append("rows", {"step": np.array([1])})
    recorder.measured(*score(1))

    def unlink(*args: Any, **kwargs: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(Killed):
            recorder.finish(FINDINGS)
    run = read(recorder.path)
    if run.done:
        assert_findings(run, FINDINGS)


def test_an_empty_table(recorder: Recorder) -> None:
    recorder.finish(Findings({}))
    run = read(recorder.path)
    assert run.done and run.frames == {} and run.arrays == {}


# ---- points that are computed once --------------------------------------------------------------

POINTS = tuple(Point(rate=r, seed=s) for r in (0.5, 1.0) for s in (0, 1))
ABOUT = {"data": "d1"}


def findings(point: Point) -> Findings:
    rows = {
        "x": np.array([point.rate, np.nan]),
        "kept": np.array([point.seed, 2], np.int32),
        "method": np.array(["a", "b"]),
    }
    weights = Array(np.full((2, 2), point.rate, np.float32), ("member", "x"))
    ends = Array(np.arange(3), ("step",), {"step": np.array([1, 2, 3])})
    return Findings({"ends": pl.DataFrame(rows)}, {"w": weights, "a.b@3": ends}, {"last": point})


class Compute:
    """Remembers what it was asked."""

    def __init__(self, fail: bool = False):
        self.asked: list[Any] = []
        self.recorders: list[Any] = []
        self.fail = fail

    def __call__(self, points: Any, recorder: Any) -> list[Findings]:
        self.asked.append(tuple(points))
        self.recorders.append(recorder)
        if recorder is not None:
            recorder.append("rows", {"step": np.array([1])})
            recorder.measured(*score(1))
        if self.fail:
            raise Killed
        return [findings(p) for p in points]


def test_with_and_without_a_folder_the_findings_are_equal(tmp_path: Path) -> None:
    plain, stored = Compute(), Compute()
    without = completed(None, POINTS, plain, ABOUT)
    within = completed(tmp_path, POINTS, stored, ABOUT)
    again = completed(str(tmp_path), POINTS, Compute(fail=True), ABOUT)
    assert plain.asked == stored.asked == [POINTS] and plain.recorders == [None]
    for a, b, c in zip(without, within, again, strict=True):
        for found in (b, c):
            assert_findings(found, a)


def test_missing_points_are_computed_together_and_finished_ones_are_not(tmp_path: Path) -> None:
    compute = Compute()
    completed(tmp_path, POINTS[2:3], compute, ABOUT)
    found = completed(tmp_path, POINTS, compute, ABOUT)
    assert compute.asked == [POINTS[2:3], POINTS[:2] + POINTS[3:]]
    for a, point in zip(found, POINTS, strict=True):
        assert_findings(a, findings(point))
    homes = {fingerprint(point) for point in POINTS}
    assert {path.name for path in tmp_path.iterdir()} == homes  # the group's directory is gone
    assert all(read(tmp_path / home).done for home in homes)
    assert compute.recorders[0].path == tmp_path / fingerprint(POINTS[2])  # its own
    assert compute.recorders[1].path.name not in homes
    assert (
        completed(tmp_path, POINTS[::-1], compute, ABOUT)[0].frames["ends"]["x"][0]
        == POINTS[-1].rate
    )
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

    def once(self: Recorder, found: Findings) -> None:
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
        assert_findings(a, findings(point))


def test_weights_are_stored_before_a_point_is_done(tmp_path: Path) -> None:
    """Of each point its own; killed in between, they are stored again."""
    kept = []

    def keep(home: Path, found: Findings) -> None:
        assert not (home / "done.json").exists() and not read(home).done
        kept.append((home.name, found.weights["last"]))
        if len(kept) == 2:
            raise Killed

    with pytest.raises(Killed):
        completed(tmp_path, POINTS, Compute(), ABOUT, keep)
    completed(tmp_path, POINTS, Compute(), ABOUT, keep)
    homes = [(fingerprint(point), point) for point in POINTS]
    assert kept == [*homes[:2], *homes[1:]]


@pytest.mark.parametrize("points", [POINTS, POINTS[:1]], ids=["group", "alone"])
def test_a_point_that_lost_its_mark_is_refused_before_anything_is_computed(
    tmp_path: Path, points: Any
) -> None:
    completed(tmp_path, points, Compute(), ABOUT)
    (tmp_path / fingerprint(points[-1]) / "done.json").unlink()
    with pytest.raises(RecordError, match="was finished and has lost its done.json: restore"):
        completed(tmp_path, points, compute := Compute(fail=True), ABOUT)
    assert not compute.asked


def test_stages_go_when_the_run_is_finished(recorder: Recorder) -> None:
    stage = recorder.stage("one")
    stage.append("rows", {"step": np.array([1])})
    assert steps(read(stage.path)) == [1] and read(recorder.path).frames == {}
    assert Recorder(recorder.path, Point()).stage("one").rewind(None) == {}
    recorder.finish(FINDINGS)
    assert not (recorder.path / "stages").exists()
    assert_findings(read(recorder.path), FINDINGS)


# ---- many runs ----------------------------------------------------------------------------------


def test_runs_are_the_finished_ones_the_newest_last(tmp_path: Path) -> None:
    names = ["c", "a", "b"]
    for age, name in enumerate(names):
        Recorder(tmp_path / "study" / name, Point()).finish(FINDINGS)
        os.utime(tmp_path / "study" / name / "done.json", ns=(0, 10**9 * (age + 1)))
    Recorder(tmp_path / "study" / "going on", Point())
    Recorder(tmp_path / "other" / "d", Point()).finish(FINDINGS)
    assert [path.name for path in runs(tmp_path, "study")] == names
    assert runs(tmp_path, "nothing") == [] and runs(tmp_path / "nowhere", "study") == []


def test_read_all_puts_the_config_beside_the_rows(tmp_path: Path) -> None:
    made = [Point(), Point(rate=2.0, limit=0.5, net=Net(width=7, cuts=()))]
    for i, point in enumerate(made):
        rows = {"x": np.arange(2.0) + i} | ({"y": np.array(["a", "b"])} if i else {})
        Recorder(tmp_path / str(i), point).finish(Findings({"xs": pl.DataFrame(rows)}))
    going = Recorder(tmp_path / "2", Point(seed=5))
    going.append("xs", {"x": np.array([9.0])})
    found = read_all([tmp_path / str(i) for i in range(3)], "xs")
    assert found["x"].to_list() == [0, 1, 1, 2, 9]
    assert found["y"].to_list() == [None, None, "a", "b", None]
    assert found["run"].to_list() == ["0", "0", "1", "1", "2"]
    assert found["config.rate"].to_list() == [0.5, 0.5, 2, 2, 0.5]
    assert found["config.seed"].to_list() == [0, 0, 0, 0, 5]
    assert found["config.limit"].to_list() == [None, None, 0.5, 0.5, None]
    assert found["config.net.width"].to_list() == [3, 3, 7, 7, 3]
    assert found["config.net.kind"].to_list() == ["Net"] * 5
    assert found["config.net.cuts"].to_list()[1:3] == [[0.5, 0.25], []]
    assert len(read_all([], "xs")) == 0
    with pytest.raises(ValueError, match=r"0 has no frame 'ys', it has \['xs'\]"):
        read_all([tmp_path / "0"], "ys")


def test_a_directory_is_read_without_jax(recorder: Recorder) -> None:
    recorder.finish(FINDINGS)
    code = f"""
import sys
from dynamics import record
run = record.read({str(recorder.path)!r})
assert run.done and len(run.frames["test"]) == 3 and run.arrays["one"].values == 3.5
assert not any(name == "jax" or name.startswith("jax.") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_git_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    found = record.provenance({"data": "x"})
    assert found["git"] is None and found["dirty"] is None and found["data"] == "x"
    json.dumps(found)


@pytest.mark.parametrize(
    ("config", "about", "entry"),
    [
        ({"rates": [1.0, {2.0}]}, None, "dict['rates'][1] must be"),
        ({"folder": Path("data")}, None, "dict['folder'] must be"),
        ({"rate": float("inf")}, None, "dict['rate'] must be a finite number"),
        ({"rate": 0.1}, {"made": object()}, "about['made'] must be"),
    ],
)
def test_what_json_cannot_hold_is_named_before_a_folder_is_made(tmp_path, config, about, entry):
    with pytest.raises(ValueError, match=re.escape(entry)):
        Recorder(tmp_path / "run", config, about)
    assert not (tmp_path / "run").exists()


def test_numpy_numbers_are_stored_as_numbers(tmp_path):
    config = {"rate": np.float32(0.5), "sizes": (np.int64(3), np.array(4)), "on": np.bool_(True)}
    recorder = Recorder(tmp_path / "run", config, {"seconds": np.float64(0.25)})
    recorder.finish(Findings({}))
    run = read(tmp_path / "run")
    assert run.config == {"rate": 0.5, "sizes": [3, 4], "on": True}
    assert run.provenance["seconds"] == 0.25
