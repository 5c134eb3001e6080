"""Damage: found before it is used, survived where an older checkpoint is intact, never ignored."""

import contextlib
import json
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamics import mesh
from dynamics.checkpoint import PENDING, CheckpointError, Checkpoints


def tree(step: int) -> Any:
    """Random float32 (which compresses badly, so nothing but a checksum sees a flipped bit)."""
    here = mesh.over_replicas(mesh.make(2))
    weights = np.random.default_rng(step).normal(size=(2, 1000)).astype(np.float32)
    return {
        "weights": jax.device_put(weights, here),
        "half": jax.device_put(np.ones((2, 3), jnp.bfloat16) * step, here),
        "key": jax.device_put(jax.random.split(jax.random.key(step), 2), here),
        "nested": (jax.device_put(np.full(2, step, np.int32), here), [None]),
        "a.b": jax.device_put(np.full(2, step + 1, np.int32), here),
        "a": {"b": jax.device_put(np.full(2, step + 2, np.int32), here), "c/d": {}},
    }


def restored(folder: Path, like: Any = None) -> Any:
    """The item of the newest checkpoint and the note."""
    found = Checkpoints(folder).restore({"state": tree(0) if like is None else like})
    return None if found is None else (found[0]["state"], found[1])


def items(step: int) -> dict[str, Any]:
    """A state, and probes that remember nothing."""
    return {"state": tree(step), "probes": {"test": ()}}


def assert_step(found: Any, step: int) -> None:
    got, note = found
    assert note == {"rows": step}
    assert jax.tree.structure(got) == jax.tree.structure(tree(step))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(tree(step)), strict=True):
        assert x.dtype == y.dtype
        raw = jax.random.key_data if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray
        np.testing.assert_array_equal(raw(x), raw(y))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any) -> Path:
    """Checkpoints of the steps 0, 5 and 10."""
    folder = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(folder)
    for step in (0, 5, 10):
        checkpoints.save(step, items(step), {"rows": step})
    checkpoints.close()
    return folder


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def data_file(step: Path) -> Path:
    """The file that holds the weights."""
    return max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_bit(step: Path) -> None:
    file = data_file(step)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(step: Path) -> None:
    file = data_file(step)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty_metadata(step: Path) -> None:
    (step / "state" / "_METADATA").write_bytes(b"")


def delete_data(step: Path) -> None:
    data_file(step).unlink()


def delete_item(step: Path) -> None:
    shutil.rmtree(step / "state")


def delete_note(step: Path) -> None:
    shutil.rmtree(step / "note")


def a_file(step: Path) -> None:
    shutil.rmtree(step)
    step.touch()


def empty_directory(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


def garbled_checksum(step: Path) -> None:
    (step.parent.parent / "checksums" / f"{step.name}.json").write_text('{"state/')


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped bit": (flip_a_bit, "was changed after it was written"),
    "truncated": (truncate, "was changed after it was written"),
    "emptied metadata": (empty_metadata, "_METADATA was changed after it was written"),
    "deleted": (delete_data, "is missing"),
    "item missing": (delete_item, "is missing"),
    "note missing": (delete_note, "is missing"),
    "empty directory": (empty_directory, "its directory is empty"),
    "a file": (a_file, "it is no directory"),
    "garbled checksum": (garbled_checksum, "checksum file 10.json is unreadable"),
}


def test_restores_the_newest_bit_for_bit(run: Path) -> None:
    assert_step(restored(run), 10)


def test_restores_onto_another_mesh(run: Path) -> None:
    where = mesh.everywhere(mesh.make(1))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree(0))
    found = restored(run, like)
    assert_step(found, 10)
    assert all(x.sharding.is_equivalent_to(where, x.ndim) for x in jax.tree.leaves(found[0]))


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_survived_and_named(run: Path, kind: str, caplog: Any) -> None:
    damage, message = DAMAGE[kind]
    damage(run / "checkpoints" / "10")
    with caplog.at_level(logging.WARNING, "dynamics"):
        assert_step(restored(run), 5)
    assert len(caplog.records) == 1
    assert "checkpoint 10 is damaged" in caplog.text and message in caplog.text
    assert not (run / "checkpoints" / "10").exists() and (run / "damaged" / "10.0").exists()


def test_a_directory_named_like_a_later_step_is_set_aside(run: Path, caplog: Any) -> None:
    (run / "checkpoints" / "20").mkdir()
    with caplog.at_level(logging.WARNING, "dynamics"):
        assert_step(restored(run), 10)
    assert "checkpoint 20 is damaged (its directory is empty)" in caplog.text


