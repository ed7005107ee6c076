"""Norm clipping: no client moves the model further than an honest one would."""

from __future__ import annotations

import torch
from torch import Tensor

from fl_lightning.algorithms.base import OptimizerCallable, SchedulerCallable, Weights
from fl_lightning.algorithms.robust.base import RobustAlgorithm, shares_of
from fl_lightning.algorithms.robust.cohort import Cohort
from fl_lightning.callbacks.checks import positive

__all__ = ["NormClipping", "norms"]


class NormClipping(RobustAlgorithm):
    r"""The mean of updates that the server has clipped.

    .. math:: w_{t+1} = w_t + \sum_k p_k\, \delta_k \min\Bigl(1, \frac{M}{\lVert \delta_k \rVert}\Bigr)

    It bounds what a scaled update can do (model replacement), and is otherwise a mean: attackers of ordinary size that
    agree still pull it. Unlike clipping on the client it does not trust the client.

    Args:
        max_norm: :math:`M` > 0, in units of the norm of an update.
        weights: :math:`p_k` before they are scaled to sum to one: ``"uniform"``, ``"examples"``, or a callable.
        server_optimizer: parameters to the server's torch optimizer; ``None`` is ``SGD(lr=1)``.
        server_lr_scheduler: optimizer to a learning-rate scheduler, stepped once a round.

    Raises:
        MisconfigurationException: for ``max_norm <= 0``.

    Example:
        >>> from fl_lightning.types import Contribution
        >>> sent = [Contribution({"delta": {"w": torch.tensor([x])}}, {"weight": 1.0}) for x in (1.0, -1.0, 1e9)]
        >>> NormClipping(max_norm=3.0).aggregate(Cohort("abc", sent))["w"].tolist()
        [1.0]

    References:
        Sun et al., *Can You Really Backdoor Federated Learning?*, 2019, section 4, without the noise.
    """

    def __init__(
        self,
        max_norm: float,
        weights: Weights = "uniform",
        server_optimizer: OptimizerCallable | None = None,
        server_lr_scheduler: SchedulerCallable | None = None,
    ) -> None:
        super().__init__(0, server_optimizer, server_lr_scheduler, weights)
        self.max_norm = positive("NormClipping", "max_norm", max_norm)

    def aggregate(self, cohort: Cohort) -> dict[str, Tensor]:
        shares = torch.tensor(shares_of(self, cohort), dtype=torch.float64)
        return cohort.mixture("delta", shares * (self.max_norm / norms(cohort)).clamp_max(1.0))


def norms(cohort: Cohort) -> Tensor:
    """Return the norm of every update.

    Shape:
        ``(clients,)``, double precision, on the CPU
    """
    squares = torch.zeros(len(cohort), dtype=torch.float64)
    for block in cohort.blocks("delta"):
        squares += block.rows.cpu().double().square().sum(dim=1)
    return squares.sqrt()
