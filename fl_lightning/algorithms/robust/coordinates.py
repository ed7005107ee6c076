"""Rules that treat every coordinate by itself: the median and the trimmed mean."""

from __future__ import annotations

import math

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fl_lightning.algorithms.base import OptimizerCallable, SchedulerCallable
from fl_lightning.algorithms.robust.base import RobustAlgorithm, count_of
from fl_lightning.algorithms.robust.cohort import Cohort, coordinate_median
from fl_lightning.callbacks.checks import is_number

__all__ = ["CoordinateMedian", "TrimmedMean"]


class CoordinateMedian(RobustAlgorithm):
    r"""The median of the updates, coordinate by coordinate.

    .. math:: w_{t+1} = w_t + \mathrm{med}(\delta_1, \dots, \delta_n)

    With an even number of clients it is the mean of the two middle values. Any minority of clients may send anything.

    Args:
        f: Byzantine clients that each cohort may contain; cohorts of fewer than ``2 f + 1`` are refused.
        server_optimizer: parameters to the server's torch optimizer; ``None`` is ``SGD(lr=1)``.
        server_lr_scheduler: optimizer to a learning-rate scheduler, stepped once a round.

    Raises:
        MisconfigurationException: for a cohort in which ``f`` clients are no minority.

    Example:
        >>> import torch
        >>> from fl_lightning.types import Contribution
        >>> sent = [Contribution({"delta": {"w": torch.tensor([x])}}, {"weight": 1.0}) for x in (1.0, 2.0, 1e9)]
        >>> CoordinateMedian(f=1).aggregate(Cohort("abc", sent))["w"].tolist()
        [2.0]

    References:
        Yin et al., *Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates*, 2018, option I of
        algorithm 1, on updates of several local steps instead of gradients.
    """

    def __init__(
        self,
        f: int = 0,
        server_optimizer: OptimizerCallable | None = None,
        server_lr_scheduler: SchedulerCallable | None = None,
    ) -> None:
        super().__init__(f, server_optimizer, server_lr_scheduler)

    def aggregate(self, cohort: Cohort) -> dict[str, Tensor]:
        return cohort.coordinatewise("delta", coordinate_median)


class TrimmedMean(RobustAlgorithm):
    r"""The mean of each coordinate without its :math:`b` smallest and :math:`b` largest values.

    .. math:: w_{t+1} = w_t + \frac{1}{n - 2b} \sum_{k=b+1}^{n-b} \delta_{(k)}

    Args:
        fraction: :math:`b = \lfloor \text{fraction} \cdot n \rfloor`, in [0, .5); 0 is the plain mean.
        f: :math:`b` itself, the Byzantine clients that each cohort may contain; give one of the two.
        server_optimizer: parameters to the server's torch optimizer; ``None`` is ``SGD(lr=1)``.
        server_lr_scheduler: optimizer to a learning-rate scheduler, stepped once a round.

    Raises:
        MisconfigurationException: for none or both of ``fraction`` and ``f``, for a cohort with ``2 f >= n``, or of
            which ``fraction`` would trim nobody.

    Example:
        >>> import torch
        >>> from fl_lightning.types import Contribution
        >>> sent = [Contribution({"delta": {"w": torch.tensor([x])}}, {"weight": 1.0}) for x in (1.0, 2.0, 3.0, 1e9)]
        >>> TrimmedMean(f=1).aggregate(Cohort("abcd", sent))["w"].tolist()
        [2.5]

    References:
        Yin et al., *Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates*, 2018, option II of
        algorithm 1, on updates of several local steps instead of gradients.
    """

    def __init__(
        self,
        fraction: float | None = None,
        f: int | None = None,
        server_optimizer: OptimizerCallable | None = None,
        server_lr_scheduler: SchedulerCallable | None = None,
    ) -> None:
        super().__init__(0, server_optimizer, server_lr_scheduler)
        if (fraction is None) == (f is None):
            raise MisconfigurationException(
                f"TrimmedMean expected one of fraction and f, got fraction={fraction!r} and f={f!r}. Write "
                "TrimmedMean(fraction=0.2) or TrimmedMean(f=2)."
            )
        if fraction is not None and (not is_number(fraction) or not 0 <= fraction < 0.5):
            raise MisconfigurationException(
                f"TrimmedMean expected fraction to be in [0, 0.5), got {fraction!r}. It is trimmed from both ends; "
                "CoordinateMedian() trims all but the middle."
            )
        self.fraction = fraction
        if f is not None:
            self.f = count_of(self, "f", f, 0)

    @property
    def fewest_clients(self) -> int:
        # from here on at least one is trimmed; below, the rule would be a mean that looks robust
        if not self.fraction:
            return super().fewest_clients
        near = round(1 / self.fraction)
        return next(count for count in range(max(1, near - 1), near + 3) if self._trimmed(count))

    def aggregate(self, cohort: Cohort) -> dict[str, Tensor]:
        count = len(cohort)
        trimmed = self.f if self.fraction is None else self._trimmed(count)

        def rule(rows: Tensor) -> Tensor:
            kept = rows.sort(dim=0).values[trimmed : count - trimmed]
            return kept.double().mean(dim=0).to(rows.dtype)

        return cohort.coordinatewise("delta", rule)

    def _trimmed(self, count: int) -> int:
        """Return the part of a cohort, rounded down; 1/161 of 161 is one, though their product is a bit less."""
        part = (self.fraction or 0.0) * count
        nearest = round(part)
        whole = nearest if math.isclose(part, nearest, rel_tol=1e-12) else math.floor(part)
        return min(whole, (count - 1) // 2)  # a fraction a bit below one half is still below it

    def _needs(self) -> str:
        return super()._needs() if self.fraction is None else f"with fraction={self.fraction} trims nobody of so few"

    def _instead(self) -> str:
        return super()._instead() if self.fraction is None else "trim a larger fraction"
