"""How devices are at a moment of the virtual clock."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_lightning.devices.battery import level_after
from fl_lightning.devices.checks import is_number
from fl_lightning.devices.conditions import Conditions
from fl_lightning.devices.participants import Participants
from fl_lightning.devices.properties import FieldValue, Properties, spread_out
from fl_lightning.errors import MisconfigurationException
from fl_lightning.types import ClientId

__all__ = ["Moments"]

Floats = NDArray[np.float64]
_HOUR = 3600.0


class Moments(Properties):
    """Battery, network and availability over time, pure in ``(seed, client_id, time)`` and in what work has drained.

    Args:
        given, profile, seed: as :class:`Properties` has them.
        start_hour: UTC hour of the day at which the clock starts.
    """

    def __init__(self, given: Mapping[str, FieldValue], profile: str, seed: int, start_hour: float) -> None:
        super().__init__(given, profile, seed)
        if not (is_number(start_hour) and 0 <= start_hour < 24):
            raise MisconfigurationException(
                f"DeviceFleet expected start_hour to be an hour in [0, 24), got {start_hour!r}."
            )
        self.start_hour = float(start_hour)

    def conditions(
        self, client_ids: Sequence[ClientId], at: float, participants: Participants | None = None
    ) -> Conditions:
        """Return how some devices are at a time.

        Args:
            client_ids: the devices.
            at: seconds on the clock.
            participants: what work has drained so far; without it nobody has worked.
        """
        hour = self._local_hour(client_ids, at)
        move = 2 * self.draw(client_ids, "quality now", self._slot(at)) - 1
        quality = self.values("quality", client_ids, at) + move * self.values("quality_spread", client_ids)
        return Conditions(
            client_ids,
            at,
            online=self._online(client_ids, at, hour),
            battery=self.battery(client_ids, at, participants),
            charging=self._within("charge", client_ids, at, hour),
            idle=self._within("idle", client_ids, at, hour),
            quality=np.clip(quality, 0.0, 1.0),
            metered=self.values("metered", client_ids, at) >= 0.5,
            memory_gb=self.values("memory_gb", client_ids, at),
            local_hour=hour,
        )

    def battery(
        self, client_ids: Sequence[ClientId], at: float | Floats, participants: Participants | None = None
    ) -> Floats:
        """Return levels in [0, 1]: charged by night, drained by the owner's use and by work.

        Shape:
            ``(clients,)``
        """
        times = spread_out(at, client_ids)
        level, since = (participants or Participants()).levels(client_ids)
        if self._trace is not None and self._measures("battery_level"):
            return self._measured_level(client_ids, times, level, since)
        level = np.where(np.isnan(level), self.values("battery_level", client_ids), level)
        return self.level_after(client_ids, level, since, np.maximum(times, since))

    def level_after(self, client_ids: Sequence[ClientId], level: Floats, since: Floats, until: Floats) -> Floats:
        """Return levels after a time of charging and of the owner's use, without work."""
        capacity = self.values("battery_wh", client_ids)
        return level_after(
            level,
            self._local_hour(client_ids, since),
            (until - since) / _HOUR,
            self.values("charge_from_hour", client_ids),
            self.values("charge_hours", client_ids),
            self.values("charge_watts", client_ids) / capacity,
            self.values("idle_watts", client_ids) / capacity,
        )

    def _measured_level(self, client_ids: Sequence[ClientId], times: Floats, level: Floats, since: Floats) -> Floats:
        assert self._trace is not None
        devices = self._devices(client_ids)
        measured = self._trace.values("battery_level", devices, times)
        spent = self._trace.values("battery_level", devices, since) - level
        # what work took is missing until the owner charges the next time
        forgotten = np.isnan(level) | self._trace.charged_between(devices, since, times)
        return np.where(forgotten, measured, np.maximum(0.0, measured - np.nan_to_num(spent)))

    def _local_hour(self, client_ids: Sequence[ClientId], at: float | Floats) -> Floats:
        hours = self.start_hour + np.asarray(at) / _HOUR
        return np.mod(hours + self.values("timezone_hours", client_ids), 24.0)

    def _slot(self, at: float | Floats) -> Any:
        """Return the hour since the clock's midnight, for what is drawn anew every hour."""
        return np.floor(self.start_hour + np.asarray(at) / _HOUR).astype(np.int64)

    def _within(self, what: str, client_ids: Sequence[ClientId], at: float | Floats, hour: Floats) -> NDArray[np.bool_]:
        column = {"charge": "charging"}.get(what, what)
        if self._trace is not None and self._measures(column):
            return self._trace.values(column, self._devices(client_ids), spread_out(at, client_ids)) >= 0.5
        since = np.mod(hour - self.values(f"{what}_from_hour", client_ids), 24.0)
        inside: NDArray[np.bool_] = since < self.values(f"{what}_hours", client_ids)
        return inside

    def _online(self, client_ids: Sequence[ClientId], at: float | Floats, hour: Floats) -> NDArray[np.bool_]:
        known: NDArray[np.bool_] = np.ones(len(client_ids), dtype=bool)
        if self._trace is not None:
            known = self._trace.online(self._devices(client_ids), spread_out(at, client_ids))
            if self._measures("online"):
                return known
        window = self._within("online", client_ids, at, hour) & known
        coin = self.draw(client_ids, "online now", self._slot(at))
        return window & (coin < self.values("online_probability", client_ids))

    def offline_from(self, client_ids: Sequence[ClientId], begin: Floats, end: Floats) -> Floats:
        """Return when devices that are online go offline before an end; infinite for those that stay.

        Shape:
            ``(clients,)``
        """
        traced = np.full(len(client_ids), math.inf)
        if self._trace is not None:
            traced = self._trace.next_offline(self._devices(client_ids), begin)
            if self._measures("online"):
                return np.where(traced < end, traced, math.inf)
        found = np.minimum(self._end_of_window(client_ids, begin), traced)
        probability = self.values("online_probability", client_ids)
        first = self._slot(begin)
        for ahead in range(1, int(np.max(self._slot(end) - first, initial=0)) + 1):
            starts = (first + ahead - self.start_hour) * _HOUR
            lost = self.draw(client_ids, "online now", first + ahead) >= probability
            found = np.where(lost, np.minimum(found, starts), found)
        return np.where(found < end, found, math.inf)

    def _end_of_window(self, client_ids: Sequence[ClientId], begin: Floats) -> Floats:
        hours = self.values("online_hours", client_ids)
        since = np.mod(self._local_hour(client_ids, begin) - self.values("online_from_hour", client_ids), 24.0)
        left = np.where(hours < 24.0, np.maximum(hours - since, 0.0), math.inf)
        ends: Floats = begin + left * _HOUR
        return ends
