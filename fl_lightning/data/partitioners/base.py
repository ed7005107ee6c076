"""What every partitioner shares: the clients' ids, the checks, the minimum size and its repair."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fl_lightning.data.partition import Partition
from fl_lightning.data.targets import find_targets, num_examples
from fl_lightning.errors import MisconfigurationException
from fl_lightning.seeding import seed_for
from fl_lightning.types import ClientId

__all__ = ["Partitioner", "apportion", "require_positive", "top_up"]


class Partitioner(ABC):
    """Cuts a data set into clients ``0 … num_clients - 1``; every example belongs to exactly one of them.

    A subclass defines :meth:`owners`. The same partitioner cuts the training and the validation data: what a client
    prefers depends on the seed, the number of clients and the classes only, never on the data set's length, so that
    a client sees the same label distribution in both.

    Args:
        num_clients: number of clients, at least 1.
        seed: root of the partition; the same seed gives the same clients.
        target_fn: sample to label, for data sets whose labels are not found by convention
            (see :func:`fl_lightning.data.targets.find_targets`).
        min_size: examples that every client has at least, 1 or more.
    """

    needs_targets: ClassVar[bool] = False

    def __init__(
        self, num_clients: int, seed: int = 0, target_fn: Callable[[Any], Any] | None = None, min_size: int = 1
    ) -> None:
        require_positive(self, num_clients=num_clients, min_size=min_size)
        self.num_clients = num_clients
        self.seed = seed
        self.target_fn = target_fn
        self.min_size = min_size

    @property
    def client_ids(self) -> Sequence[ClientId] | None:
        """The ids of the clients, or ``None`` when the data name them."""
        return range(self.num_clients)

    @abstractmethod
    def owners(self, num_examples: int, targets: NDArray[Any] | None, repair: bool) -> NDArray[np.int64]:
        """Return for each example the client that owns it.

        Args:
            num_examples: length of the data set.
            targets: label of each example, given when ``needs_targets``.
            repair: whether clients below ``min_size`` are to be topped up.
        """

    def split(self, dataset: Any, allow_empty: bool = False, targets: NDArray[Any] | None = None) -> Partition:
        """Cut a data set.

        Args:
            dataset: a map-style data set.
            allow_empty: lifts the minimum size, for validation data: a client may then have none.
            targets: labels that were found before; looked up in the data set otherwise.

        Raises:
            MisconfigurationException: for a data set without labels where they are needed, with fewer than
                ``num_clients * min_size`` examples, or that cannot be indexed.
        """
        length = num_examples(dataset)
        if not allow_empty:
            self._require_enough(length)
        if self.needs_targets and targets is None:
            targets = self.find_targets(dataset)
        partition = Partition(range(self.num_clients), self.owners(length, targets, repair=not allow_empty))
        smallest = int(partition.sizes().min())
        if smallest < self.min_size and not allow_empty:
            raise MisconfigurationException(
                f"{self} leaves a client with {smallest} of {length} examples, fewer than min_size={self.min_size}. "
                "Use fewer clients, a smaller min_size, or more data."
            )
        return partition

    def find_targets(self, dataset: Any) -> NDArray[Any]:
        """Return the labels that this partitioner cuts by.

        Raises:
            MisconfigurationException: when there are none.
        """
        targets = find_targets(dataset, self.target_fn)
        if targets is None:
            raise MisconfigurationException(
                f"{self} cuts by label and found none in {type(dataset).__name__}: expected dataset.targets, .labels "
                "or .y, tuples that end with the label, or mappings with a 'label'. Pass target_fn=lambda sample: "
                "<label>, or use a partitioner that needs no labels (IID, Quantity)."
            )
        return targets

    def generator(self, purpose: str) -> np.random.Generator:
        """Return the random generator of one purpose of this partitioner."""
        return np.random.default_rng(seed_for(self.seed, -1, None, f"partition {type(self).__name__} {purpose}"))

    def __repr__(self) -> str:
        shown = {name: value for name, value in vars(self).items() if not name.startswith("_") and value is not None}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def _require_enough(self, length: int) -> None:
        if length < self.num_clients * self.min_size:
            raise MisconfigurationException(
                f"{self} needs at least {self.num_clients * self.min_size} examples "
                f"({self.num_clients} clients with min_size={self.min_size}), got {length}. "
                f"Use num_clients<={length // self.min_size}, a smaller min_size, or more data."
            )


def require_positive(owner: object, **numbers: int) -> None:
    """Raise unless every number is an ``int`` of at least 1.

    Raises:
        MisconfigurationException: names the argument.
    """
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise MisconfigurationException(
                f"{type(owner).__name__} expected {name} to be an integer of at least 1, got {value!r}."
            )


def apportion(total: int, shares: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    """Cut ``total`` into whole numbers that follow ``shares`` to within one.

    Args:
        total: what is cut.
        shares: non-negative, in any unit.

    Example:
        >>> apportion(10, np.array([0.5, 0.25, 0.25])).tolist()
        [5, 3, 2]
    """
    # rounding the running sum, not each share, keeps the total; adding .5 before the floor avoids banker's rounding
    cuts = np.floor(np.cumsum(shares) / shares.sum() * total + 0.5).astype(np.int64)
    cuts[-1] = total
    sizes: NDArray[np.int64] = np.diff(cuts, prepend=0)
    return sizes


def top_up(counts: NDArray[np.int64], preference: NDArray[np.floating[Any]], min_size: int) -> None:
    """Move single examples from the largest clients to those below ``min_size``, in place.

    A client gets, of the classes that the largest client has, the one that it prefers most, so that its label
    distribution stays as near to the drawn one as it can. Deterministic: ties go to the lowest number.

    Args:
        counts: examples ``(clients, classes)``, in all at least ``clients * min_size``.
        preference: ``(clients, classes)``, the larger the more wanted.
        min_size: rows that sum to less are topped up.

    Example:
        >>> counts = np.array([[5, 4], [0, 0]])
        >>> top_up(counts, np.array([[0.5, 0.5], [0.1, 0.9]]), min_size=2)
        >>> counts.tolist()
        [[5, 2], [0, 2]]
    """
    sizes = counts.sum(axis=1)
    for client in np.flatnonzero(sizes < min_size):
        while sizes[client] < min_size:
            donor = int(np.argmax(sizes))
            label = int(np.argmax(np.where(counts[donor] > 0, preference[client], -1.0)))
            counts[donor, label] -= 1
            counts[client, label] += 1
            sizes[donor] -= 1
            sizes[client] += 1
