"""How much an update counts that was made from an old model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fl_lightning.callbacks.checks import non_negative, positive
from fl_lightning.types import ClientId

__all__ = ["Staleness", "StalenessWeight"]

Staleness: TypeAlias = Literal["constant", "polynomial", "hinge"] | Callable[[int], float]


class StalenessWeight:
    r"""The factor :math:`s(\tau)` of an update that is :math:`\tau` rounds old.

    ==============  =======================================================================================
    ``constant``    :math:`1`
    ``polynomial``  :math:`(1 + \tau)^{-a}`
    ``hinge``       :math:`1` for :math:`\tau \le b`, else :math:`1 / (a\,(\tau - b) + 1)`
    a callable      what it returns for :math:`\tau`
    ==============  =======================================================================================

    Args:
        owner: the algorithm, for errors.
        kind: one of the above.
        exponent: :math:`a` of the polynomial, >= 0.
        hinge_slope: :math:`a` of the hinge, > 0.
        hinge_delay: :math:`b` of the hinge, in rounds, >= 0.

    Raises:
        MisconfigurationException: for another kind, or a number out of range.

    Example:
        >>> [round(StalenessWeight("FedBuff", "polynomial")(age), 3) for age in (0, 3, 8)]
        [1.0, 0.5, 0.333]
        >>> [StalenessWeight("FedAsync", "hinge", hinge_slope=1.0, hinge_delay=2)(age) for age in (2, 3, 5)]
        [1.0, 0.5, 0.25]

    References:
        Xie et al., *Asynchronous Federated Optimization*, 2019, section 5.2.
    """

    def __init__(
        self,
        owner: str,
        kind: Staleness,
        exponent: float = 0.5,
        hinge_slope: float = 10.0,
        hinge_delay: float = 4.0,
    ) -> None:
        if not callable(kind) and kind not in ("constant", "polynomial", "hinge"):
            raise MisconfigurationException(
                f"{owner} expected staleness='constant', 'polynomial', 'hinge' or a callable on the number of rounds, "
                f"got {kind!r}."
            )
        self.owner, self.kind = owner, kind
        self.exponent = non_negative(owner, "exponent", exponent, "0 weighs old updates like new ones")
        self.hinge_slope = positive(owner, "hinge_slope", hinge_slope)
        self.hinge_delay = non_negative(owner, "hinge_delay", hinge_delay)

    def __call__(self, staleness: int, client_id: ClientId | None = None) -> float:
        """Return the factor of an update that is so many rounds old.

        Args:
            staleness: rounds.
            client_id: whose update it is, for errors.

        Raises:
            MisconfigurationException: names the function and the client, when it raises or returns no number.
        """
        if callable(self.kind):
            return self._called(self.kind, staleness, client_id)
        if self.kind == "polynomial":
            return float((1.0 + staleness) ** -self.exponent)
        if self.kind == "hinge" and staleness > self.hinge_delay:
            return 1.0 / (self.hinge_slope * (staleness - self.hinge_delay) + 1.0)
        return 1.0

    def _called(self, function: Callable[[int], float], staleness: int, client_id: ClientId | None) -> float:
        name = getattr(function, "__name__", type(function).__name__)
        whose = "" if client_id is None else f" for client {client_id!r}"
        try:
            given: Any = function(staleness)
        except Exception as error:
            raise MisconfigurationException(
                f"{self.owner}(staleness={name}) raised {error!r} at {staleness} rounds{whose}. It gets a count of "
                "rounds, and returns a number; mend it."
            ) from error
        try:
            factor = math.nan if isinstance(given, str) else float(given)
        except (TypeError, ValueError):
            factor = math.nan
        if not 0 <= factor < math.inf:
            raise MisconfigurationException(
                f"{self.owner}(staleness={name}) expected to return a finite number >= 0 at {staleness} rounds{whose}, "
                f"got {given!r}."
            )
        return factor
