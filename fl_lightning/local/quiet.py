"""Lightning's banners, tips and hints appear once for the federation and never per client."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only

__all__ = ["as_rank_zero", "quiet", "without_hints"]

_CHATTER = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")
# hints about one fit (workers, logging interval, an empty loader) that would repeat for every client
_HINTS = (
    r".*does not have many workers.*",
    r".*smaller than the logging interval.*",
    r".*Total length of .* across ranks is zero.*",
    r".*ReduceLROnPlateau conditioned on metric.*",
    r".*Early stopping conditioned on metric.*",
    r".*module\(s\) in eval mode at the start of training.*",
    r".*`IterableDataset` has `__len__` defined.*",
    r".*You defined a `validation_step` but have no `val_dataloader`.*",
    r".*Trying to infer the `batch_size` from an ambiguous collection.*",
    r".*The total number of parameters detected may be inaccurate.*",
    r".*treespec, LeafSpec.*",
    r".*It is recommended to use `self.log.*sync_dist=True.*",
)


@contextmanager
def without_hints() -> Iterator[None]:
    """Ignore hints about a single fit, for the whole federation.

    Entered once and not per client: every entry makes Python forget which warnings it has shown already.
    """
    with warnings.catch_warnings():
        for hint in _HINTS:
            warnings.filterwarnings("ignore", hint)
        yield


class _Silence(logging.Filter):
    """Stops everything below an error while clients train.

    A filter and no level: every change of a level empties the caches of all loggers of the process, hundreds of them,
    which for a small client cost as much as half of its Trainer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.depth = 0
        self._num_loggers = 0

    def filter(self, record: logging.LogRecord) -> bool:
        return self.depth == 0 or record.levelno >= logging.ERROR

    def install(self) -> None:
        """Stand before every logger of Lightning; those of modules that are imported later come when they are there."""
        known = logging.Logger.manager.loggerDict
        if len(known) == self._num_loggers:
            return
        for name in (*_CHATTER, *known):
            if name.startswith(_CHATTER):
                logging.getLogger(name).addFilter(self)  # adding it twice is adding it once
        self._num_loggers = len(known)


_silence = _Silence()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what Lightning's loggers say about a single fit; warnings still come through."""
    _silence.install()
    _silence.depth += 1
    try:
        yield
    finally:
        _silence.depth -= 1


@contextmanager
def as_rank_zero() -> Iterator[None]:
    """Let code marked ``rank_zero_only`` run: a client is alone, whichever process it trains in."""
    switch: Any = rank_zero_only  # Lightning keeps the rank on the function
    rank = getattr(switch, "rank", None)
    switch.rank = 0
    try:
        yield
    finally:
        switch.rank = rank
