"""What becomes of devices that were sent work: when they report, or when and why they are lost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from fl_lightning.devices.energy import EnergyModel
from fl_lightning.devices.fleet import DeviceFleet
from fl_lightning.devices.participants import Participants
from fl_lightning.devices.policies import Circumstances, WorkPolicy, adapted
from fl_lightning.errors import MisconfigurationException
from fl_lightning.schedules.plan import Occasion
from fl_lightning.types import ClientId, Work

__all__ = ["EMPTY", "GAVE_UP", "OFFLINE", "Trips", "devices_of", "send"]

Floats = NDArray[np.float64]
GAVE_UP = "gave up"
OFFLINE = "went offline"
EMPTY = "battery ran empty"
_REASONS = (GAVE_UP, OFFLINE, EMPTY)


@dataclass(frozen=True, slots=True)
class Trips:
    """Devices with work, all sent at one time.

    Args:
        client_ids: the devices.
        works: what each is asked.
        begin: seconds on the clock when they were sent it.
        reports_at: when each report arrives if nothing happens.
        lost_at: when each is lost; infinite for those that are not.
        reasons: why.
        watt_hours: energy of the whole work.
        battery: level at the beginning.
        charging: whether each is on the charger, looked up at the beginning.
        local_hour: time of day where each is.
    """

    client_ids: list[ClientId]
    works: list[Work]
    begin: float
    reports_at: Floats
    lost_at: Floats
    reasons: list[str]
    watt_hours: Floats
    battery: Floats
    charging: NDArray[np.bool_]
    local_hour: Floats

    def spent(self, ended: Floats) -> Floats:
        """Return the watt-hours of the part of the work that is done at some times."""
        whole = self.reports_at - self.begin
        part = np.where(whole > 0, (ended - self.begin) / np.where(whole > 0, whole, 1.0), 1.0)
        done: Floats = self.watt_hours * np.clip(part, 0.0, 1.0)
        return done


def devices_of(occasion: Occasion, schedule: str) -> DeviceFleet:
    """Return the fleet of a federation.

    Raises:
        MisconfigurationException: names the schedule that needs devices, when they are something else.
    """
    if not isinstance(occasion.timing, DeviceFleet):
        raise MisconfigurationException(
            f"{schedule} needs devices, got fleet={occasion.timing!r}. Write FederatedTrainer(fleet=DeviceFleet("
            f"profile='smartphones'), schedule={schedule}(...))."
        )
    return occasion.timing


def send(
    occasion: Occasion,
    fleet: DeviceFleet,
    participants: Participants,
    client_ids: Sequence[ClientId],
    begin: float,
    deadline: float | None,
    policies: Sequence[WorkPolicy],
    energy: EnergyModel,
    attempt: int = 0,
) -> Trips:
    """Send devices this round's work and follow them.

    Args:
        occasion: the round.
        fleet: the devices.
        participants: what work has drained so far.
        client_ids: who is sent work.
        begin: seconds on the clock.
        deadline: seconds from ``begin`` until reports are late, or ``None``.
        policies: change each device's work by its circumstances.
        energy: estimates what work takes.
        attempt: further attempts of a round have luck of their own.
    """
    ids = list(client_ids)
    now = fleet.conditions(ids, begin, participants)
    ones = np.ones(len(ids))
    down, step_seconds, up = fleet.times(ids, ones, occasion.num_bytes_down, occasion.num_bytes_up, begin)
    works: list[Work] = []
    num_steps = np.zeros(len(ids))
    for index, client_id in enumerate(ids):
        work = replace(occasion.work(client_id), deadline=deadline)
        step_seconds[index] *= work.width**2
        circumstances = Circumstances(
            client_id,
            float(now.battery[index]),
            bool(now.charging[index]),
            occasion.num_steps(client_id, work),
            float(step_seconds[index]),
            float(down[index] + up[index]),
            math.inf if deadline is None else deadline,
            float(now.memory_gb[index]),
        )
        before = work.width
        work, num_steps[index] = adapted(work, circumstances, policies, partial(occasion.num_steps, client_id))
        step_seconds[index] *= (work.width / before) ** 2
        works.append(work)
    train = num_steps * step_seconds
    reports_at = begin + down + train + up
    watt_hours = energy.watt_hours(fleet, ids, train, down + up)
    drawn = np.where(now.charging, 0.0, watt_hours)
    losses = np.stack(
        [
            _gives_up(fleet, occasion, ids, begin, reports_at, attempt),
            fleet.offline_from(ids, begin * ones, reports_at),
            _runs_empty(fleet, ids, now.battery, now.charging, drawn, begin, reports_at),
        ]
    )
    lost_at = losses.min(axis=0)
    reasons = ["" if math.isinf(at) else _REASONS[which] for at, which in zip(lost_at, losses.argmin(0), strict=True)]
    return Trips(ids, works, begin, reports_at, lost_at, reasons, watt_hours, now.battery, now.charging, now.local_hour)


def _gives_up(
    fleet: DeviceFleet, occasion: Occasion, ids: list[ClientId], begin: float, reports_at: Floats, attempt: int
) -> Floats:
    slot = occasion.round * 1_000 + attempt
    gives_up = fleet.draw(ids, "gives up", slot) < fleet.values("dropout", ids)
    part = fleet.draw(ids, "gives up after", slot)
    return np.where(gives_up, begin + part * (reports_at - begin), math.inf)


def _runs_empty(
    fleet: DeviceFleet,
    ids: list[ClientId],
    level: Floats,
    charging: NDArray[np.bool_],
    drawn: Floats,
    begin: float,
    reports_at: Floats,
) -> Floats:
    capacity = fleet.values("battery_wh", ids)
    mains = np.isinf(capacity)
    left = np.where(mains, math.inf, level * np.where(mains, 1.0, capacity))
    hours = (reports_at - begin) / 3600.0
    need = drawn + np.where(charging, 0.0, fleet.values("idle_watts", ids) * hours)
    empties = need > left
    part = np.where(empties, left / np.where(empties, need, 1.0), 0.0)
    return np.where(empties, begin + part * (reports_at - begin), math.inf)
