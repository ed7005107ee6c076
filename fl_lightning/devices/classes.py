"""Slow, medium and fast devices: who takes part, and whom the model serves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fl_lightning.devices.fleet import DeviceFleet
from fl_lightning.types import ClientId

__all__ = ["CLASSES", "DeviceClasses"]

CLASSES = ("slow", "medium", "fast")
_LOOKED_AT = 999
"""Devices from which the thirds of a population are estimated, evenly over its ids."""


class DeviceClasses:
    """The thirds of a population by the speed of its devices.

    Args:
        fleet: the devices.
        client_ids: the population; at most 999 of them are looked at, evenly.

    Example:
        >>> classes = DeviceClasses(DeviceFleet(speed=lambda client_id: 1.0 + client_id), range(9))
        >>> classes.of([0, 4, 8])
        ['slow', 'medium', 'fast']
    """

    def __init__(self, fleet: DeviceFleet, client_ids: Sequence[ClientId]) -> None:
        self.fleet = fleet
        step = max(1, -(-len(client_ids) // _LOOKED_AT))
        speeds = fleet.values("speed", client_ids[::step])
        self.bounds = np.quantile(speeds, [1 / 3, 2 / 3])

    def of(self, client_ids: Sequence[ClientId]) -> list[str]:
        """Return the class of some devices; all are medium in a fleet of equals."""
        speeds = self.fleet.values("speed", client_ids)
        low, high = self.bounds
        if low == high:
            return ["medium"] * len(client_ids)
        return [CLASSES[index] for index in (speeds > low).astype(int) + (speeds > high)]

    def means(self, name: str, values: Mapping[ClientId, float]) -> dict[str, float]:
        """Return ``<name>/<class>``, the mean of a metric over the clients of each class that has some.

        Args:
            name: of the metric.
            values: by client.
        """
        found: dict[str, list[float]] = {}
        for device_class, value in zip(self.of(list(values)), values.values(), strict=True):
            found.setdefault(device_class, []).append(value)
        if len(found) < 2:
            return {}
        return {f"{name}/{c}": float(np.mean(found[c])) for c in CLASSES if c in found}
