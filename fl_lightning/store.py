"""What clients keep between rounds, on disk, so that memory does not grow with the population.

A client writes its memory while the round runs; it counts only once the server accepted the update (``commit``).
Every version is a file of its own, so a resume from an older checkpoint finds the memory as it was then.
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
        >>> store.commit(["site-a"], round=0)
        >>> store.get("site-a")
        {'steps': 12}
    """

    def __init__(self, folder: str | os.PathLike[str], cache_bytes: int = 64 * 2**20) -> None:
        self.folder = Path(folder)
        self.cache_bytes = cache_bytes
        self._index: dict[ClientId, int] = {}
        self._written: dict[ClientId, int] = {}  # put by this process, and not yet committed
        self._cache: OrderedDict[tuple[ClientId, int], bytes] = OrderedDict()
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
            version = round
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
        path = self._path(client_id, round)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_bytes(data)
        os.replace(partial, path)  # a kill leaves the old version or the new one, never half of one
        self._remember(client_id, round, data)
        self._written[client_id] = round

    def discard(self, client_id: ClientId) -> None:
        """Forget what a client wrote and nobody committed."""
        self._written.pop(client_id, None)

    def commit(self, client_ids: Iterable[ClientId], round: int) -> None:
        """Make what these clients wrote in ``round`` their memory."""
        for client_id in client_ids:
            self._index[client_id] = round
        self._written.clear()

    def gc(self, keep: Iterable[Mapping[Any, int]] = ()) -> int:
        """Delete every version that neither the current index nor one of ``keep`` names; return how many."""
        alive = {
            self._path(client_id, version) for index in (self._index, *keep) for client_id, version in index.items()
        }
        dead = [path for path in self.folder.glob("*/*.memory") if path not in alive]
        for path in dead:
            path.unlink(missing_ok=True)
        return len(dead)

    def state_dict(self) -> dict[ClientId, int]:
        """Return the index: which version each client's memory is at."""
        return dict(self._index)

    def load_state_dict(self, index: Mapping[ClientId, int]) -> None:
        """Go back to an index, as a checkpoint holds it.

        Raises:
            FileNotFoundError: when the memory of a client at that version is gone.
        """
        for client_id, version in index.items():
            if not self._path(client_id, version).is_file():
                raise FileNotFoundError(
                    f"The checkpoint expects the memory of client {client_id!r} from round {version} in "
                    f"{str(self.folder)!r}, which is not there. Keep the run's folder together with its checkpoints."
                )
        self._index = dict(index)

    def adopt(self, other: ClientStore, index: Mapping[ClientId, int]) -> None:
        """Copy the versions of an index from another store, for a run that goes on in a new folder."""
        for client_id, version in index.items():
            source, target = other._path(client_id, version), self._path(client_id, version)
            if source.is_file() and not target.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                partial = target.with_suffix(f".{os.getpid()}")
                shutil.copyfile(source, partial)
                os.replace(partial, target)

    def _remember(self, client_id: ClientId, version: int, data: bytes) -> None:
        old = self._cache.pop((client_id, version), b"")
        self._cache[client_id, version] = data
        self._cached_bytes += len(data) - len(old)
        while self._cached_bytes > self.cache_bytes and self._cache:
            _, dropped = self._cache.popitem(last=False)
            self._cached_bytes -= len(dropped)

    def _path(self, client_id: ClientId, version: int) -> Path:
        # the digest keeps 1 and "1" apart, and spreads a million clients over 256 folders
        digest = hashlib.blake2b(repr(client_id).encode(), digest_size=8).hexdigest()
        readable = re.sub(r"[^A-Za-z0-9_.-]", "_", str(client_id))[:40]
        return self.folder / digest[:2] / f"{readable}-{digest}-{version}.memory"
