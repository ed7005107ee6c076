"""Krum and Multi-Krum: the updates that have the nearest neighbours."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fl_lightning.algorithms.base import OptimizerCallable, SchedulerCallable
from fl_lightning.algorithms.robust.base import RobustAlgorithm, count_of
from fl_lightning.algorithms.robust.cohort import Cohort

__all__ = ["Krum", "MultiKrum", "krum_scores", "squared_distances"]


class Krum(RobustAlgorithm):
    r"""The update whose neighbours are nearest.

    .. math:: w_{t+1} = w_t + \delta_{k^*}, \qquad
        k^* = \arg\min_k \sum_{j \in N_k} \lVert \delta_k - \delta_j \rVert^2

    with the :math:`n - f - 2` nearest other updates :math:`N_k`. Equal scores go to the first client. One update is
    noisier than a mean; :class:`MultiKrum` averages the best ones.

    Args:
        f: Byzantine clients that each cohort may contain, >= 0; cohorts of fewer than ``2 f + 3`` are refused.
        server_optimizer: parameters to the server's torch optimizer; ``None`` is ``SGD(lr=1)``.
        server_lr_scheduler: optimizer to a learning-rate scheduler, stepped once a round.

    Raises:
        MisconfigurationException: for ``f < 0``, or a cohort of fewer than ``2 f + 3`` clients.

    Example:
        >>> from fl_lightning.types import Contribution
        >>> deltas = [{"w": torch.tensor([x])} for x in (0.0, 2.0, 3.0, 5.0, 1e9)]
        >>> sent = [Contribution({"delta": delta}, {"weight": 1.0}) for delta in deltas]
        >>> Krum(f=1).aggregate(Cohort("abcde", sent))["w"].tolist()
        [2.0]

    References:
        Blanchard et al., *Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent*, 2017, section 4, on
        updates of several local steps instead of gradients.
    """

    def __init__(
        self,
        f: int,
        server_optimizer: OptimizerCallable | None = None,
        server_lr_scheduler: SchedulerCallable | None = None,
    ) -> None:
        super().__init__(f, server_optimizer, server_lr_scheduler)

    @property
    def fewest_clients(self) -> int:
        return 2 * self.f + 3

    def num_selected(self, num_clients: int) -> int:
        """Return how many updates of a cohort are averaged."""
        return 1

    def aggregate(self, cohort: Cohort) -> dict[str, Tensor]:
        scores = krum_scores(squared_distances(cohort), self.f)
        count = self.num_selected(len(cohort))
        best = torch.sort(scores, stable=True).indices[:count]
        shares = torch.zeros(len(cohort), dtype=torch.float64)
        shares[best] = 1.0 / count
        return cohort.mixture("delta", shares)

    def _needs(self) -> str:
        return f"with f={self.f} needs 2 f + 3 clients"


class MultiKrum(Krum):
    r"""The mean of the :math:`m` updates with the lowest scores of :class:`Krum`.

    .. math:: w_{t+1} = w_t + \frac{1}{m} \sum_{k \in B} \delta_k

    Args:
        f: Byzantine clients that each cohort may contain, >= 0; cohorts of fewer than ``2 f + 3`` are refused.
        m: updates that are averaged, from 1 to ``n - f - 2``; ``None`` takes as many as that.
        server_optimizer: parameters to the server's torch optimizer; ``None`` is ``SGD(lr=1)``.
        server_lr_scheduler: optimizer to a learning-rate scheduler, stepped once a round.

    Raises:
        MisconfigurationException: for values out of range, or a cohort of fewer than ``2 f + 3`` or ``m + f + 2``.

    Example:
        >>> from fl_lightning.types import Contribution
        >>> deltas = [{"w": torch.tensor([x])} for x in (0.0, 2.0, 3.0, 5.0, 1e9)]
        >>> sent = [Contribution({"delta": delta}, {"weight": 1.0}) for delta in deltas]
        >>> MultiKrum(f=1).aggregate(Cohort("abcde", sent))["w"].tolist()
        [2.5]

    References:
        Blanchard et al., *Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent*, 2017, section 5; the
        bound on ``m`` is El Mhamdi et al.'s, *The Hidden Vulnerability of Distributed Learning in Byzantium*, 2018.
    """

    def __init__(
        self,
        f: int,
        m: int | None = None,
        server_optimizer: OptimizerCallable | None = None,
        server_lr_scheduler: SchedulerCallable | None = None,
    ) -> None:
        super().__init__(f, server_optimizer, server_lr_scheduler)
        self.m = m if m is None else count_of(self, "m", m, 1)

    @property
    def fewest_clients(self) -> int:
        return max(super().fewest_clients, 0 if self.m is None else self.m + self.f + 2)

    def num_selected(self, num_clients: int) -> int:
        return num_clients - self.f - 2 if self.m is None else self.m

    def _needs(self) -> str:
        return super()._needs() if self.m is None else f"with f={self.f} and m={self.m} needs 2 f + 3 and m + f + 2"


def squared_distances(cohort: Cohort) -> Tensor:
    """Return the squared distance of every two updates.

    Differences are squared, not expanded into inner products: a huge update would blur the distances of the others.

    Shape:
        ``(clients, clients)``, double precision, on the CPU
    """
    total = torch.zeros(len(cohort), len(cohort), dtype=torch.float64)
    for block in cohort.blocks("delta"):
        rows = block.rows.cpu().double()
        total += torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
    return total


def krum_scores(squared: Tensor, f: int) -> Tensor:
    """Return the sum of squared distances from each update to its ``n - f - 2`` nearest others.

    Args:
        squared: squared distances of every two updates.
        f: Byzantine clients.

    Raises:
        MisconfigurationException: when nobody is left to be a neighbour.

    Shape:
        ``(clients, clients)`` to ``(clients,)``

    Example:
        >>> points = torch.tensor([[0.0], [1.0], [3.0]])
        >>> krum_scores(torch.cdist(points, points).square(), f=0).tolist()
        [1.0, 1.0, 4.0]
    """
    count = len(squared)
    neighbours = count - f - 2
    if neighbours < 1:
        raise MisconfigurationException(
            f"Krum's scores with f={f} need at least {f + 3} updates, got {count}. Use more clients, or a smaller f."
        )
    # the diagonal is every update's distance to itself, which does not count
    others = squared + torch.diag(torch.full((count,), float("inf"), dtype=squared.dtype))
    return others.sort(dim=1).values[:, :neighbours].sum(dim=1)
