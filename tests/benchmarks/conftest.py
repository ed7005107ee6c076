"""What every test of a benchmark needs."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    """A benchmark silences Lightning for its process, which here is that of the other tests too."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield
    logger.setLevel(level)
