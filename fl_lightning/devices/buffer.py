"""Asynchronous rounds of devices: who is free is asked whether it may work, and may be lost on the way."""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fl_lightning.devices.eligibility import AllOf, Rule, checked_rule
from fl_lightning.devices.energy import EnergyModel
from fl_lightning.devices.fleet import DeviceFleet
from fl_lightning.devices.participants import Participants
from fl_lightning.devices.policies import WorkPolicy, checked_policies
from fl_lightning.devices.selection import RESTING
from fl_lightning.devices.tallies import Tallies
from fl_lightning.devices.trips import EMPTY, GAVE_UP, OFFLINE, devices_of, send
from fl_lightning.errors import MisconfigurationException, NotEnoughClientsError
from fl_lightning.schedules.buffered import BufferedSchedule
from fl_lightning.schedules.plan import Delivery, Dispatch, Occasion, Plan
from fl_lightning.schedules.reasons import counted
from fl_lightning.types import ClientId

__all__ = ["DeviceBuffer"]

_TOO_MANY = 1000


class DeviceBuffer(BufferedSchedule):
    """What devices are to ``FedBuff`` and ``FedAsync``: eligibility, batteries and drop-outs without rounds in step.

    Whenever a place is free, a client is drawn from those that are eligible at that moment. A device that gives up,
    goes offline or runs out of battery frees its place at that moment, brings no update, and stands in
    ``RoundReport.dropped`` with the reason. While nobody is at work and nobody is eligible, the clock goes on. With
    devices that are never in the way it is the algorithm without a fleet's conditions, bit for bit.

    The algorithm says how many are at work and how many updates make a round; this is what ``schedule`` is for then::

        FederatedTrainer(algorithm=FedBuff(10, concurrency=50), fleet=DeviceFleet(profile="smartphones"),
                         schedule=DeviceBuffer(eligibility=Eligibility(idle=True, charging=True)))

    Without it, a ``DeviceFleet`` under such an algorithm has ``DeviceBuffer()``.

    Args:
        eligibility: who may work; ``None`` is :class:`Eligibility`.
        policies: change a device's work by its circumstances, in order. There is no deadline.
        rest_seconds: how long a device is left alone after its last work.
        wait_seconds: time between two looks for eligible devices when nobody is at work.
        max_wait_hours: how long to look before it is an error.
        energy: estimates of energy and carbon dioxide; ``None`` is :class:`EnergyModel`.

    Raises:
        MisconfigurationException: for numbers out of range, without a fleet, and for an algorithm of rounds in step.
        NotEnoughClientsError: when nobody is at work and nobody is eligible for ``max_wait_hours``.

    Example:
        >>> schedule = DeviceBuffer(rest_seconds=60.0).bound(BufferedSchedule(buffer_size=10, concurrency=50))
        >>> schedule.buffer_size, schedule.rest_seconds
        (10, 60.0)
    """

    def __init__(
        self,
        eligibility: Rule | None = None,
        policies: list[WorkPolicy] | None = None,
        rest_seconds: float = 0.0,
        wait_seconds: float = 600.0,
        max_wait_hours: float = 48.0,
        energy: EnergyModel | None = None,
    ) -> None:
        super().__init__(1)
        valid = 0 <= rest_seconds < math.inf and 0 < wait_seconds < math.inf and 0 <= max_wait_hours < math.inf
        if not valid:
            raise MisconfigurationException(
                f"DeviceBuffer expected rest_seconds >= 0, wait_seconds > 0 and max_wait_hours >= 0, all finite, got "
                f"rest_seconds={rest_seconds!r}, wait_seconds={wait_seconds!r} and max_wait_hours={max_wait_hours!r}."
            )
        self.eligibility = checked_rule("DeviceBuffer", eligibility)
        self.policies = checked_policies("DeviceBuffer", policies)
        self.rest_seconds, self.wait_seconds, self.max_wait_hours = rest_seconds, wait_seconds, max_wait_hours
        self.energy = energy if energy is not None else EnergyModel()
        self.participants, self.tallies = Participants(), Tallies()
        self._under_way: dict[int, dict[str, Any]] = {}
        """What will have become of each dispatch in flight: it is known when it is sent, and happens when it ends."""
        self._ended: list[dict[str, Any]] = []
        self._refused: Counter[str] = Counter()
        self._lost_in_a_row = 0
        self._flush: tuple[DeviceFleet, Sequence[ClientId], list[dict[str, Any]]] | None = None

    def bound(self, own: BufferedSchedule) -> DeviceBuffer:
        """Return a new schedule without history for an algorithm's numbers."""
        new = copy.deepcopy(self)
        new.buffer_size, new.concurrency = own.buffer_size, own.concurrency
        new.max_staleness, new.client_concurrency = own.max_staleness, own.client_concurrency
        return new

    # ---- a dispatch --------------------------------------------------------------------------------------------

    def admitted(self, occasion: Occasion, client_ids: Sequence[ClientId], at: float) -> Sequence[bool]:
        if not client_ids:
            return []
        refusals = self.eligibility.refusals(
            devices_of(occasion, "DeviceBuffer").conditions(client_ids, at, self.participants)
        )
        if self.rest_seconds:
            levels, since = self.participants.levels(client_ids)
            resting = ~np.isnan(levels) & (at - since < self.rest_seconds)
            refusals = [reason or RESTING * bool(rests) for reason, rests in zip(refusals, resting, strict=True)]
        # who was refused until somebody was found: those behind were looked at only because it costs no more
        self._refused.update(itertools.takewhile(bool, refusals))
        return [not reason for reason in refusals]

    def sent(self, occasion: Occasion, client_id: ClientId, dispatch_id: int, at: float, repeat: int) -> Dispatch:
        fleet, ids = devices_of(occasion, "DeviceBuffer"), [client_id]
        trips = send(occasion, fleet, self.participants, ids, at, None, self.policies, self.energy, attempt=repeat)
        dispatch = occasion.dispatch(client_id, dispatch_id, at, trips.works[0], repeat)
        if dispatch.work.width != 1.0:  # its steps are cheaper than those that the dispatch was timed by
            dispatch = replace(dispatch, done_at=float(trips.reports_at[0]))
        if math.isfinite(trips.lost_at[0]):
            dispatch = replace(dispatch, done_at=float(trips.lost_at[0]))
        end = np.array([dispatch.done_at])
        watt_hours = float(trips.spent(end)[0])
        drained = 0.0 if trips.charging[0] else watt_hours / float(fleet.values("battery_wh", ids)[0])
        level = float(fleet.battery(ids, end, self.participants)[0]) - drained
        self._under_way[dispatch_id] = {
            "client_id": client_id, "reason": trips.reasons[0], "level": level, "drained": drained,
            "watt_hours": watt_hours, "battery": float(trips.battery[0]), "local_hour": float(trips.local_hour[0]),
        }  # fmt: skip
        return dispatch

    def lost(self, dispatch: Dispatch) -> str | None:
        ended = self._under_way.pop(dispatch.dispatch_id)
        self._lost_in_a_row = self._lost_in_a_row + 1 if ended["reason"] else 0
        if self._lost_in_a_row > _TOO_MANY:
            raise NotEnoughClientsError(
                f"{_TOO_MANY} devices in a row were lost before they had finished, the last one because it "
                f"{ended['reason']}. Lower the fleet's dropout, or ask for less local work."
            )
        for other in self._under_way.values():  # work of the same device that was sent before this one had drained it
            if other["client_id"] == dispatch.client_id:
                other["level"] -= ended["drained"]
        self._ended.append({**ended, "dispatch_id": dispatch.dispatch_id})
        self.participants.worked(dispatch.client_id, max(0.0, ended["level"]), dispatch.done_at, not ended["reason"])
        return ended["reason"] or None

    def waited(self, occasion: Occasion, at: float, since: float) -> float:
        if at + self.wait_seconds - since > self.max_wait_hours * 3600.0:
            raise NotEnoughClientsError(
                f"Round {occasion.round} waits for updates, nobody is at work, and nobody was eligible in "
                f"{self.max_wait_hours:g} hours on the virtual clock. Refusals, counted at every look at the clock: "
                f"{counted(self._refused)}. Relax the "
                "eligibility, change the fleet, or raise max_wait_hours."
            )
        return at + self.wait_seconds

    def flushed(self, occasion: Occasion, buffer: Sequence[Dispatch], clock: float) -> Mapping[str, float]:
        ended, self._ended = self._ended, []
        refused, self._refused = self._refused, Counter()
        lost = Counter(entry["reason"] for entry in ended if entry["reason"])
        taken = {dispatch.dispatch_id for dispatch in buffer}  # an update that was too old is no report
        reporting = [entry for entry in ended if entry["dispatch_id"] in taken]
        self._flush = devices_of(occasion, "DeviceBuffer"), occasion.population.client_ids(), reporting
        metrics = {
            "devices/in_flight": float(len(self._under_way)),
            **self.energy.metrics(
                devices_of(occasion, "DeviceBuffer"),
                [entry["client_id"] for entry in ended],
                sum(entry["watt_hours"] for entry in ended),
            ),
        }
        rules = self.eligibility.rules if isinstance(self.eligibility, AllOf) else [self.eligibility]
        reasons = [*(rule.reason for rule in rules), GAVE_UP, OFFLINE, EMPTY]
        for reason in dict.fromkeys([*reasons, *refused]):  # curves of reasons that are rare have zeros
            metrics[f"devices/dropped/{reason.replace(' ', '_')}"] = float(lost[reason] + refused[reason])
        return {**metrics, "devices/participants": float(len(self.participants))}

    def learn(self, plan: Plan, deliveries: Sequence[Delivery]) -> Mapping[str, float]:
        if self._flush is None:
            return {}
        (fleet, population, reporting), self._flush = self._flush, None
        failed = {delivery.dispatch_id for delivery in deliveries if delivery.failure is not None}
        reporting = [entry for entry in reporting if entry["dispatch_id"] not in failed]
        metrics = self.tallies.add(
            fleet,
            population,
            [entry["client_id"] for entry in reporting],
            np.array([entry["local_hour"] for entry in reporting]),
            np.array([entry["battery"] for entry in reporting]),
        )
        return {"devices/reports": float(len(reporting)), **metrics}

    # ---- what lasts --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "participants": self.participants.state_dict(),
            "tallies": self.tallies.state_dict(),
            "under_way": copy.deepcopy(self._under_way),
            "lost_in_a_row": self._lost_in_a_row,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.participants.load_state_dict(state["participants"])
        self.tallies.load_state_dict(state["tallies"])
        self._under_way = copy.deepcopy(dict(state["under_way"]))
        self._lost_in_a_row = state["lost_in_a_row"]
