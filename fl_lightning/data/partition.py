"""Which examples belong to which client: one permutation and its cuts, however many clients there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fl_lightning.errors import MisconfigurationException
from fl_lightning.types import ClientId

__all__ = ["Partition", "label_counts", "total_variation"]


class Partition(Mapping[ClientId, NDArray[np.int64]]):
    """``{client id: indices of its examples, ascending}``; an item is a view, nothing is copied.

    Args:
        client_ids: the clients.
        owners: for each example the position of its client in ``client_ids``; -1 for an example that no client has.

    Example:
        >>> partition = Partition(["a", "b"], np.array([1, 0, 1]))
        >>> partition["b"].tolist(), partition.size("a")
        ([0, 2], 1)
    """

    def __init__(self, client_ids: Sequence[ClientId], owners: NDArray[np.int64]) -> None:
        self.client_ids = client_ids
        order = np.argsort(owners, kind="stable").astype(np.int64, copy=False)
        counts = np.bincount(owners[owners >= 0], minlength=len(client_ids))
        self._order = order[len(order) - int(counts.sum()) :]
        self._offsets = np.concatenate([[0], np.cumsum(counts)])
        # a range finds a position by itself; a dictionary of a million integers would cost 100 MB
        self._positions = None if isinstance(client_ids, range) else {name: i for i, name in enumerate(client_ids)}

    def __getitem__(self, client_id: ClientId) -> NDArray[np.int64]:
        position = self._position(client_id)
        return self._order[self._offsets[position] : self._offsets[position + 1]]

    def __iter__(self) -> Iterator[ClientId]:
        return iter(self.client_ids)

    def __len__(self) -> int:
        return len(self.client_ids)

    def __contains__(self, client_id: object) -> bool:
        if isinstance(client_id, bool) or not isinstance(client_id, str | int):
            return False
        return client_id in (self.client_ids if self._positions is None else self._positions)

    def size(self, client_id: ClientId) -> int:
        """Return the number of the client's examples."""
        position = self._position(client_id)
        return int(self._offsets[position + 1] - self._offsets[position])

    def sizes(self) -> NDArray[np.int64]:
        """Return the number of examples of every client, in the order of the ids."""
        return np.diff(self._offsets)

    def _position(self, client_id: ClientId) -> int:
        if client_id not in self:
            raise MisconfigurationException(
                f"Expected the id of one of {len(self)} clients ({_some(self.client_ids)}), got {client_id!r}. "
                "Take ids from client_ids(); 1 and '1' are different clients."
            )
        if self._positions is None:
            return self.client_ids.index(client_id)
        return self._positions[client_id]


def label_counts(
    partition: Partition, labels: NDArray[np.int64], num_classes: int, client_ids: Sequence[ClientId]
) -> NDArray[np.int64]:
    """Return how many examples of each class each of ``client_ids`` has.

    Args:
        partition: of the data set that the labels belong to.
        labels: classes as integers in ``[0, num_classes)``.
        num_classes: number of classes.
        client_ids: the rows.

    Shape:
        ``(clients, classes)``

    Example:
        >>> label_counts(Partition(range(2), np.array([0, 0, 1])), np.array([1, 1, 0]), 2, [0, 1]).tolist()
        [[0, 2], [1, 0]]
    """
    counts = np.zeros((len(client_ids), num_classes), dtype=np.int64)
    for row, client_id in enumerate(client_ids):
        counts[row] = np.bincount(labels[partition[client_id]], minlength=num_classes)
    return counts


def total_variation(counts: NDArray[np.int64], total: NDArray[np.int64]) -> NDArray[np.float64]:
    r"""Return how far the labels of each client are from the labels of everyone.

    .. math:: d_i = \tfrac12 \sum_c |p_i(c) - p(c)|

    Args:
        counts: label counts ``(clients, classes)``; a client without examples is at distance 0.
        total: label counts of everyone ``(classes,)``.

    Returns:
        Distances in ``[0, 1]``: 0 for the same distribution, near 1 for labels that hardly anyone else has.

    Shape:
        ``(clients,)``

    Example:
        >>> total_variation(np.array([[5, 5], [10, 0]]), np.array([100, 100])).tolist()
        [0.0, 0.5]
    """
    sizes = counts.sum(axis=1, keepdims=True)
    local = counts / np.maximum(sizes, 1)
    distances = 0.5 * np.abs(local - total / max(int(total.sum()), 1)).sum(axis=1)
    return np.where(sizes[:, 0] > 0, distances, 0.0).astype(np.float64)


def _some(client_ids: Sequence[ClientId]) -> str:
    shown = ", ".join(repr(client_id) for client_id in client_ids[:3])
    return f"{shown}, …" if len(client_ids) > 3 else shown
