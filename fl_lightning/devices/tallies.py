"""Who took part so far, by class of device and by time of day: the bias of availability, as numbers and for charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fl_lightning.devices.classes import CLASSES, DeviceClasses
from fl_lightning.devices.fleet import DeviceFleet
from fl_lightning.types import ClientId

__all__ = ["Tallies"]

Floats = NDArray[np.float64]


class Tallies:
    """Counts over all rounds, of a size that nothing makes grow.

    Attributes:
        by_class: reports of slow, medium and fast devices.
        by_hour: reports by the hour of the device's own day.
        battery: levels of the last round's devices when they were sent work.
    """

    def __init__(self) -> None:
        self.by_class = np.zeros(len(CLASSES), dtype=np.int64)
        self.by_hour = np.zeros(24, dtype=np.int64)
        self.battery = np.zeros(0)

    def add(
        self,
        fleet: DeviceFleet,
        population: Sequence[ClientId],
        reporting: Sequence[ClientId],
        hours: Floats,
        battery: Floats,
    ) -> dict[str, float]:
        """Count a round's reports and return what its report says about them.

        Args:
            fleet: the devices.
            population: all clients.
            reporting: who reported.
            hours: time of day where each of them was when it was sent work.
            battery: its level then.

        ``devices/share/<class>`` is the part of all reports so far that came from the slowest, middle and fastest third
        of the population: without bias a third each.
        """
        for device_class in DeviceClasses(fleet, population).of(reporting):
            self.by_class[CLASSES.index(device_class)] += 1
        self.by_hour += np.bincount(hours.astype(np.int64) % 24, minlength=24)
        self.battery = battery
        shares = self.by_class / max(1, int(self.by_class.sum()))
        metrics = {f"devices/share/{name}": float(share) for name, share in zip(CLASSES, shares, strict=True)}
        levels = np.quantile(self.battery, [0.1, 0.5, 0.9]) if len(self.battery) else np.zeros(3)
        metrics.update(
            {f"devices/battery/{n}": float(v) for n, v in zip(("p10", "median", "p90"), levels, strict=True)}
        )
        metrics["devices/local_hour"] = _mean_hour(hours)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        return {"by_class": torch.from_numpy(self.by_class.copy()), "by_hour": torch.from_numpy(self.by_hour.copy())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.by_class, self.by_hour = state["by_class"].numpy().copy(), state["by_hour"].numpy().copy()


def _mean_hour(hours: Floats) -> float:
    """The mean on the circle: 23 and 1 o'clock have midnight between them, not noon."""
    if not len(hours):
        return 0.0
    angles = hours * (2 * np.pi / 24)
    mean = np.arctan2(np.sin(angles).mean(), np.cos(angles).mean())
    return float(np.mod(mean * 24 / (2 * np.pi), 24.0))
