"""Damage: found before it is used, survived where an older checkpoint is intact, never ignored."""

import contextlib
import json
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamics import mesh
from dynamics.checkpoint import CheckpointError, Checkpoints


def tree(step: int) -> Any:
    """Random float32 (which compresses badly, so nothing but a checksum sees a flipped bit)."""
    here = mesh.over_replicas(mesh.make(2))
    weights = np.random.default_rng(step).normal(size=(2, 1000)).astype(np.float32)
    return {
        "weights": jax.device_put(weights, here),
        "half": jax.device_put(np.ones((2, 3), jnp.bfloat16) * step, here),
        "key": jax.device_put(jax.random.split(jax.random.key(step), 2), here),
        "state": (jax.device_put(np.full(2, step, np.int32), here), [None]),
    }


def assert_step(found: Any, step: int) -> None:
    got, note = found
    assert note == {"rows": step}
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
        checkpoints.save(step, tree(step), {"rows": step})
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
    (step / "tree" / "_METADATA").write_bytes(b"")


def delete_data(step: Path) -> None:
    data_file(step).unlink()


def empty_directory(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


def garbled_checksum(step: Path) -> None:
    (step.parent.parent / "checksums" / f"{step.name}.json").write_text('{"tree/')


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped bit": (flip_a_bit, "was changed after it was written"),
    "truncated": (truncate, "was changed after it was written"),
    "emptied metadata": (empty_metadata, "_METADATA was changed after it was written"),
    "deleted": (delete_data, "is missing"),
    "empty directory": (empty_directory, "its directory is empty"),
    "garbled checksum": (garbled_checksum, "checksum file 10.json is unreadable"),
}


def test_restores_the_newest_bit_for_bit(run: Path) -> None:
    assert_step(Checkpoints(run).restore(tree(0)), 10)


def test_restores_onto_another_mesh(run: Path) -> None:
    where = mesh.everywhere(mesh.make(1))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree(0))
    found = Checkpoints(run).restore(like)
    assert_step(found, 10)
    assert found is not None
    assert all(x.sharding.is_equivalent_to(where, x.ndim) for x in jax.tree.leaves(found[0]))


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_survived_and_named(run: Path, kind: str, caplog: Any) -> None:
    damage, message = DAMAGE[kind]
    damage(run / "checkpoints" / "10")
    with caplog.at_level(logging.WARNING, "dynamics"):
        assert_step(Checkpoints(run).restore(tree(0)), 5)
    assert len(caplog.records) == 1
    assert "checkpoint 10 is damaged" in caplog.text and message in caplog.text
    assert not (run / "checkpoints" / "10").exists() and (run / "damaged" / "10.0").exists()


def test_a_directory_named_like_a_later_step_is_set_aside(run: Path, caplog: Any) -> None:
    (run / "checkpoints" / "20").mkdir()
    with caplog.at_level(logging.WARNING, "dynamics"):
        assert_step(Checkpoints(run).restore(tree(0)), 10)
    assert "checkpoint 20 is damaged (its directory is empty)" in caplog.text


@pytest.mark.parametrize("kind", DAMAGE)
def test_all_damaged_is_one_error_and_no_fresh_start(run: Path, kind: str) -> None:
    for step in (run / "checkpoints").iterdir():
        DAMAGE[kind][0](step)
    for _ in range(2):  # the second attempt finds only damaged/, and must not start afresh either
        with pytest.raises(CheckpointError, match="none of the checkpoints .* is intact"):
            Checkpoints(run).restore(tree(0))


def test_step_0_is_a_step_like_any_other(run: Path) -> None:
    for step in ("5", "10"):
        shutil.rmtree(run / "checkpoints" / step)
    assert_step(Checkpoints(run).restore(tree(0)), 0)


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path).restore(tree(0)) is None


def test_saving_goes_on_after_damage(run: Path) -> None:
    flip_a_bit(run / "checkpoints" / "10")
    checkpoints = Checkpoints(run)
    checkpoints.restore(tree(0))
    checkpoints.save(10, tree(10), {"rows": 10})
    checkpoints.save(15, tree(15), {"rows": 15})
    checkpoints.close()
    assert Checkpoints(run).steps() == [5, 10, 15]
    assert_step(Checkpoints(run).restore(tree(0)), 15)


def test_without_its_hash_a_checkpoint_gives_way_to_an_older_one(run: Path, caplog: Any) -> None:
    (run / "checksums" / "10.json").unlink()
    with caplog.at_level(logging.WARNING, "dynamics"):
        assert_step(Checkpoints(run).restore(tree(0)), 5)
    assert "checkpoint 10 is damaged (it has no checksum)" in caplog.text


