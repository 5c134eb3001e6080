"""Checkpoints that are intact or refused: orbax, plus what it does not check.

orbax writes asynchronously and commits by renaming, but restores flipped bits and other dtypes
without a word. Here every file is hashed after the commit and before a restore, names, shapes and
dtypes are compared, and a damaged checkpoint gives way to the newest intact one before it.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from dynamics import hosts
from dynamics.record import write
from dynamics.types import PyTree

log = logging.getLogger(__name__)

UNSEALED = "it has no checksum"
PENDING = "null"  # in place of the checksums until the checkpoint is whole and hashed


class CheckpointError(Exception):
    """Checkpoints that can't be restored from."""


class Checkpoints:
    """The checkpoints of one run: ``checkpoints/<step>/`` with ``checksums/<step>.json``."""

    def __init__(self, folder: Path | str, *, keep: int = 3):
        """Opens or makes them in a run's folder; the newest ``keep`` stay."""
        self.folder = Path(folder).absolute()
        self.root, self.sums = self.folder / "checkpoints", self.folder / "checksums"
        self._damaged = self.folder / "damaged"
        hosts.once(self._open)
        self._keep = keep
        self._manager: ocp.CheckpointManager | None = None
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._sealed: Future | None = None

    def _open(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self.sums.mkdir(exist_ok=True)
        for left in self.root.glob("*.orbax-checkpoint-tmp*"):  # of a killed process
            shutil.rmtree(left)
        for seal in self.sums.glob("*.json"):
            if seal.read_bytes() == PENDING.encode():  # its content is not known to be good
                shutil.rmtree(self.root / seal.stem, ignore_errors=True)
                seal.unlink()
            elif self.steps() and not (self.root / seal.stem).exists():
                seal.unlink()

    def _forget_removed(self) -> None:
        for seal in self.sums.glob("*.json"):
            if not (self.root / seal.stem).exists():
                seal.unlink()

    def steps(self) -> list[int]:
        """The steps with a directory, intact or not, in ascending order."""
        return sorted(int(p.name) for p in self.root.iterdir() if p.name.isdigit())

    def save(self, step: int, tree: PyTree, note: Any = None) -> None:
        """Write ``tree`` and the JSON value ``note`` in the background.

        CheckpointError, here or in what is called next: they can't be written.
        """
        self.wait()
        leaves, note = _leaves(tree), {"note": note, "leaves": _describe(_leaves(tree))}
        args = ocp.args.Composite(tree=ocp.args.StandardSave(leaves), note=ocp.args.JsonSave(note))
        with self._writing(step):
            if self._manager is None:
                # made in the background, a directory that can't be made is waited for ten minutes
                now = ocp.AsyncOptions(create_directories_asynchronously=False)
                options = ocp.CheckpointManagerOptions(
                    max_to_keep=self._keep, create=False, async_options=now
                )
                self._manager = ocp.CheckpointManager(self.root, options=options)
            if hosts.is_first() and not (self.sums / f"{step}.json").exists():
                write(self.sums / f"{step}.json", PENDING)
            self._manager.save(step, args=args, force=True)
        self._sealed = self._thread.submit(self._seal, step)

    def wait(self) -> None:
        """Return when everything saved is on the disk and hashed."""
        if self._sealed is not None:
            sealed, self._sealed = self._sealed, None  # what went wrong is said once
            sealed.result()

    def close(self) -> None:
        """Wait, and end the background work."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            if self._manager is not None:
                manager, self._manager = self._manager, None
                with suppress(Exception):  # it only says again what wait() has said
                    manager.close()

    def restore(self, like: PyTree, step: int | None = None) -> tuple[PyTree, Any] | None:
        """The newest intact checkpoint as a tree like ``like``, and its note.

        With ``step`` (0 is one) that checkpoint and no other; CheckpointError if it is not there
        or damaged.

        ``like`` holds arrays or ShapeDtypeStructs with shardings: what is restored lies where they
        say, whatever mesh it was saved on. None if nothing was ever saved. Each damaged checkpoint
        is warned of and moved to ``damaged/``. CheckpointError: all are damaged, or an intact one
        has other names, shapes or dtypes.
        """
        if step is not None:
            hosts.once(self._check, step)
            return self._read(step, like)
        at, unsealed, found = hosts.once(self._newest)
        if at is not None:
            return self._read(at, like)
        for at in unsealed:  # killed between its first commit and the hash
            log.warning("checkpoint %d has no checksum, its content is not verified", at)
            try:
                return hosts.together(self._read, at, like)
            except (OSError, ValueError, KeyError) as error:
                hosts.once(self._set_aside, at, f"{type(error).__name__}: {str(error)[:200]}")
        if found:
            raise CheckpointError(
                f"none of the checkpoints {found} in {self.root} is intact (see {self._damaged}): "
                f"restore {self.folder} from a copy, or remove it to start over"
            )
        return None

    def _newest(self) -> tuple[int | None, list[int], list[int]]:
        """The newest intact checkpoint, else those without a checksum; all that were there.

        Newer ones than the intact are set aside, as all damaged ones are.
        """
        found, unsealed = self.steps(), []
        for at in reversed(found):
            damage = self._damage(at)
            if damage == UNSEALED:
                unsealed.append(at)
            elif damage is not None:
                self._set_aside(at, damage)
            else:
                for newer in unsealed:
                    self._set_aside(newer, UNSEALED)
                return at, [], found
        aside = self._damaged.iterdir() if self._damaged.exists() else ()
        made = {int(p.name.split(".")[0]) for p in [*aside, *self.sums.glob("*.json")]}
        return None, unsealed, sorted({*found, *made})

    def _check(self, step: int) -> None:
        if step not in self.steps():
            raise CheckpointError(f"{self.root} has no checkpoint {step}, it has {self.steps()}")
        if (damage := self._damage(step)) not in (None, UNSEALED):
            raise CheckpointError(f"checkpoint {step} in {self.root} is damaged: {damage}")

    def _damage(self, step: int) -> str | None:
        """What is wrong with a checkpoint's files, None if they are as they were written."""
        seal = self.sums / f"{step}.json"
        if not any((self.root / str(step)).iterdir()):
            return "its directory is empty"
        if not seal.exists():
            return UNSEALED
        try:
            expected = json.loads(seal.read_text())
        except ValueError:
            return f"its checksum file {seal.name} is unreadable"
        files = _hashes(self.root / str(step))
        for name, digest in expected.items():
            if name not in files:
                return f"{name} is missing"
            if files[name] != digest:
                return f"{name} was changed after it was written"
        return None

    def _read(self, step: int, like: PyTree) -> tuple[PyTree, Any]:
        names = _leaves(like)
        with ocp.CheckpointManager(self.root) as manager:
            note = manager.restore(step, args=ocp.args.Composite(note=ocp.args.JsonRestore()))
            stored, wanted = note["note"]["leaves"], _describe(names)
            if stored != wanted:
                raise CheckpointError(_difference(self.root / str(step), stored, wanted))
            abstract = {name: _abstract(leaf) for name, leaf in names.items()}
            args = ocp.args.Composite(tree=ocp.args.StandardRestore(abstract))
            leaves = manager.restore(step, args=args)["tree"]
        values = [
            jax.random.wrap_key_data(leaves[name]) if _is_key(leaf) else leaves[name]
            for name, leaf in zip(names, jax.tree.leaves(like), strict=True)
        ]
        log.info("restored checkpoint %d of %s", step, self.root)
        return jax.tree.unflatten(jax.tree.structure(like), values), note["note"]["note"]

    def _seal(self, step: int) -> None:
        """Hash a checkpoint once orbax has committed it; drop the hashes of removed ones."""
        assert self._manager is not None
        with self._writing(step):
            self._manager.wait_until_finished()
            if not hosts.is_first():
                return
            write(self.sums / f"{step}.json", json.dumps(_hashes(self.root / str(step)), indent=1))
            self._forget_removed()

    @contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        """CheckpointError for whatever orbax lets through: a full disk comes in many types."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            why = why if len(why) < 200 else f"{why[:60]} ... {why[-130:]}"  # the cause comes last
            raise CheckpointError(
                f"checkpoint {step} can't be written to {self.root} ({why}): see to the space and "
                "the permissions there and start again, which goes on from the newest checkpoint"
            ) from error

    def _set_aside(self, step: int, damage: str) -> None:
        self._damaged.mkdir(exist_ok=True)
        earlier = len(list(self._damaged.glob(f"{step}.*")))
        place = self._damaged / f"{step}.{earlier}"
        log.warning("checkpoint %d is damaged (%s), moved to %s", step, damage, place)
        os.rename(self.root / str(step), place)
        (self.sums / f"{step}.json").unlink(missing_ok=True)


def _hashes(folder: Path) -> dict[str, str]:
    """File name -> blake2b of its content."""
    out = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        with file.open("rb") as f:
            digest = hashlib.file_digest(f, "blake2b").hexdigest()
        out[str(file.relative_to(folder))] = digest
    return out


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _leaves(tree: PyTree) -> dict[str, Any]:
    """Path -> leaf, PRNG keys as the integers they are made of."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): _data(leaf) for path, leaf in flat
    }


def _data(leaf: Any) -> Any:
    if not _is_key(leaf):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        data = jax.eval_shape(jax.random.key_data, leaf)
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)
    return jax.random.key_data(leaf)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _describe(leaves: dict[str, Any]) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}


def _difference(path: Path, stored: dict[str, str], wanted: dict[str, str]) -> str:
    for name in [*wanted, *stored]:
        if stored.get(name) != wanted.get(name):
            return (
                f"checkpoint {path} does not fit this run: {name} is {stored.get(name, 'absent')} "
                f"there and {wanted.get(name, 'absent')} here; it was made with another config"
            )
    raise AssertionError("no difference")
