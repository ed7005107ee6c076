"""What clients keep between rounds, on disk, so that memory does not grow with the population.

A client writes its memory while the round runs; it counts only once the server accepted the update (``commit``).
Every version is a file of its own, so a resume from an older checkpoint finds the memory as it was then;
``fl_lightning.retention`` deletes the versions that no checkpoint can ask for any more.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fl_lightning.types import ClientId, Memory
from fl_lightning.wire import pack, unpack

__all__ = ["ClientStore"]


class ClientStore:
    """Memory of clients by id, in files under one folder.

    Args:
        folder: where the files are; shared by all processes of a federation. Made when the first memory is put.
        cache_bytes: how much of the newest memory stays in RAM.

    Example:
        >>> import tempfile
        >>> store = ClientStore(tempfile.mkdtemp())
        >>> store.put("site-a", round=0, memory={"steps": 12})
        >>> store.get("site-a")  # not committed yet
        {}
        >>> replaced = store.commit(["site-a"], round=0)
        >>> store.get("site-a")
        {'steps': 12}
    """

    def __init__(self, folder: str | os.PathLike[str], cache_bytes: int = 64 * 2**20) -> None:
        self.folder = Path(folder)
        self.cache_bytes = cache_bytes
        self.fit = 0
        """Which fit writes in this folder, counted from 0: two fits never write the same file, though both have a round
        3 (a run that goes on from an older checkpoint, or a second run without a logger in the same folder)."""
        self._index: dict[ClientId, str] = {}
        self._written: dict[ClientId, int] = {}  # put by this process, and not yet committed
        self._refused: set[ClientId] = set()
        self._cache: OrderedDict[tuple[ClientId, str], bytes] = OrderedDict()
        self._cached_bytes = 0

    def get(self, client_id: ClientId, round: int | None = None) -> Memory:
        """Return the client's memory; an empty dictionary when it has none. The caller may change it.

        Args:
            client_id: the client.
            round: what the client has written in this round counts already, for its second dispatch in it; ``None``
                returns what is committed.
        """
        version = self._index.get(client_id)
        if round is not None and self._written.get(client_id) == round:
            version = self.version(round)
        if version is None:
            return {}
        data = self._cache.get((client_id, version))
        if data is None:
            data = self._path(client_id, version).read_bytes()
            self._remember(client_id, version, data)
        else:
            self._cache.move_to_end((client_id, version))
        memory: Memory = unpack(data)
        return memory

    def put(self, client_id: ClientId, round: int, memory: Memory) -> None:
        """Write the memory of a client for this round; :meth:`get` shows it after :meth:`commit`."""
        data = pack(memory)
        version = self.version(round)
        path = self._path(client_id, version)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_bytes(data)
        os.replace(partial, path)  # a kill leaves the old version or the new one, never half of one
        self._remember(client_id, version, data)
        self._written[client_id] = round

    def discard(self, client_id: ClientId) -> None:
        """Forget what a client wrote and nobody committed."""
        if self._written.pop(client_id, None) is not None:
            self._refused.add(client_id)

    def commit(self, client_ids: Iterable[ClientId], round: int) -> list[tuple[ClientId, str]]:
        """Make what these clients wrote in ``round`` their memory.

        What others wrote in this process is deleted: the server did not accept their updates.

        Returns:
            The versions that are nobody's memory any more, which an older checkpoint may still name.
        """
        version, replaced = self.version(round), []
        for client_id in client_ids:
            old = self._index.get(client_id)
            if old is not None and old != version:
                replaced.append((client_id, old))
            self._index[client_id] = version
        for client_id in self._refused.union(self._written):
            if self._index.get(client_id) != version:
                self.delete(client_id, version)
        self._written.clear()
        self._refused.clear()
        return replaced

    def delete(self, client_id: ClientId, version: str) -> None:
        """Delete one version of a client's memory."""
        self._cached_bytes -= len(self._cache.pop((client_id, version), b""))
        self._path(client_id, version).unlink(missing_ok=True)

    def version(self, round: int) -> str:
        """Return the name of what clients write in a round of this fit."""
        return str(round) if self.fit == 0 else f"{round}.{self.fit}"

    def version_of(self, client_id: ClientId) -> str | None:
        """Return which version a client's memory is at, or ``None`` when it has none."""
        return self._index.get(client_id)

    def gc(self, keep: Iterable[Mapping[Any, Any]] = ()) -> int:
        """Delete every file that neither the current index nor one of ``keep`` names; return how many.

        It lists the whole folder, so it is for the start of a fit, to clear what a killed one left behind.
        """
        alive = {
            self._path(client_id, str(version))
            for index in (self._index, *keep)
            for client_id, version in index.items()
        }
        found = [path for pattern in ("*/*.memory", "*/*.partial") for path in self.folder.glob(pattern)]
        dead = [path for path in found if path not in alive]
        for path in dead:
            path.unlink(missing_ok=True)
        return len(dead)

    def state_dict(self) -> dict[ClientId, str]:
        """Return the index: which version each client's memory is at.

        One entry for each client that ever took part with memory, however many rounds there were.
        """
        return dict(self._index)

    def load_state_dict(self, index: Mapping[ClientId, Any]) -> None:
        """Go back to an index, as a checkpoint holds it.

        Raises:
            FileNotFoundError: when the memory of a client at that version is gone.
        """
        index = {client_id: str(version) for client_id, version in index.items()}
        for client_id, version in index.items():
            if not self._path(client_id, version).is_file():
                raise FileNotFoundError(
                    f"The checkpoint expects the memory of client {client_id!r} from round {version} in "
                    f"{str(self.folder)!r}, which is not there. Keep the run's folder together with its checkpoints."
                )
        self._index = index

    def adopt(self, other: ClientStore, index: Mapping[ClientId, Any]) -> None:
        """Copy the versions of an index from another store, for a run that goes on in a new folder."""
        for client_id, version in ((client_id, str(version)) for client_id, version in index.items()):
            source, target = other._path(client_id, version), self._path(client_id, version)
            if source.is_file() and not target.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                partial = target.with_suffix(f".{os.getpid()}")
                shutil.copyfile(source, partial)
                os.replace(partial, target)

    def _remember(self, client_id: ClientId, version: str, data: bytes) -> None:
        old = self._cache.pop((client_id, version), b"")
        self._cache[client_id, version] = data
        self._cached_bytes += len(data) - len(old)
        while self._cached_bytes > self.cache_bytes and self._cache:
            _, dropped = self._cache.popitem(last=False)
            self._cached_bytes -= len(dropped)

    def _path(self, client_id: ClientId, version: str) -> Path:
        # the digest keeps 1 and "1" apart, and spreads a million clients over 256 folders
        digest = hashlib.blake2b(repr(client_id).encode(), digest_size=8).hexdigest()
        readable = re.sub(r"[^A-Za-z0-9_.-]", "_", str(client_id))[:40]
        return self.folder / digest[:2] / f"{readable}-{digest}-{version}.memory"
