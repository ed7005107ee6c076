"""RFA: the geometric median of the updates."""

from __future__ import annotations

import torch
from torch import Tensor

from fl_lightning.algorithms.base import OptimizerCallable, SchedulerCallable, Weights
from fl_lightning.algorithms.robust.base import RobustAlgorithm, count_of, shares_of
from fl_lightning.algorithms.robust.cohort import Cohort
from fl_lightning.callbacks.checks import positive

__all__ = ["GeometricMedian", "embedded", "weiszfeld"]


class GeometricMedian(RobustAlgorithm):
    r"""The point with the least sum of distances to the updates (RFA).

    .. math:: w_{t+1} = w_t + \arg\min_v \sum_k p_k \lVert v - \delta_k \rVert

    found by the smoothed Weiszfeld iteration :math:`v \leftarrow \sum_k \beta_k \delta_k / \sum_k \beta_k` with
    :math:`\beta_k = p_k / \max(\nu, \lVert v - \delta_k \rVert)`. Unlike a median by coordinates it does not depend on
    the axes, and with clients that agree it is near their mean.

    :math:`n` updates of any dimension lie in a space of :math:`n` dimensions. One pass over the tensors finds the
    updates' coordinates there (a QR decomposition, block by block), the iteration runs on those to convergence, and a
    second pass mixes the updates.

    Args:
        f: Byzantine clients that each cohort may contain; cohorts of fewer than ``2 f + 1`` are refused.
        smoothing: :math:`\nu` > 0, in units of the norm of an update.
        max_iterations: of the inner iteration, at least 1; the paper's experiments take 3.
        tolerance: relative change of the objective at which the iteration stops, > 0.
        weights: :math:`p_k`: ``"uniform"``, ``"examples"`` as in the paper, or a callable ``ClientUpdate -> float``.
        server_optimizer: parameters to the server's torch optimizer; ``None`` is ``SGD(lr=1)``.
        server_lr_scheduler: optimizer to a learning-rate scheduler, stepped once a round.

    Raises:
        MisconfigurationException: for values out of range, or a cohort in which ``f`` clients are no minority.

    Example:
        >>> from fl_lightning.types import Contribution
        >>> corners = [(0.0, 0.0), (2.0, 0.0), (0.0, 2.0), (2.0, 2.0), (1e6, 1e6)]
        >>> sent = [Contribution({"delta": {"w": torch.tensor(c)}}, {"weight": 1.0}) for c in corners]
        >>> GeometricMedian().aggregate(Cohort("abcde", sent))["w"].norm() < 3  # their mean is at 283,000
        tensor(True)

    References:
        Pillutla et al., *Robust Aggregation for Federated Learning*, 2022, algorithm 2. The paper computes the weighted
        means of the iteration by secure aggregation; here the server sees the updates.
    """

    def __init__(
        self,
        f: int = 0,
        smoothing: float = 1e-6,
        max_iterations: int = 1000,
        tolerance: float = 1e-12,
        weights: Weights = "uniform",
        server_optimizer: OptimizerCallable | None = None,
        server_lr_scheduler: SchedulerCallable | None = None,
    ) -> None:
        super().__init__(f, server_optimizer, server_lr_scheduler, weights)
        self.smoothing = positive("GeometricMedian", "smoothing", smoothing)
        self.max_iterations = count_of(self, "max_iterations", max_iterations, 1)
        self.tolerance = positive("GeometricMedian", "tolerance", tolerance)

    def aggregate(self, cohort: Cohort) -> dict[str, Tensor]:
        shares = torch.tensor(shares_of(self, cohort), dtype=torch.float64)
        mixing = weiszfeld(embedded(cohort), shares, self.smoothing, self.max_iterations, self.tolerance)
        return cohort.mixture("delta", mixing)


def embedded(cohort: Cohort) -> Tensor:
    r"""Return points with the inner products of the updates, in as few dimensions as there are clients.

    The matrix of all updates as columns is :math:`QR` with orthonormal :math:`Q`, so the columns of :math:`R` will do.
    Householder's reflections keep the relative precision of each column: an update of norm 1e9 does not blur the
    others, as it would in a matrix of inner products.

    Shape:
        ``(clients, dimensions)``, double precision, on the CPU
    """
    triangle = torch.zeros(0, len(cohort), dtype=torch.float64)
    for block in cohort.blocks("delta"):
        columns = block.rows.cpu().double().T  # some accelerators have neither doubles nor QR
        triangle = torch.linalg.qr(torch.cat([triangle, columns]), mode="r").R
    return triangle.T.contiguous()


def weiszfeld(points: Tensor, shares: Tensor, smoothing: float, max_iterations: int, tolerance: float) -> Tensor:
    """Return the shares of the points in their geometric median.

    Args:
        points: of the clients.
        shares: weights of the points, summing to one.
        smoothing: least distance.
        max_iterations: at most.
        tolerance: relative change of the objective at which to stop.

    Shape:
        points ``(clients, dimensions)``, shares ``(clients,)``, result ``(clients,)`` summing to one

    Example:
        >>> line = torch.tensor([[0.0], [1.0], [50.0]], dtype=torch.float64)  # on a line it is the median
        >>> mixing = weiszfeld(line, torch.full((3,), 1 / 3, dtype=torch.float64), 1e-9, 1000, 1e-15)
        >>> round(float(mixing @ line[:, 0]), 6)
        1.0
    """
    mixing, objective = shares, float("inf")
    for _ in range(max_iterations):
        distances = torch.linalg.vector_norm(points - mixing @ points, dim=1)
        before, objective = objective, float(shares @ distances)
        if abs(before - objective) <= tolerance * objective:
            break
        pull = shares / distances.clamp_min(smoothing)
        mixing = pull / pull.sum()
    return mixing
