"""Every client gets some public examples beside its own, so that clients see less different labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_lightning.data.partition import Partition
from fl_lightning.data.partitioners import Partitioner
from fl_lightning.data.samplers import ClientSubset
from fl_lightning.data.targets import num_examples
from fl_lightning.errors import MisconfigurationException
from fl_lightning.seeding import seed_for
from fl_lightning.types import ClientId

__all__ = ["SharedPartition", "SharedSubset"]


class SharedSubset(Partitioner):
    r"""Sets a public part of the training data aside, cuts the rest, and gives each client a share of the public part.

    A client with :math:`n_k` examples of its own at distance :math:`d_k` from everyone's labels, and :math:`m` public
    ones at distance :math:`d_G`, ends at

    .. math:: d_k' \le \frac{n_k d_k + m\, d_G}{n_k + m}

    where the public part looks like everyone's data (:math:`d_G \approx 0`), so the distance shrinks by about
    :math:`n_k / (n_k + m)`. ``FederatedDataModule.distance_to_global()`` shows it. The price is that these examples are
    no longer private. Validation data are cut by ``partitioner`` alone.

    Args:
        partitioner: cuts the rest among the clients.
        fraction: part of the training data that becomes public, in (0, 1); the paper takes up to .1.
        share: part of the public examples that each client gets, in (0, 1], drawn for each client by itself.
        seed: root of both draws.

    Raises:
        MisconfigurationException: for values out of range, or data too small for one public example.

    Example:
        >>> from fl_lightning.data.partitioners import IID
        >>> clients = SharedSubset(IID(num_clients=4), fraction=0.2).split(list(range(100)))
        >>> clients.sizes().tolist(), len(set(clients[0]) & set(clients[1]))  # 80 / 4 of their own, 20 public ones
        ([40, 40, 40, 40], 20)

    References:
        Zhao et al., *Federated Learning with Non-IID Data*, 2018, section 4.3: ``fraction`` is their :math:`\beta` over
        :math:`1 + \beta` (they count the public part beside the clients' data), ``share`` is their :math:`\alpha`.
        Their public part is uniform over classes and also warms up the model; here it is a random sample.
    """

    def __init__(self, partitioner: Partitioner, fraction: float = 0.05, share: float = 1.0, seed: int = 0) -> None:
        if not isinstance(partitioner, Partitioner):
            raise MisconfigurationException(
                f"SharedSubset expected a partitioner, got {type(partitioner).__name__}. Write "
                "SharedSubset(Dirichlet(num_clients=100, alpha=0.3), fraction=0.05)."
            )
        if isinstance(fraction, bool) or not 0 < fraction < 1:
            raise MisconfigurationException(
                f"SharedSubset expected fraction in (0, 1), got {fraction!r}. Use the partitioner itself to share "
                "nothing."
            )
        if isinstance(share, bool) or not 0 < share <= 1:
            raise MisconfigurationException(f"SharedSubset expected share in (0, 1], got {share!r}. Use 1 for all.")
        self.partitioner = partitioner
        self.fraction = fraction
        self.share = share
        self.seed = seed
        self.target_fn = partitioner.target_fn
        self.needs_targets = partitioner.needs_targets  # type: ignore[misc]  # of the class, elsewhere

    @property
    def client_ids(self) -> Sequence[ClientId] | None:
        return self.partitioner.client_ids

    def owners(self, num_examples: int, targets: NDArray[Any] | None, repair: bool) -> NDArray[np.int64]:
        return self.partitioner.owners(num_examples, targets, repair)

    def find_targets(self, dataset: Any) -> NDArray[Any]:
        return self.partitioner.find_targets(dataset)

    def split(self, dataset: Any, allow_empty: bool = False, targets: NDArray[Any] | None = None) -> Partition:
        """Cut a data set; validation data (``allow_empty``) have no public part."""
        if allow_empty:
            return self.partitioner.split(dataset, allow_empty, targets)
        length = num_examples(dataset)
        count = round(self.fraction * length)
        if not 0 < count < length:
            raise MisconfigurationException(
                f"{self} makes {count} of {length} examples public. Use another fraction, or more data."
            )
        draw = np.random.default_rng(seed_for(self.seed, -1, None, "shared subset"))
        order = draw.permutation(length)
        public, rest = np.sort(order[:count]), np.sort(order[count:])
        if self.needs_targets and targets is None:
            targets = self.find_targets(dataset)
        own = self.partitioner.split(
            ClientSubset(dataset, rest), targets=None if targets is None else np.asarray(targets)[rest]
        )
        return SharedPartition(own, rest, public, length, self.share, self.seed)


class SharedPartition(Partition):
    """A partition whose clients also hold public examples.

    Args:
        own: of the private examples.
        private: positions of the private examples in the data set.
        public: positions of the public ones.
        num_examples: length of the data set.
        share: part of the public examples that each client gets.
        seed: root of the clients' draws.

    Example:
        >>> own = Partition(["a", "b"], np.array([0, 1, 1]))
        >>> shared = SharedPartition(own, np.array([0, 2, 4]), np.array([1, 3]), num_examples=5, share=1.0, seed=0)
        >>> shared["a"].tolist(), shared["b"].tolist(), shared.own("b").tolist()
        ([0, 1, 3], [1, 2, 3, 4], [2, 4])
    """

    def __init__(
        self,
        own: Partition,
        private: NDArray[np.int64],
        public: NDArray[np.int64],
        num_examples: int,
        share: float,
        seed: int,
    ) -> None:
        owners = np.full(num_examples, -1, dtype=np.int64)
        owners[private[own._order]] = np.repeat(np.arange(len(own)), own.sizes())
        super().__init__(own.client_ids, owners)
        self.public = public
        self._count = max(1, round(share * len(public)))
        self._seed = seed

    def own(self, client_id: ClientId) -> NDArray[np.int64]:
        """Return the client's private examples."""
        return super().__getitem__(client_id)

    def shared(self, client_id: ClientId) -> NDArray[np.int64]:
        """Return the public examples that the client gets."""
        if self._count == len(self.public):
            return self.public
        draw = np.random.default_rng(seed_for(self._seed, -1, client_id, "share of the public examples"))
        return draw.choice(self.public, self._count, replace=False)

    def __getitem__(self, client_id: ClientId) -> NDArray[np.int64]:
        return np.sort(np.concatenate([self.own(client_id), self.shared(client_id)]))

    def size(self, client_id: ClientId) -> int:
        return super().size(client_id) + self._count

    def sizes(self) -> NDArray[np.int64]:
        return super().sizes() + self._count
