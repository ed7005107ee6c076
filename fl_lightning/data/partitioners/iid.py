"""Clients of equal size that all look alike."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_lightning.data.partitioners.base import Partitioner

__all__ = ["IID"]


class IID(Partitioner):
    """A random permutation cut into ``num_clients`` parts whose sizes differ by at most one.

    Args:
        num_clients: number of clients, at least 1.
        seed: root of the partition.
        target_fn: sample to label; only used to picture the partition.
        min_size: examples that every client has at least.

    Example:
        >>> IID(num_clients=3, seed=1).split(list(range(10))).sizes().tolist()
        [4, 3, 3]
    """

    def owners(self, num_examples: int, targets: NDArray[Any] | None, repair: bool) -> NDArray[np.int64]:
        return self.generator("examples").permutation(np.arange(num_examples, dtype=np.int64) % self.num_clients)
