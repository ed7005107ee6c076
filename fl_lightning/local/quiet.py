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


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what Lightning's loggers say about a single fit; warnings still come through."""
    loggers = [logging.getLogger(name) for name in (*_CHATTER, *(f"{n}.utilities.rank_zero" for n in _CHATTER))]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


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