def test_killed_between_the_first_commit_and_its_hash(run: Path, caplog: Any) -> None:
    (run / "checksums" / "10.json").unlink()
    for step in ("0", "5"):
        shutil.rmtree(run / "checkpoints" / step)
    with caplog.at_level(logging.WARNING, "dynamics"):
        assert_step(Checkpoints(run).restore(tree(0)), 10)
    assert "checkpoint 10 has no checksum, its content is not verified" in caplog.text


def test_killed_before_its_hash_it_was_never_committed(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What happened to its files in between is unknown: it is not trusted, even as the only one."""
    for folder in (run, run.with_name("first")):
        checkpoints = Checkpoints(folder)
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "_seal", lambda self, step: None)
            checkpoints.save(15, tree(15), {"rows": 15})
            checkpoints.close()
        assert 15 in checkpoints.steps()
        flip_a_bit(folder / "checkpoints" / "15")
    assert_step(Checkpoints(run).restore(tree(0)), 10)
    assert Checkpoints(run.with_name("first")).restore(tree(0)) is None


def test_checkpoints_that_are_gone_are_no_fresh_start(run: Path) -> None:
    for step in (run / "checkpoints").iterdir():
        shutil.rmtree(step)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"none of the checkpoints \[0, 5, 10\] in"):
            Checkpoints(run).restore(tree(0))


def test_what_a_killed_save_leaves_is_removed(run: Path) -> None:
    left = run / "checkpoints" / "15.orbax-checkpoint-tmp"
    (left / "tree").mkdir(parents=True)
    assert_step(Checkpoints(run).restore(tree(0)), 10)
    assert not left.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"weights": t["weights"][:, :10]}, r"weights is float32\[2, 1000\] there"),
        (lambda t: t | {"weights": t["weights"].astype(jnp.float16)}, r"float16\[2, 1000\] here"),
        (lambda t: t | {"more": t["weights"]}, r"more is absent there"),
        (lambda t: {k: v for k, v in t.items() if k != "half"}, r"half is .* and absent here"),
    ],
)
def test_another_shape_type_or_name_is_an_error(run: Path, change: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Checkpoints(run).restore(change(tree(0)))
    assert not (run / "damaged").exists()


@pytest.mark.parametrize("where", ["checkpoints", "checksums"])
def test_what_can_not_be_written_is_one_error(tmp_path: Path, where: str) -> None:
    """Said once: ending the background work after it neither says it again nor hangs."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, {"x": jnp.ones(3)}, None)
    checkpoints.wait()
    shutil.rmtree(tmp_path / where)
    (tmp_path / where).write_bytes(b"")  # no directory can be made there, nor a file in it
    with pytest.raises(CheckpointError, match=f"checkpoint 5 can't be .*{tmp_path}.*start again"):
        checkpoints.save(5, {"x": jnp.ones(3)}, None)
        checkpoints.wait()
    checkpoints.close()
    left = [thread for thread in threading.enumerate() if not thread.daemon]
    assert left == [threading.main_thread()]  # another one would be waited for at the exit


def test_the_saved_bits_are_those_of_the_moment(tmp_path: Path) -> None:
    """Saving is asynchronous and the state is donated to the next step at once."""
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    checkpoints = Checkpoints(tmp_path, keep=10)
    x = jnp.zeros(300_000)
    for i in range(5):
        checkpoints.save(i, {"x": x}, None)
        for _ in range(3):
            x = step(x)
    checkpoints.close()
    for i in reversed(range(5)):
        found, _ = Checkpoints(tmp_path).restore({"x": x})  # pyright: ignore
        np.testing.assert_array_equal(found["x"], np.full(300_000, 3.0 * i))
        shutil.rmtree(tmp_path / "checkpoints" / str(i))


def test_old_checkpoints_and_their_hashes_go_together(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for i in range(4):
        checkpoints.save(i, {"x": jnp.ones(3)}, None)
    checkpoints.close()
    assert Checkpoints(tmp_path).steps() == [2, 3]
    assert sorted(p.name for p in (tmp_path / "checksums").iterdir()) == ["2.json", "3.json"]
    sums = json.loads((tmp_path / "checksums" / "3.json").read_text())
    assert all(len(digest) == 128 for digest in sums.values())


def test_step_0_is_a_step(tmp_path: Path) -> None:
    """The restore bug behind "GraNd at initialisation": step 0 must not mean the newest."""
    like = {"w": jnp.zeros(3)}
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        for step in (0, 5, 9):
            checkpoints.save(step, {"w": jnp.full(3, float(step))}, step)
        checkpoints.wait()
        for step, expected in ((0, 0.0), (5, 5.0), (None, 9.0)):
            tree, note = checkpoints.restore(like, step) or ({}, None)
            np.testing.assert_array_equal(tree["w"], np.full(3, expected))
            assert note == int(expected)
        with pytest.raises(CheckpointError, match=r"no checkpoint 3, it has \[0, 5, 9\]"):
            checkpoints.restore(like, 3)
