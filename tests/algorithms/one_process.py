"""A spawned engine whose clients share one process: as deaf to the server, and started once for a whole suite."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

from fl_lightning.engines import SpawnedEngine
from fl_lightning.engines.spawned import _answer_task


def serve(pipe: Any) -> None:
    """Answer tasks until nobody asks; every task builds its client half anew from the bytes that it gets."""
    try:
        while True:
            _answer_task(pipe)
    except (EOFError, ConnectionError):
        pipe.close()


class OneProcess(SpawnedEngine):
    """Use as a context: the process ends with it."""

    def __enter__(self) -> OneProcess:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._child = context.Process(target=serve, args=(theirs,), daemon=True)
        self._child.start()
        theirs.close()
        self.num_tasks = 0
        return self

    def __exit__(self, *_: object) -> None:
        self._ours.close()
        self._child.join()

    @contextmanager
    def _process(self) -> Iterator[tuple[Any, BaseProcess]]:
        self.num_tasks += 1
        yield self._ours, self._child