@pytest.mark.parametrize("name", ["0100", "00", "010"])
def test_a_directory_with_a_number_that_is_no_step_is_set_aside(
    run: Path, caplog: Any, name: str
) -> None:
    """orbax would take it for a checkpoint, and keep that in place of a good one."""
    shutil.copytree(run / "checkpoints" / "5", run / "checkpoints" / name)
    with caplog.at_level(logging.WARNING, "dynamics"):
        checkpoints = Checkpoints(run)
    assert f"checkpoint {name} is damaged (its name is no step)" in caplog.text
    assert_step(restored(run), 10)
    assert checkpoints.steps() == [0, 5, 10] and (run / "damaged" / f"{name}.0").is_dir()
    for step in (11, 12):
        checkpoints.save(step, items(step), {"rows": step})
    checkpoints.close()
    assert Checkpoints(run).steps() == [10, 11, 12]


@pytest.mark.parametrize("item", ["state", "note", "everything"])
def test_half_made_and_without_a_checksum_it_is_set_aside(
    run: Path, caplog: Any, item: str
) -> None:
    """What a copy that was cut off leaves, the only one that is there."""
    for step in ("0", "5"):
        shutil.rmtree(run / "checkpoints" / step)
    (run / "checksums" / "10.json").unlink()
    parts = [run / "checkpoints" / "10" / item]
    for part in parts if item != "everything" else list(parts[0].parent.iterdir()):
        shutil.rmtree(part) if part.is_dir() else part.unlink()
    (run / "checkpoints" / "10" / "left").touch()
    with caplog.at_level(logging.WARNING, "dynamics"):
        with pytest.raises(CheckpointError, match=r"none of the checkpoints .*10\] .* is intact"):
            restored(run)
    assert (run / "damaged" / "10.0").is_dir() and "checkpoint 10 is damaged" in caplog.text


@pytest.mark.parametrize("item", ["state", "note"])
def test_asked_for_by_step_a_half_made_one_is_one_error(run: Path, item: str) -> None:
    (run / "checksums" / "10.json").unlink()
    shutil.rmtree(run / "checkpoints" / "10" / item)
    with pytest.raises(CheckpointError, match="^checkpoint 10 in .* is damaged: "):
        Checkpoints(run).restore({"state": tree(0)}, 10)
    assert (run / "checkpoints" / "10").is_dir()


@pytest.mark.parametrize("content", ["{}", "[]"])
def test_checksums_of_nothing_vouch_for_nothing(run: Path, content: str, caplog: Any) -> None:
    (run / "checksums" / "10.json").write_text(content)
    with caplog.at_level(logging.WARNING, "dynamics"):
        assert_step(restored(run), 5)
    assert "checkpoint 10 is damaged (its checksum file 10.json names no files)" in caplog.text


@pytest.mark.parametrize("kind", DAMAGE)
def test_all_damaged_is_one_error_and_no_fresh_start(run: Path, kind: str) -> None:
    for step in (run / "checkpoints").iterdir():
        DAMAGE[kind][0](step)
    for _ in range(2):  # the second attempt finds only damaged/, and must not start afresh either
        with pytest.raises(CheckpointError, match="none of the checkpoints .* is intact"):
            restored(run)


def test_step_0_is_a_step_like_any_other(run: Path) -> None:
    for step in ("5", "10"):
        shutil.rmtree(run / "checkpoints" / step)
    assert_step(restored(run), 0)


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert restored(tmp_path) is None
    assert Checkpoints(tmp_path).raw("state") is None


def test_saving_goes_on_after_damage(run: Path) -> None:
    flip_a_bit(run / "checkpoints" / "10")
    checkpoints = Checkpoints(run)
    checkpoints.restore({"state": tree(0)})
    checkpoints.save(10, items(10), {"rows": 10})
    checkpoints.save(15, items(15), {"rows": 15})
    checkpoints.close()
    assert Checkpoints(run).steps() == [5, 10, 15]
    assert_step(restored(run), 15)


def test_without_its_hash_a_checkpoint_gives_way_to_an_older_one(run: Path, caplog: Any) -> None:
    (run / "checksums" / "10.json").unlink()
    with caplog.at_level(logging.WARNING, "dynamics"):
        assert_step(restored(run), 5)
    assert "checkpoint 10 is damaged (it has no checksum)" in caplog.text


