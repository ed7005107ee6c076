"""The non-IID split of the FedAvg paper: sort by label, cut into shards, deal the shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_lightning.data.partitioners.base import Partitioner, require_positive
from fl_lightning.errors import MisconfigurationException

__all__ = ["Shards"]


class Shards(Partitioner):
    """Sort by label, cut into ``num_clients * per_client`` equal shards, deal ``per_client`` to each client.

    With two shards of MNIST most clients see two digits. Shards of one data set differ by at most one example. Which
    client gets which shard depends on the seed and the number of shards only, so validation data with the same class
    balance give each client the same labels.

    Args:
        num_clients: number of clients, at least 1.
        per_client: shards of each client, at least 1.
        seed: root of the partition.
        target_fn: sample to label, for labels that are not found by convention.
        min_size: examples that every client has at least. Sizes are equal, so this cannot be mended and is checked.

    Raises:
        MisconfigurationException: when there are fewer examples than shards, and see :meth:`split`.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> labels = torch.arange(600) % 10
        >>> clients = Shards(num_clients=10).split(TensorDataset(torch.zeros(600, 1), labels))
        >>> {len(labels[indices].unique()) <= 2 for indices in clients.values()}, set(clients.sizes().tolist())
        ({True}, {60})

    References:
        McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
        section 3.
    """

    needs_targets = True

    def __init__(
        self,
        num_clients: int,
        per_client: int = 2,
        seed: int = 0,
        target_fn: Callable[[Any], Any] | None = None,
        min_size: int = 1,
    ) -> None:
        super().__init__(num_clients, seed, target_fn, min_size)
        require_positive(self, per_client=per_client)
        self.per_client = per_client

    def owners(self, num_examples: int, targets: NDArray[Any] | None, repair: bool) -> NDArray[np.int64]:
        assert targets is not None  # `split` fetched them: needs_targets
        num_shards = self.num_clients * self.per_client
        if repair and num_examples < num_shards:
            raise MisconfigurationException(
                f"{self} cuts {num_shards} shards, got {num_examples} examples. "
                "Use fewer clients, a smaller per_client, or more data."
            )
        # equal labels in random order, so that a shard is no run of neighbours in the file
        ties = self.generator("examples").permutation(num_examples)
        by_label = np.lexsort((ties, targets))
        owner_of_shard = self.generator("shards").permutation(num_shards) // self.per_client
        owners = np.empty(num_examples, dtype=np.int64)
        owners[by_label] = owner_of_shard[np.arange(num_examples) * num_shards // max(num_examples, 1)]
        return owners
