"""Slow, medium and fast devices: who takes part, and whom the model serves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fl_lightning.devices.fleet import DeviceFleet
from fl_lightning.types import ClientId

__all__ = ["CLASSES", "DeviceClasses"]

CLASSES = ("slow", "medium", "fast")
_LOOKED_AT = 999
"""Devices from which the thirds of a population are estimated, evenly over its ids."""


class DeviceClasses:
    """The thirds of a population by the speed of its devices; among equally fast ones chance decides, once and for all.

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
        speeds, luck = self._ranked(client_ids[::step])
        order, last = np.lexsort((luck, speeds)), len(speeds) - 1
        ends = order[[last // 3, 2 * last // 3]]
        self.bounds = [(float(speeds[end]), float(luck[end])) for end in ends]
        """Speed and luck of the last device of the slow third, and of the medium one."""
        self.all_equal = bool(speeds.min() == speeds.max())

    def of(self, client_ids: Sequence[ClientId]) -> list[str]:
        """Return the class of some devices."""
        speeds, luck = self._ranked(client_ids)
        places = np.zeros(len(speeds), dtype=np.int64)
        for speed, last in self.bounds:
            places += (speeds > speed) | ((speeds == speed) & (luck > last))
        return [CLASSES[place] for place in places.tolist()]

    def means(self, name: str, values: Mapping[ClientId, float]) -> dict[str, float]:
        """Return ``<name>/<class>``, the mean of a metric over the clients of each class that has some.

        Thirds of a fleet in which all are equally fast have no values: they are drawn, and differ by chance only.

        Args:
            name: of the metric.
            values: by client.
        """
        found: dict[str, list[float]] = {}
        for device_class, value in zip(self.of(list(values)), values.values(), strict=True):
            found.setdefault(device_class, []).append(value)
        if len(found) < 2 or self.all_equal:
            return {}
        return {f"{name}/{c}": float(np.mean(found[c])) for c in CLASSES if c in found}

    def _ranked(self, client_ids: Sequence[ClientId]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return what devices are ordered by: their speed, and a number that makes equals differ."""
        return self.fleet.values("speed", client_ids), self.fleet.draw(client_ids, "among equals")
