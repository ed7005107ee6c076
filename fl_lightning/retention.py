"""Which versions of the clients' memory are still needed: those that the federation or a checkpoint can ask for."""

from __future__ import annotations

import json
import os
import pickle
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from fl_lightning.store import ClientStore
from fl_lightning.types import ClientId

__all__ = ["Retention", "register"]

Index: TypeAlias = Mapping[ClientId, Any]
_FROM_BEFORE = -1
_FILE = "checkpoints.json"


@dataclass(slots=True)
class _Saved:
    """A checkpoint of this fit: after how many commits it was saved, and whether its file has been seen."""

    clock: int
    seen: bool = False


@dataclass(slots=True)
class _Replaced:
    """A version that was a client's memory from commit ``born`` until commit ``died``."""

    client_id: ClientId
    version: str
    born: int
    died: int


class Retention:
    """Deletes client memory that neither the federation nor a checkpoint needs.

    A version that a commit replaced is kept as long as a checkpoint exists that was saved in between. Checkpoints are
    known by their paths, and a path whose file is gone needs nothing. Files are deleted only after a commit: Lightning
    writes a new checkpoint before it deletes the old one, so whichever of the two a crash leaves finds its memory.

    The checkpoints of earlier fits are read once, at the start. If one of them cannot be read, nothing that was there
    before this fit is deleted.

    Args:
        store: the clients' memory.
        asynchronous: the checkpoints are written by another thread, so that a file may be older than what was saved
            last under its name; then no checkpoint of this fit counts as gone.

    Example:
        >>> import tempfile
        >>> store = ClientStore(tempfile.mkdtemp())
        >>> retention = Retention(store)
        >>> for round in range(3):
        ...     store.put("a", round, {"steps": round})
        ...     retention.committed(store.commit(["a"], round), round)
        >>> len(list(store.folder.glob("*/*.memory")))
        1
    """

    def __init__(self, store: ClientStore, asynchronous: bool = False) -> None:
        self.store = store
        self._asynchronous = asynchronous
        self._paths, fits = _read(self._file)
        store.fit = fits
        self._registered = False
        self._clock = 0
        self._saved: dict[str, _Saved] = {}
        self._before: dict[str, Index] = {}
        self._keeps_before = False
        self._waiting: list[_Replaced] = []
        self._born: dict[str, int] = {}
        self._overwritten = False

    @property
    def _file(self) -> Path:
        return self.store.folder / _FILE

    def start(self, folders: Iterable[str | os.PathLike[str]], paths: Iterable[str | os.PathLike[str]] = ()) -> None:
        """Look at the checkpoints that exist, and delete what earlier fits left and none of them needs.

        Args:
            folders: where this run's checkpoints are.
            paths: of checkpoints elsewhere.
        """
        if not self.store.folder.is_dir():
            return
        found = {path for folder in folders for path in Path(folder).glob("*.ckpt")}
        for path in sorted({*found, *map(Path, paths), *map(Path, self._paths)}):
            if path.is_file():
                index = _index_of(path)
                self._keeps_before |= index is None
                self._before[_absolute(path)] = index or {}
        if self._keeps_before:
            return
        self.store.gc(self._before.values())
        for index in self._before.values():
            self._let_go(index)

    def saved(self, path: str | os.PathLike[str]) -> None:
        """Keep what the federation has now as long as this file exists."""
        if not self.store.folder.is_dir():
            return  # nobody has memory yet, so this checkpoint names none
        name = _absolute(path)
        if self._asynchronous:
            name = f"{name}#{self._clock}"
        self._overwritten |= self._saved.pop(name, None) is not None
        self._saved[name] = _Saved(self._clock, os.path.exists(name))  # last, so that the clocks are in order
        if name in self._before:
            self._let_go(self._before.pop(name))
            self._overwritten = True
        if self._registered:
            self._register()

    def committed(self, replaced: Iterable[tuple[ClientId, str]], round: int) -> None:
        """Take what :meth:`ClientStore.commit` returned, and delete what nobody needs.

        Args:
            replaced: clients and the versions that their new memory replaced.
            round: that was committed.
        """
        self._clock += 1
        if not self.store.folder.is_dir():
            return
        gone = self._forget_checkpoints()
        self._born[self.store.version(round)] = self._clock
        new = [
            _Replaced(client_id, version, self._born.get(version, _FROM_BEFORE), self._clock)
            for client_id, version in replaced
        ]
        clocks = [saved.clock for saved in self._saved.values()]
        # a version that waits is let go only when a checkpoint is
        kept = [item for item in (self._waiting if gone else []) + new if not self._deleted(item, clocks)]
        self._waiting = kept if gone else self._waiting + kept
        if not self._registered:
            self._register()

    def _deleted(self, item: _Replaced, clocks: list[int]) -> bool:
        position = bisect_left(clocks, item.born)
        needed = position < len(clocks) and clocks[position] < item.died
        if item.born == _FROM_BEFORE:
            needed = needed or self._keeps_before or self._named_before(item.client_id, item.version)
        if not needed:
            self.store.delete(item.client_id, item.version)
        return not needed

    def _forget_checkpoints(self) -> bool:
        gone, overwritten = [], self._overwritten
        self._overwritten = False
        for name, saved in self._saved.items():
            exists = "://" in name or self._asynchronous or os.path.exists(name)
            if saved.seen and not exists:
                gone.append(name)
            saved.seen = saved.seen or exists
        for name in gone:
            del self._saved[name]
        old = [name for name in self._before if not os.path.exists(name)]
        for name in old:
            self._let_go(self._before.pop(name))
        return bool(gone or old or overwritten)

    def _let_go(self, index: Index) -> None:
        # what the federation itself has now waits until a commit replaces it
        for client_id, version in index.items():
            if self.store.version_of(client_id) != str(version):
                self._waiting.append(_Replaced(client_id, str(version), _FROM_BEFORE, _FROM_BEFORE))

    def _named_before(self, client_id: ClientId, version: str) -> bool:
        return any(str(index.get(client_id)) == version for index in self._before.values())

    def _register(self) -> None:
        self._registered = True
        names = {*self._before, *(name.partition("#")[0] for name in self._saved)}
        _write(self._file, names, self.store.fit + 1)


def register(folder: Path, path: str | os.PathLike[str]) -> None:
    """Let the next fit that writes memory into a folder know of a checkpoint that was saved after the last one."""
    if folder.is_dir():
        paths, fits = _read(folder / _FILE)
        _write(folder / _FILE, {*paths, _absolute(path)}, fits)


def _absolute(path: str | os.PathLike[str]) -> str:
    name = os.fspath(path)
    return name if "://" in name else os.path.abspath(name)


def _write(file: Path, paths: Iterable[str], fits: int) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps({"fits": fits, "checkpoints": sorted(paths)}))
    os.replace(partial, file)


def _read(file: Path) -> tuple[list[str], int]:
    """Return the checkpoints of the folder's earlier fits, and how many fits there were."""
    if not file.is_file():
        return [], 0
    known: dict[str, Any] = json.loads(file.read_text())
    return list(known["checkpoints"]), int(known["fits"])


def _index_of(path: Path) -> Index | None:
    """Return the memory that a checkpoint names, or ``None`` when it cannot be read without running its code."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError):
        return None
    memory: Index = checkpoint.get("fl_lightning", {}).get("memory", {})
    return memory
