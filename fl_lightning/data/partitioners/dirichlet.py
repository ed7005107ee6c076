"""Label skew: each class is spread over the clients by a draw from a Dirichlet distribution."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_lightning.data.partitioners.base import Partitioner, apportion, top_up
from fl_lightning.errors import MisconfigurationException
from fl_lightning.seeding import seed_for

__all__ = ["Dirichlet"]


class Dirichlet(Partitioner):
    r"""Non-IID clients whose labels and sizes are both skewed.

    .. math:: p_c \sim \mathrm{Dir}_N(\alpha), \qquad n_{ic} \approx p_{ci}\, n_c

    for client :math:`i` of :math:`N` and class :math:`c` with :math:`n_c` examples. The smaller ``alpha``, the fewer
    clients share a class: 100 is nearly IID, 0.1 leaves most clients with one or two classes.

    A draw is a function of the seed, the number of clients and the class's own label, so validation data that go
    through the same partitioner give each client the same distribution, also when a class is missing in them.
    Clients below ``min_size`` are not drawn again (another draw would depend on the data); they are topped up one
    example at a time from the largest clients, with the classes that they prefer.

    Args:
        num_clients: number of clients, at least 1.
        alpha: concentration, above 0.
        seed: root of the partition.
        target_fn: sample to label, for labels that are not found by convention.
        min_size: examples that every client has at least.

    Raises:
        MisconfigurationException: for an ``alpha`` that is not a positive number, and see :meth:`split`.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.zeros(1000, 1), torch.arange(1000) % 10)
        >>> clients = Dirichlet(num_clients=20, alpha=0.1, min_size=5).split(data)
        >>> int(clients.sizes().sum()), int(clients.sizes().min())
        (1000, 5)

    References:
        Yurochkin et al., "Bayesian Nonparametric Federated Learning of Neural Networks", ICML 2019. Hsu et al. (2019)
        draw a distribution over classes for each client instead, which keeps the sizes equal.
    """

    needs_targets = True

    def __init__(
        self,
        num_clients: int,
        alpha: float,
        seed: int = 0,
        target_fn: Callable[[Any], Any] | None = None,
        min_size: int = 1,
    ) -> None:
        super().__init__(num_clients, seed, target_fn, min_size)
        if not (math.isfinite(alpha) and alpha > 0):
            raise MisconfigurationException(
                f"Dirichlet expected alpha to be a finite number above 0, got {alpha!r}. "
                "Use 0.1 for strong and 1.0 for mild label skew, or IID(num_clients) for none."
            )
        self.alpha = alpha

    def proportions(self, label: int | str) -> NDArray[np.float64]:
        """Return the share of one class that each client gets.

        Shape:
            ``(clients,)``, summing to 1.
        """
        generator = self._class_generator(label, "proportions")
        return generator.dirichlet(np.full(self.num_clients, self.alpha))

    def owners(self, num_examples: int, targets: NDArray[Any] | None, repair: bool) -> NDArray[np.int64]:
        assert targets is not None  # `split` fetched them: needs_targets
        classes, labels = np.unique(targets, return_inverse=True)
        owners = np.empty(num_examples, dtype=np.int64)
        if num_examples == 0:
            return owners
        shares = np.stack([self.proportions(label) for label in classes.tolist()], axis=1)  # (clients, classes)
        totals = np.bincount(labels)
        counts = np.stack([apportion(int(n), shares[:, c]) for c, n in enumerate(totals)], axis=1)
        if repair:
            top_up(counts, shares, self.min_size)
        for number, label in enumerate(classes.tolist()):
            examples = self._class_generator(label, "examples").permutation(np.flatnonzero(labels == number))
            owners[examples] = np.repeat(np.arange(self.num_clients), counts[:, number])
        return owners

    def _class_generator(self, label: int | str, purpose: str) -> np.random.Generator:
        return np.random.default_rng(seed_for(self.seed, -1, label, f"partition Dirichlet {purpose}"))
