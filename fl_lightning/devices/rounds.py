"""Rounds as production systems run them: over-selection, a deadline, minimum reports, pacing, lost devices."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fl_lightning.devices.checks import is_integer, is_number
from fl_lightning.devices.eligibility import AllOf, Rule, checked_rule
from fl_lightning.devices.energy import EnergyModel
from fl_lightning.devices.fleet import DeviceFleet
from fl_lightning.devices.participants import Participants
from fl_lightning.devices.policies import DeadlineSteps, WorkPolicy, checked_policies
from fl_lightning.devices.selection import RESTING, Selection, select
from fl_lightning.devices.tallies import Tallies
from fl_lightning.devices.trips import EMPTY, GAVE_UP, OFFLINE, Trips, devices_of, send
from fl_lightning.errors import MisconfigurationException, NotEnoughClientsError
from fl_lightning.schedules.lanes import sort_key
from fl_lightning.schedules.plan import Dispatch, Occasion, Plan, Schedule
from fl_lightning.schedules.reasons import counted
from fl_lightning.types import ClientId

__all__ = ["ABANDONED", "LATE", "NOT_NEEDED", "DeviceRounds"]

LATE = "missed the deadline"
NOT_NEEDED = "not needed"
ABANDONED = "round abandoned"


@dataclass(slots=True)
class _Attempt:
    """One try of a round: who was sent work, who made it, and when it was over."""

    trips: Trips
    accepted: list[int]
    dropped: dict[ClientId, str]
    end: float


class DeviceRounds(Schedule):
    r"""The server asks devices, sends work to those that may take it, and sums the first reports.

    A round looks for ``over_selection`` times as many devices as reports are wanted, waits on the virtual clock while
    too few are eligible, and is complete when the wanted reports are in, at the deadline, or when everyone has reported
    or is lost. With too few reports it is abandoned and tried again, with others in place of the devices that were lost
    or late; these are asked again only when too few others are eligible. What happened to whom stands in
    ``RoundReport.dropped``. With a fleet in which nothing is in the way it is the round of FedAvg, bit for bit.

    Args:
        over_selection: devices that are sent work for each report that is wanted, >= 1; Bonawitz et al. use 1.3.
        deadline: seconds on the virtual clock after which reports are late; ``None`` waits for everyone.
        min_reports: fewest reports that make a round, as a count or as a fraction of ``clients_per_round``. A round of
            which so many updates are refused (``on_bad_update="skip"``) that fewer are left is an error.
        eligibility: who may work; ``None`` is :class:`Eligibility`.
        policies: change a device's work by its circumstances, in order.
        stragglers: ``"drop"`` throws away what a device has not finished at the deadline; ``"partial"`` takes the steps
            that fit, as FedProx and FedNova are made for.
        pace_seconds: least time from the start of one round to the next.
        rest_seconds: how long a device is left alone after its last work.
        retries: how often a round is tried again.
        wait_seconds: time between two looks for eligible devices.
        max_wait_hours: how long to look before it is an error.
        energy: estimates of energy and carbon dioxide; ``None`` is :class:`EnergyModel`.

    Raises:
        MisconfigurationException: for numbers out of range, and for a federation without a fleet.
        NotEnoughClientsError: when too few devices are eligible for ``max_wait_hours``, or after the last retry.

    Example:
        >>> DeviceRounds(over_selection=1.3, deadline=300.0, min_reports=0.8, stragglers="partial").invited(100)
        130

    References:
        Bonawitz et al., *Towards Federated Learning at Scale: System Design*, MLSys 2019, sections 2.2 and 2.3. There
        devices check in by themselves and the server tells them when to come back; here it asks them.
    """

    def __init__(
        self,
        over_selection: float = 1.0,
        deadline: float | None = None,
        min_reports: int | float = 1,
        eligibility: Rule | None = None,
        policies: list[WorkPolicy] | None = None,
        stragglers: Literal["drop", "partial"] = "drop",
        pace_seconds: float = 0.0,
        rest_seconds: float = 0.0,
        retries: int = 3,
        wait_seconds: float = 600.0,
        max_wait_hours: float = 48.0,
        energy: EnergyModel | None = None,
    ) -> None:
        _check(over_selection, deadline, min_reports, stragglers)
        _check_times(pace_seconds, rest_seconds, retries, wait_seconds, max_wait_hours)
        self.over_selection, self.deadline, self.min_reports = over_selection, deadline, min_reports
        self.eligibility = checked_rule("DeviceRounds", eligibility)
        own = checked_policies("DeviceRounds", policies)
        self.policies = [*own, *([DeadlineSteps(margin=0.0)] if stragglers == "partial" else [])]
        self.pace_seconds, self.rest_seconds, self.retries = pace_seconds, rest_seconds, retries
        self.wait_seconds, self.max_wait_hours = wait_seconds, max_wait_hours
        self.energy = energy if energy is not None else EnergyModel()
        self.participants = Participants()
        self.tallies = Tallies()
        self._not_before = 0.0

    def invited(self, wanted: int) -> int:
        """Return how many devices are sent work for some reports."""
        return math.ceil(wanted * self.over_selection - 1e-9)

    def required(self, wanted: int) -> int:
        """Return how many reports make a round."""
        if isinstance(self.min_reports, float):
            return max(1, math.ceil(wanted * self.min_reports - 1e-9))
        return min(self.min_reports, wanted)

    # ---- a round -----------------------------------------------------------------------------------------------

    def plan(self, occasion: Occasion) -> Plan:
        fleet = devices_of(occasion, "DeviceRounds")
        begin, attempts = max(occasion.clock, self._not_before), []
        dropped: dict[ClientId, str] = {}
        counts: Counter[str] = Counter()
        failed: set[ClientId] = set()
        for attempt in range(self.retries + 1):
            start, selection = self._wait(occasion, fleet, begin, attempt, failed)
            tried = self._try(occasion, fleet, selection.chosen, start, attempt)
            attempts.append(tried)
            failed.update(tried.dropped)
            enough = len(tried.accepted) >= self.required(occasion.size)
            if not enough:
                tried.dropped.update({tried.trips.client_ids[index]: ABANDONED for index in tried.accepted})
            dropped = {**dropped, **selection.refused, **tried.dropped}
            counts += selection.counts + Counter(tried.dropped.values())
            self._remember(fleet, tried)
            begin = tried.end
            if enough:
                break
        else:
            raise NotEnoughClientsError(
                f"Round {occasion.round} needs {self.required(occasion.size)} reports and had {len(tried.accepted)} in "
                f"the last of {self.retries + 1} attempts: {counted(counts)}. Raise deadline or over_selection, lower "
                "min_reports, or use stragglers='partial'."
            )
        self._not_before = attempts[-1].trips.begin + self.pace_seconds
        return self._as_plan(occasion, fleet, attempts, dropped, counts)

    def _wait(
        self, occasion: Occasion, fleet: DeviceFleet, begin: float, attempt: int, failed: set[ClientId]
    ) -> tuple[float, Selection]:
        """Look for devices until enough are eligible; the clock goes on meanwhile."""
        at = begin
        needed = min(self.required(occasion.size), occasion.size)
        wanted = min(self.invited(occasion.size), len(occasion.population.client_ids()))
        while True:
            found = select(
                occasion, fleet, self.eligibility, self.participants, wanted, at, attempt, self.rest_seconds,
                at > begin, failed,
            )  # fmt: skip
            if len(found.chosen) >= needed:
                return at, found
            at += self.wait_seconds
            if at - begin > self.max_wait_hours * 3600.0:
                raise NotEnoughClientsError(
                    f"Round {occasion.round} needs {needed} eligible devices; {len(found.chosen)} of "
                    f"{len(found.asked)} that were asked are eligible after "
                    f"{self.max_wait_hours:g} hours of waiting on the virtual clock ({counted(found.counts)}). Relax "
                    "the eligibility, change the fleet, or raise max_wait_hours."
                )

    def _try(
        self, occasion: Occasion, fleet: DeviceFleet, chosen: Sequence[ClientId], begin: float, attempt: int
    ) -> _Attempt:
        trips = send(
            occasion, fleet, self.participants, chosen, begin, self.deadline, self.policies, self.energy, attempt
        )
        late_from = math.inf if self.deadline is None else begin + self.deadline
        arrive = np.where(np.isinf(trips.lost_at), trips.reports_at, math.inf)
        in_time = [index for index in range(len(chosen)) if math.isfinite(arrive[index]) and arrive[index] <= late_from]
        in_time.sort(key=lambda index: arrive[index])  # stable: ties keep the order of the draw
        accepted, surplus = in_time[: occasion.size], in_time[occasion.size :]
        if len(accepted) == occasion.size:
            end = float(arrive[accepted[-1]])
        else:  # with a deadline the server waits for devices of which it does not know that they are lost
            resolved = np.minimum(trips.lost_at, trips.reports_at)
            end = float(resolved.max()) if self.deadline is None else late_from
            if len(accepted) == len(chosen):
                end = float(arrive.max())
        dropped: dict[ClientId, str] = {}
        for index, client_id in enumerate(trips.client_ids):
            if index in accepted:
                continue
            if index in surplus or (trips.reports_at[index] > end and trips.lost_at[index] > end < late_from):
                dropped[client_id] = NOT_NEEDED
            else:
                dropped[client_id] = trips.reasons[index] or LATE
        return _Attempt(trips, accepted, dropped, end)

    def _remember(self, fleet: DeviceFleet, tried: _Attempt) -> None:
        """Drain batteries: a device that is lost stops at once, one that is late or not needed when the round ends."""
        trips = tried.trips
        ended = np.minimum(np.minimum(trips.lost_at, trips.reports_at), tried.end)
        spent = np.where(trips.charging, 0.0, trips.spent(ended)) / fleet.values("battery_wh", trips.client_ids)
        levels = np.maximum(0.0, fleet.battery(trips.client_ids, ended, self.participants) - spent)
        accepted = set(tried.accepted)
        for index, client_id in enumerate(trips.client_ids):
            self.participants.worked(client_id, float(levels[index]), float(ended[index]), index in accepted)

    def _as_plan(
        self,
        occasion: Occasion,
        fleet: DeviceFleet,
        attempts: list[_Attempt],
        dropped: dict[ClientId, str],
        counts: Counter[str],
    ) -> Plan:
        last = attempts[-1]
        trips = last.trips
        cohort = sorted(last.accepted, key=lambda index: sort_key(trips.client_ids[index]))
        dispatches = tuple(
            Dispatch(
                trips.client_ids[index],
                occasion.next_dispatch_id + position,
                occasion.round,
                trips.works[index],
                trips.begin,
                float(trips.reports_at[index]),
            )
            for position, index in enumerate(cohort)
        )
        for dispatch in dispatches:
            dropped.pop(dispatch.client_id, None)
        sent = [client_id for tried in attempts for client_id in tried.trips.client_ids]
        in_vain = [tried.trips.client_ids[index] for tried in attempts[:-1] for index in tried.accepted]
        metrics = self._metrics(occasion, fleet, attempts, counts)
        return Plan(
            dispatches,
            last.end,
            dropped,
            downloads=tuple(sorted(sent, key=sort_key)),
            metrics=metrics,
            in_vain=tuple(sorted(in_vain, key=sort_key)),
            min_reports=self.required(occasion.size),
        )

    def _reasons(self) -> list[str]:
        """Return what may happen to a device here."""
        rules = self.eligibility.rules if isinstance(self.eligibility, AllOf) else [self.eligibility]
        found = [rule.reason for rule in rules] + [RESTING] * (self.rest_seconds > 0)
        return [*found, GAVE_UP, OFFLINE, EMPTY, LATE, NOT_NEEDED, ABANDONED]

    def _metrics(
        self, occasion: Occasion, fleet: DeviceFleet, attempts: list[_Attempt], counts: Counter[str]
    ) -> dict[str, float]:
        last = attempts[-1]
        watt_hours, sent = 0.0, [client_id for tried in attempts for client_id in tried.trips.client_ids]
        for tried in attempts:
            ended = np.minimum(np.minimum(tried.trips.lost_at, tried.trips.reports_at), tried.end)
            watt_hours += float(tried.trips.spent(ended).sum())
        metrics = {
            "simulated_seconds": last.end,
            "devices/round_seconds": last.end - last.trips.begin,
            "devices/wait_seconds": attempts[0].trips.begin - occasion.clock,
            "devices/sent": float(len(sent)),
            "devices/reports": float(len(last.accepted)),
            "devices/partial": float(sum(last.trips.works[index].partial for index in last.accepted)),
            **self.energy.metrics(fleet, sent, watt_hours),
        }
        for reason in dict.fromkeys([*self._reasons(), *counts]):  # curves of reasons that are rare have zeros
            metrics[f"devices/dropped/{reason.replace(' ', '_')}"] = float(counts[reason])
        reporting = [last.trips.client_ids[index] for index in last.accepted]
        hours, battery = last.trips.local_hour[last.accepted], last.trips.battery[last.accepted]
        metrics.update(self.tallies.add(fleet, occasion.population.client_ids(), reporting, hours, battery))
        metrics["devices/participants"] = float(len(self.participants))
        return metrics

    # ---- what lasts --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "participants": self.participants.state_dict(),
            "tallies": self.tallies.state_dict(),
            "not_before": self._not_before,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.participants.load_state_dict(state["participants"])
        self.tallies.load_state_dict(state["tallies"])
        self._not_before = float(state["not_before"])


def _check_times(pace: float, rest: float, retries: int, wait: float, max_wait_hours: float) -> None:
    for name, value in (("pace_seconds", pace), ("rest_seconds", rest), ("max_wait_hours", max_wait_hours)):
        if not is_number(value) or not 0 <= value < math.inf:
            raise MisconfigurationException(f"DeviceRounds expected {name} to be finite and >= 0, got {value!r}.")
    if not is_integer(retries) or retries < 0:
        raise MisconfigurationException(f"DeviceRounds expected retries to be an integer >= 0, got {retries!r}.")
    if not is_number(wait) or not 0 < wait < math.inf:
        raise MisconfigurationException(f"DeviceRounds expected wait_seconds > 0 and finite, got {wait!r}.")


def _check(over_selection: float, deadline: float | None, min_reports: int | float, stragglers: str) -> None:
    if not is_number(over_selection) or not 1 <= over_selection < math.inf:
        raise MisconfigurationException(
            f"DeviceRounds expected over_selection to be finite and >= 1, got {over_selection!r}. Write 1.3 for 130% "
            "of the reports that are wanted."
        )
    if deadline is not None and not (is_number(deadline) and 0 < deadline < math.inf):
        raise MisconfigurationException(
            f"DeviceRounds expected deadline in seconds > 0, or None for none, got {deadline!r}."
        )
    fraction = isinstance(min_reports, float) and 0 < min_reports <= 1
    if not fraction and not (is_integer(min_reports) and min_reports >= 1):
        raise MisconfigurationException(
            f"DeviceRounds expected min_reports as a count >= 1 or a fraction in (0, 1], got {min_reports!r}."
        )
    if stragglers not in ("drop", "partial"):
        raise MisconfigurationException(f"Expected stragglers to be 'drop' or 'partial', got {stragglers!r}.")
    if stragglers == "partial" and deadline is None:
        raise MisconfigurationException(
            "stragglers='partial' takes the steps that fit before a deadline, and there is none. Set deadline=300.0, "
            "for example, or leave stragglers='drop'."
        )