def test_killed_between_the_first_commit_and_its_hash(run: Path, caplog: Any) -> None:
    (run / "checksums" / "10.json").unlink()
    for step in ("0", "5"):
        shutil.rmtree(run / "checkpoints" / step)
    with caplog.at_level(logging.WARNING, "dynamics"):
        assert_step(restored(run), 10)
    assert "checkpoint 10 has no checksum, its content is not verified" in caplog.text


def test_killed_before_its_hash_it_was_never_committed(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What happened to its files in between is unknown: it is not trusted, even as the only one."""
    for folder in (run, run.with_name("first")):
        checkpoints = Checkpoints(folder)
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "_seal", lambda self, step: None)
            checkpoints.save(15, items(15), {"rows": 15})
            checkpoints.close()
        assert 15 in checkpoints.steps()
        flip_a_bit(folder / "checkpoints" / "15")
    assert_step(restored(run), 10)
    assert restored(run.with_name("first")) is None


def test_checkpoints_that_are_gone_are_no_fresh_start(run: Path) -> None:
    for step in (run / "checkpoints").iterdir():
        shutil.rmtree(step)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"none of the checkpoints \[0, 5, 10\] in"):
            restored(run)


def test_what_a_killed_save_leaves_is_removed(run: Path) -> None:
    left = run / "checkpoints" / "15.orbax-checkpoint-tmp"
    (left / "state").mkdir(parents=True)
    assert_step(restored(run), 10)
    assert not left.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"weights": t["weights"][:, :10]}, r"weights is float32\[2, 1000\] there"),
        (lambda t: t | {"weights": t["weights"].astype(jnp.float16)}, r"float16\[2, 1000\] here"),
        (lambda t: t | {"more": t["weights"]}, r"more is absent there"),
        (lambda t: {k: v for k, v in t.items() if k != "half"}, r"half is .* and absent here"),
        (
            lambda t: t | {"key": jax.random.split(jax.random.key(0, impl="rbg"), 2)},
            r"state.key is key<fry>\[2\] there and key<rbg>\[2\] here",
        ),
    ],
)
def test_another_shape_type_or_name_is_an_error(run: Path, change: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        restored(run, change(tree(0)))
    assert not (run / "damaged").exists()


@pytest.mark.parametrize("where", ["checkpoints", "checksums"])
def test_what_can_not_be_written_is_one_error(tmp_path: Path, where: str) -> None:
    """Said once: ending the background work after it neither says it again nor hangs."""
    before = set(threading.enumerate())
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, {"all": {"x": jnp.ones(3)}}, None)
    checkpoints.wait()
    shutil.rmtree(tmp_path / where)
    (tmp_path / where).write_bytes(b"")  # no directory can be made there, nor a file in it
    with pytest.raises(CheckpointError, match=f"checkpoint 5 can't be .*{tmp_path}.*start again"):
        checkpoints.save(5, {"all": {"x": jnp.ones(3)}}, None)
        checkpoints.wait()
    checkpoints.close()
    left = [t for t in threading.enumerate() if not t.daemon and t not in before]
    assert not left  # one more would be waited for at the exit


def test_the_saved_bits_are_those_of_the_moment(tmp_path: Path) -> None:
    """Saving is asynchronous and the state is donated to the next step at once."""
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    checkpoints = Checkpoints(tmp_path, keep=10)
    x = jnp.zeros(300_000)
    for i in range(5):
        checkpoints.save(i, {"all": {"x": x}}, None)
        for _ in range(3):
            x = step(x)
    checkpoints.close()
    for i in reversed(range(5)):
        found, _ = Checkpoints(tmp_path).restore({"all": {"x": x}})  # pyright: ignore
        np.testing.assert_array_equal(found["all"]["x"], np.full(300_000, 3.0 * i))
        shutil.rmtree(tmp_path / "checkpoints" / str(i))


def test_old_checkpoints_and_their_hashes_go_together(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for i in range(4):
        checkpoints.save(i, {"all": {"x": jnp.ones(3)}}, None)
    checkpoints.close()
    assert Checkpoints(tmp_path).steps() == [2, 3]
    assert sorted(p.name for p in (tmp_path / "checksums").iterdir()) == ["2.json", "3.json"]
    sums = json.loads((tmp_path / "checksums" / "3.json").read_text())
    assert all(len(digest) == 128 for digest in sums.values())


def test_step_0_is_a_step(tmp_path: Path) -> None:
    """The restore bug behind "GraNd at initialisation": step 0 must not mean the newest."""
    like = {"all": {"w": jnp.zeros(3)}}
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        for step in (0, 5, 9):
            checkpoints.save(step, {"all": {"w": jnp.full(3, float(step))}}, step)
        checkpoints.wait()
        for step, expected in ((0, 0.0), (5, 5.0), (None, 9.0)):
            found, note = checkpoints.restore(like, step) or ({}, None)
            np.testing.assert_array_equal(found["all"]["w"], np.full(3, expected))
            assert note == int(expected)
        with pytest.raises(CheckpointError, match=r"no checkpoint 3, it has \[0, 5, 9\]"):
            checkpoints.restore(like, 3)


# ---- items, and trees as they were --------------------------------------------------------------


class Inside(NamedTuple):
    """A container of nobody's."""

    one: Any
    two: Any


def test_an_item_comes_alone_and_one_without_leaves_comes_back(run: Path) -> None:
    checkpoints = Checkpoints(run)
    found, note = checkpoints.restore({"probes": {"test": ()}}) or ({}, None)
    assert found == {"probes": {"test": ()}} and note == {"rows": 10}
    assert checkpoints.raw("probes") == {"test": ()}
    with pytest.raises(CheckpointError, match="checkpoint 10 in .* has no 'weights'"):
        checkpoints.raw("weights")
    with pytest.raises(CheckpointError, match=r"state.a.b is int32\[2\] there and absent here"):
        checkpoints.restore({"state": {}})
    with pytest.raises(CheckpointError, match="weights.x is absent there"):
        checkpoints.restore({"weights": {"x": jnp.zeros(1)}})


def test_raw_is_the_tree_that_was_saved(run: Path) -> None:
    checkpoints = Checkpoints(run)
    for step, found in ((10, checkpoints.raw("state")), (5, checkpoints.raw("state", 5))):
        assert_step((found, {"rows": step}), step)
        assert all(len(x.devices()) == 1 for x in jax.tree.leaves(found))


def test_raw_builds_every_kind_of_container(tmp_path: Path) -> None:
    number = iter(range(100))
    x = lambda: jnp.full(2, next(number), jnp.int32)  # noqa: E731
    saved = {
        "tuples": (x(), (x(),), ()),
        "lists": [x(), [], {"in": [x()]}],
        "ints": {0: x(), 10: x(), 9: x()},
        "none": None,
        "named": Inside(x(), {"k.l": x(), "k": {"l": x()}, "": x(), "%": x(), "m/n": x()}),
        "keys": jax.random.split(jax.random.key(3, impl="rbg"), 2),
    }
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(3, {"all": saved, "bare": x()})
        checkpoints.wait()
        found, bare = checkpoints.raw("all"), checkpoints.raw("bare")
        again, _ = checkpoints.restore({"all": saved}) or ({}, None)
    np.testing.assert_array_equal(bare, np.full(2, next(number) - 1))
    assert str(jax.random.key_impl(found["keys"])) == "rbg"
    wanted = saved | {"named": saved["named"]._asdict()}
    for got, expected in ((found, wanted), (again["all"], saved)):
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            plain = jax.random.key_data if a.dtype == saved["keys"].dtype else np.asarray
            np.testing.assert_array_equal(plain(a), plain(b))


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_reader_changes_nothing(run: Path, kind: str, caplog: Any) -> None:
    """It falls back as a run does, in a folder that another process may be writing."""
    (run / "checkpoints" / "15.orbax-checkpoint-tmp").mkdir()
    (run / "checksums" / "15.json").write_text(PENDING)
    DAMAGE[kind][0](run / "checkpoints" / "10")
    before = sorted(p.relative_to(run) for p in run.rglob("*"))
    with caplog.at_level(logging.WARNING, "dynamics"):
        assert_step((Checkpoints(run, read_only=True).raw("state"), {"rows": 5}), 5)
    assert DAMAGE[kind][1] in caplog.text
    assert sorted(p.relative_to(run) for p in run.rglob("*")) == before


def test_a_reader_takes_none_that_is_not_whole_yet(run: Path) -> None:
    (run / "checksums" / "10.json").write_text(PENDING)
    found = Checkpoints(run, read_only=True)
    assert_step((found.raw("state"), {"rows": 5}), 5)
    with pytest.raises(
        CheckpointError, match="checkpoint 10 in .* is damaged: it is not whole yet"
    ):
        found.raw("state", 10)
    assert Checkpoints(run.with_name("nothing"), read_only=True).raw("state") is None
