"""How devices are at one moment: what eligibility is decided by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fl_lightning.types import ClientId

__all__ = ["Conditions"]


@dataclass(frozen=True, slots=True)
class Conditions:
    """Some devices at one moment of the virtual clock.

    Args:
        client_ids: the devices.
        at: seconds on the clock.
        online: whether each can be reached.
        battery: level in [0, 1].
        charging: whether it is on the charger.
        idle: whether its owner leaves it alone.
        quality: of the network, in [0, 1].
        metered: whether bytes cost its owner money.
        memory_gb: memory in GB.
        local_hour: time of day where it is, in [0, 24).

    Shape:
        every array ``(clients,)``
    """

    client_ids: Sequence[ClientId]
    at: float
    online: NDArray[np.bool_]
    battery: NDArray[np.float64]
    charging: NDArray[np.bool_]
    idle: NDArray[np.bool_]
    quality: NDArray[np.float64]
    metered: NDArray[np.bool_]
    memory_gb: NDArray[np.float64]
    local_hour: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.online)
