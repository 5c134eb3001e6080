"""The files of checkpoints: which are whole, which are damaged, and what becomes of those."""

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

from dynamics.record.lock import Lock, is_locked, locked

log = logging.getLogger(__name__)

UNSEALED = "it has no checksum"
PENDING = "null"  # in place of the checksums until the checkpoint is whole and hashed


class Files:
    """``checkpoints/<step>/`` with ``checksums/<step>.json``; damaged ones go to ``damaged/``."""

    def __init__(self, folder: Path, *, read_only: bool):
        """What is only read stays as it is, damaged or half made."""
        self.folder, self.read_only = folder, read_only
        self.root, self.sums = folder / "checkpoints", folder / "checksums"
        self.damaged = folder / "damaged"
        self._lock: Lock | None = None

    def open(self) -> None:
        """Lock and make the folders; remove what a killed process had not completed.

        RecordError: another process is writing there.
        """
        if self.read_only:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if not is_locked(self.folder):  # else a recorder of this process has it, and lets it go
            self._lock = locked(self.folder)
        self.root.mkdir(parents=True, exist_ok=True)
        self.sums.mkdir(exist_ok=True)
        for left in self.root.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(left)
        for stray in self.root.iterdir():
            if re.fullmatch("[0-9]+", stray.name) and stray.name != str(int(stray.name)):
                self.set_aside(stray.name, "its name is no step")
        for seal in self.sums.glob("*.json"):
            if seal.read_bytes() == PENDING.encode():  # its content is not known to be good
                shutil.rmtree(self.root / seal.stem, ignore_errors=True)
                seal.unlink()
            elif self.steps() and not (self.root / seal.stem).exists():
                seal.unlink()

    def close(self) -> None:
        """Let others write there, unless the lock is a recorder's."""
        if self._lock is not None:
            self._lock.release()

    def steps(self) -> list[int]:
        """The steps that something is there for, intact or not, in ascending order."""
        if not self.root.is_dir():
            return []
        names = [p.name for p in self.root.iterdir() if re.fullmatch("[0-9]+", p.name)]
        return sorted(int(name) for name in names if name == str(int(name)))

    def seal(self, step: int) -> Path:
        """The file of its checksums."""
        return self.sums / f"{step}.json"

    def forget_removed(self) -> None:
        """Drop the checksums of checkpoints that are gone."""
        for seal in self.sums.glob("*.json"):
            if not (self.root / seal.stem).exists():
                seal.unlink()

    def newest(self) -> tuple[int | None, list[int], list[int]]:
        """The newest intact checkpoint, else those without a checksum; all that were there.

        Newer ones than the intact are set aside, as all damaged ones are.
        """
        found, unsealed = self.steps(), []
        for at in reversed(found):
            damage = self.damage(at)
            if damage == UNSEALED:
                unsealed.append(at)
            elif damage is not None:
                self.set_aside(str(at), damage)
            else:
                for newer in unsealed:
                    self.set_aside(str(newer), UNSEALED)
                return at, [], found
        aside = self.damaged.iterdir() if self.damaged.exists() else ()
        made = {int(p.name.split(".")[0]) for p in [*aside, *self.sums.glob("*.json")]}
        return None, unsealed, sorted({*found, *made})

    def damage(self, step: int) -> str | None:
        """What is wrong with a checkpoint's files, None if they are as they were written."""
        place, seal = self.root / str(step), self.seal(step)
        if not place.is_dir():
            return "it is no directory"
        if not any(place.iterdir()):
            return "its directory is empty"
        if not seal.exists():
            return UNSEALED
        try:
            expected = json.loads(seal.read_text())
        except ValueError:
            return f"its checksum file {seal.name} is unreadable"
        if expected is None:
            return "it is not whole yet"
        if not isinstance(expected, dict) or not expected:
            return f"its checksum file {seal.name} names no files"
        files = hashes(place)
        for name, digest in expected.items():
            if name not in files:
                return f"{name} is missing"
            if files[name] != digest:
                return f"{name} was changed after it was written"
        return None

    def set_aside(self, name: str, damage: str) -> None:
        """Move a damaged checkpoint away, with a warning."""
        if self.read_only:
            log.warning("checkpoint %s of %s is damaged (%s)", name, self.folder, damage)
            return
        self.damaged.mkdir(exist_ok=True)
        earlier = len(list(self.damaged.glob(f"{name}.*")))
        place = self.damaged / f"{name}.{earlier}"
        log.warning("checkpoint %s is damaged (%s), moved to %s", name, damage, place)
        os.rename(self.root / name, place)
        (self.sums / f"{name}.json").unlink(missing_ok=True)


def hashes(folder: Path) -> dict[str, str]:
    """File name -> blake2b of its content."""
    out = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        with file.open("rb") as f:
            digest = hashlib.file_digest(f, "blake2b").hexdigest()
        out[str(file.relative_to(folder))] = digest
    return out
