"""Checkpoints that are intact or refused: orbax, plus what it does not check.

orbax writes asynchronously and commits by renaming, but restores flipped bits and other dtypes
without a word. Here every file is hashed after the commit and before a restore, names, shapes and
dtypes are compared, and a damaged checkpoint gives way to the newest intact one before it.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import orbax.checkpoint as ocp

from dynamics import hosts
from dynamics.checkpoint import leaves
from dynamics.checkpoint.files import PENDING, UNSEALED, Files, hashes
from dynamics.record import write
from dynamics.types import PyTree

log = logging.getLogger(__name__)

__all__ = ["PENDING", "CheckpointError", "Checkpoints"]

T = TypeVar("T")


class CheckpointError(Exception):
    """Checkpoints that can't be restored from."""


class Checkpoints:
    """The checkpoints of one run: ``checkpoints/<step>/`` with ``checksums/<step>.json``."""

    def __init__(self, folder: Path | str, *, keep: int = 3, read_only: bool = False):
        """Opens or makes them in a run's folder; the newest ``keep`` stay.

        With ``read_only`` nothing there is changed, and another process may be writing them; else
        the folder is locked until ``close``. RecordError: another process has it.
        """
        self._files = Files(Path(folder).absolute(), read_only=read_only)
        self.folder, self.root, self.sums = (
            self._files.folder,
            self._files.root,
            self._files.sums,
        )
        hosts.once(self._files.open)
        self._keep = keep
        self._manager: ocp.CheckpointManager | None = None
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._sealed: Future | None = None

    def steps(self) -> list[int]:
        """The steps that something is there for, intact or not, in ascending order."""
        return self._files.steps()

    def is_intact(self, step: int) -> bool:
        """Whether there is a checkpoint of that step, as it was written; a damaged one goes."""
        if step not in self.steps():
            return False
        if damage := self._files.damage(step):
            self._files.set_aside(str(step), damage)
        return damage is None

    def save(self, step: int, items: Mapping[str, PyTree], note: Any = None) -> None:
        """Write trees by name and the JSON value ``note`` in the background.

        CheckpointError, here or in what is called next: they can't be written.
        """
        self.wait()
        named = {item: leaves.named(tree) for item, tree in items.items()}
        about = {"note": note, "items": {n: leaves.about(tree) for n, tree in items.items()}}
        parts: dict[str, Any] = {
            item: ocp.args.StandardSave({name: leaves.data(x) for name, x in some.items()})
            for item, some in named.items()
            if some  # orbax stores no tree without leaves
        }
        args = ocp.args.Composite(note=ocp.args.JsonSave(about), **parts)
        with self._writing(step):
            if self._manager is None:
                # made in the background, a directory that can't be made is waited for ten minutes
                now = ocp.AsyncOptions(create_directories_asynchronously=False)
                options = ocp.CheckpointManagerOptions(
                    max_to_keep=self._keep, create=False, async_options=now
                )
                self._manager = ocp.CheckpointManager(self.root, options=options)
            if hosts.is_first() and not self._files.seal(step).exists():
                write(self._files.seal(step), PENDING)
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
            self._files.close()

    def restore(
        self,
        like: Mapping[str, PyTree],
        step: int | None = None,
        *,
        check: Callable[[Any], None] = lambda note: None,
    ) -> tuple[dict[str, PyTree], Any] | None:
        """The items of ``like`` in the newest intact checkpoint, as trees like its own; the note.

        With ``step`` (0 is one) that checkpoint and no other; CheckpointError if it is not there
        or damaged.

        ``like`` holds arrays or ShapeDtypeStructs with shardings: what is restored lies where they
        say, whatever mesh it was saved on. Items that are not asked for are not read. None if
        nothing was ever saved. Each damaged checkpoint is warned of and moved to ``damaged/``.
        ``check(note)`` may refuse before anything is compared or read. CheckpointError: all are
        damaged, or an intact one has other names, shapes or dtypes.
        """
        return self._newest(step, partial(self._read, like=like, check=check))

    def raw(self, item: str, step: int | None = None) -> Any:
        """An item as ``restore`` finds it, its leaves on this process's first device.

        Dicts, tuples and lists are what they were, other containers are dicts of their fields. None
        if nothing was ever saved. CheckpointError: as ``restore``, or there is no such item.
        """
        return self._newest(step, partial(self._read_raw, item=item))

    def _newest(self, step: int | None, read: Callable[[int], T]) -> T | None:
        """What is read from the newest checkpoint that is good, or from that of ``step``."""
        if step is not None:
            hosts.once(self._check, step)
            try:
                return read(step)
            except (KeyError, OSError) as error:  # a part is missing
                why = f"{type(error).__name__}: {str(error)[:200]}"
                raise CheckpointError(
                    f"checkpoint {step} in {self.root} is damaged: {why}"
                ) from error
        at, unsealed, found = hosts.once(self._files.newest)
        if at is not None:
            return read(at)
        for at in unsealed:  # killed between its first commit and the hash
            log.warning("checkpoint %d has no checksum, its content is not verified", at)
            try:
                return hosts.together(read, at)
            except (CheckpointError, hosts.LostError):
                raise
            except Exception as error:  # orbax has many for a part that is missing or half written
                why = f"{type(error).__name__}: {str(error)[:200]}"
                hosts.once(self._files.set_aside, str(at), why)
        if found:
            raise CheckpointError(
                f"none of the checkpoints {found} in {self.root} is intact (see "
                f"{self._files.damaged}): restore {self.folder} from a copy, or remove it to start "
                "over"
            )
        return None

    def _check(self, step: int) -> None:
        if step not in self.steps():
            raise CheckpointError(f"{self.root} has no checkpoint {step}, it has {self.steps()}")
        if (damage := self._files.damage(step)) not in (None, UNSEALED):
            raise CheckpointError(f"checkpoint {step} in {self.root} is damaged: {damage}")

    def _read(
        self, step: int, like: Mapping[str, PyTree], check: Callable[[Any], None]
    ) -> tuple[dict[str, PyTree], Any]:
        named = {item: leaves.named(tree) for item, tree in like.items()}
        with ocp.CheckpointManager(self.root) as manager:
            about = self._about(manager, step)
            check(about["note"])
            for item, wanted in named.items():
                stored = about["items"].get(item, {"leaves": {}})["leaves"]
                kinds = {name: leaves.kind(x) for name, x in wanted.items()}
                if words := leaves.difference(item, stored, kinds):
                    raise CheckpointError(
                        f"checkpoint {self.root / str(step)} does not fit this run: {words}; it "
                        "was made with another config"
                    )
            shapes = {
                item: {name: leaves.abstract(x) for name, x in some.items()}
                for item, some in named.items()
            }
            found = self._stored(manager, step, shapes)
        log.info("restored checkpoint %d of %s", step, self.root)
        items = {}
        for item, tree in like.items():
            data = about["items"].get(item, {"data": {}})["data"]
            impls = {name: impl for name, (_, _, impl) in data.items()}
            items[item] = leaves.like(tree, found[item], impls)
        return items, about["note"]

    def _read_raw(self, step: int, item: str) -> Any:
        with ocp.CheckpointManager(self.root) as manager:
            about = self._about(manager, step)
            if item not in about["items"]:
                raise CheckpointError(f"checkpoint {step} in {self.root} has no {item!r}")
            said = about["items"][item]
            found = self._stored(manager, step, {item: leaves.here(said["data"])})[item]
        whole = {n: leaves.as_saved(x, said["data"][n][2]) for n, x in found.items()}
        return leaves.built(said["structure"], whole)

    def _stored(
        self, manager: ocp.CheckpointManager, step: int, shapes: Mapping[str, dict[str, Any]]
    ) -> dict[str, dict[str, Any]]:
        """The leaves of items, where their shapes say."""
        parts: dict[str, Any] = {n: ocp.args.StandardRestore(some) for n, some in shapes.items()}
        parts = {item: part for item, part in parts.items() if shapes[item]}
        found = manager.restore(step, args=ocp.args.Composite(**parts)) if parts else {}
        return {item: found[item] if item in parts else {} for item in shapes}

    def _about(self, manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
        """The note of a checkpoint and what is said of its items."""
        about = manager.restore(step, args=ocp.args.Composite(note=ocp.args.JsonRestore()))["note"]
        if "items" not in about:
            raise CheckpointError(
                f"{self.root / str(step)} was made by an older version, with the state and the "
                "probes in one: compute the run again"
            )
        return about

    def _seal(self, step: int) -> None:
        """Hash a checkpoint once orbax has committed it; drop the hashes of removed ones."""
        assert self._manager is not None
        with self._writing(step):
            self._manager.wait_until_finished()
            if not hosts.is_first():
                return
            sums = hashes(self.root / str(step))
            write(self._files.seal(step), json.dumps(sums, indent=1))
            self._files.forget_removed()

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
