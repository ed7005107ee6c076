"""A client is alone, on whichever process of a group it trains."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed

__all__ = ["alone"]

_lock = threading.Lock()
_here = threading.local()
_num_alone = 0  # over all threads
_original: Callable[[], bool] | None = None


@contextmanager
def alone() -> Iterator[None]:
    """Let metrics inside the block believe that no process group exists.

    torchmetrics' ``compute()`` and ``self.log(sync_dist=True)`` ask ``torch.distributed.is_initialized()`` whether to
    synchronise. Asked in a client's training, they would average different clients, and hang when the processes have
    different numbers of clients. Inside the block the answer is no; other threads and the group itself are untouched.

    Example:
        >>> with alone():
        ...     torch.distributed.is_initialized()
        False
    """
    global _num_alone, _original
    with _lock:
        if _num_alone == 0:
            _original = torch.distributed.is_initialized
            torch.distributed.is_initialized = _is_initialized
        _num_alone += 1
    _here.depth = getattr(_here, "depth", 0) + 1
    try:
        yield
    finally:
        _here.depth -= 1
        with _lock:
            _num_alone -= 1
            if _num_alone == 0 and _original is not None:
                torch.distributed.is_initialized = _original


def _is_initialized() -> bool:
    if getattr(_here, "depth", 0):
        return False
    return _original() if _original is not None else False
