"""Lightning's banners, tips and hints appear once for the federation and never per client."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.utilities.rank_zero import rank_zero_only

__all__ = ["as_rank_zero", "quiet"]

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
)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what Lightning says about a single fit; warnings of the user's own code still come through."""
    loggers = [logging.getLogger(name) for name in (*_CHATTER, *(f"{n}.utilities.rank_zero" for n in _CHATTER))]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PossibleUserWarning)
            for hint in _HINTS:
                warnings.filterwarnings("ignore", hint)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def as_rank_zero() -> Iterator[None]:
    """Let code marked ``rank_zero_only`` run: a client is alone, whichever process it trains in."""
    rank = getattr(rank_zero_only, "rank", None)
    rank_zero_only.rank = 0
    try:
        yield
    finally:
        rank_zero_only.rank = rank
