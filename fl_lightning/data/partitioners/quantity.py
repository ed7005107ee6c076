"""Clients that look alike but differ in size by a power law."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_lightning.data.partitioners.base import Partitioner, apportion, top_up
from fl_lightning.errors import MisconfigurationException

__all__ = ["Quantity"]


class Quantity(Partitioner):
    r"""Sizes by Zipf's law, examples at random.

    .. math:: n_{(r)} \propto r^{-\text{exponent}}, \qquad r = 1 \dots \text{num\_clients}

    Which client has which rank is drawn from the seed.

    Args:
        num_clients: number of clients, at least 1.
        exponent: 0 gives equal sizes, 1 makes the largest client ``num_clients`` times the smallest; at least 0.
        seed: root of the partition.
        target_fn: sample to label; only used to picture the partition.
        min_size: examples that every client has at least; what is lacking comes from the largest clients.

    Example:
        >>> sorted(Quantity(num_clients=3, exponent=1.0).split(list(range(110))).sizes().tolist())
        [20, 30, 60]
    """

    def __init__(
        self,
        num_clients: int,
        exponent: float,
        seed: int = 0,
        target_fn: Callable[[Any], Any] | None = None,
        min_size: int = 1,
    ) -> None:
        super().__init__(num_clients, seed, target_fn, min_size)
        if not (math.isfinite(exponent) and exponent >= 0):
            raise MisconfigurationException(
                f"Quantity expected exponent to be a finite number of at least 0, got {exponent!r}. "
                "Use exponent=0 for equal sizes, 1 for Zipf's law."
            )
        self.exponent = exponent

    def owners(self, num_examples: int, targets: NDArray[Any] | None, repair: bool) -> NDArray[np.int64]:
        ranks = self.generator("ranks").permutation(self.num_clients) + 1.0
        shares = ranks**-self.exponent
        counts = apportion(num_examples, shares)[:, None]
        if repair:
            top_up(counts, shares[:, None], self.min_size)
        sizes = counts[:, 0]
        return self.generator("examples").permutation(np.repeat(np.arange(self.num_clients, dtype=np.int64), sizes))
