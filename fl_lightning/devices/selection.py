"""Who is sent work: the sampler proposes, the rule refuses, until enough devices are found or everyone was asked."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from fl_lightning.devices.draws import client_keys, uniforms
from fl_lightning.devices.eligibility import Rule
from fl_lightning.devices.fleet import DeviceFleet
from fl_lightning.devices.participants import Participants
from fl_lightning.schedules.plan import Occasion
from fl_lightning.types import ClientId

__all__ = ["NAMED", "RESTING", "Selection", "select"]

NAMED = 1000
"""Refused devices that a report names; its metrics count all."""
RESTING = "worked recently"
_WAVES = 64
"""A sampler that proposes nobody new so many times in a row has nobody else to propose."""
_RAREST = 0.01
"""The share of eligible devices below which a wave does not grow any more."""


@dataclass(slots=True)
class Selection:
    """Who was found.

    Args:
        chosen: in the order of the draw.
        refused: who was asked and may not work, with the reason; at most a thousand of them.
        counts: how many were refused for each reason, all of them.
        asked: everyone who was asked.
    """

    chosen: list[ClientId] = field(default_factory=list)
    refused: dict[ClientId, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    asked: set[ClientId] = field(default_factory=set)

    def take(self, client_ids: Sequence[ClientId], numbers: NDArray[np.int64], reasons: list[str], wanted: int) -> None:
        """Go through devices in their order until enough are chosen; the others were not asked."""
        eligible = np.flatnonzero(numbers == len(reasons) - 1)
        places = wanted - len(self.chosen)
        asked = int(eligible[places - 1]) + 1 if len(eligible) >= places else len(client_ids)
        self.chosen += [client_ids[index] for index in eligible[:places].tolist()]
        self.asked.update(client_ids[:asked])
        refused = np.flatnonzero(numbers[:asked] != len(reasons) - 1)
        found = np.bincount(numbers[refused], minlength=len(reasons)).tolist()
        self.counts.update({reason: count for reason, count in zip(reasons, found, strict=True) if count})
        for index in refused[: max(0, NAMED - len(self.refused))].tolist():
            self.refused[client_ids[index]] = reasons[numbers[index]]


def select(
    occasion: Occasion,
    fleet: DeviceFleet,
    rule: Rule,
    participants: Participants,
    wanted: int,
    at: float,
    attempt: int = 0,
    rest_seconds: float = 0.0,
    everyone: bool = False,
    failed: Collection[ClientId] = (),
) -> Selection:
    """Ask devices until some are found.

    The first wave is the sampler's own cohort, so that a fleet in which everyone is eligible changes nothing. Further
    waves grow with the share of devices that refused. The cost is that of the devices that are asked, not of the
    population.

    Args:
        occasion: the round.
        fleet: the devices.
        rule: who may work.
        participants: what work has drained so far.
        wanted: how many are looked for.
        at: seconds on the clock.
        attempt: further attempts of a round draw others.
        rest_seconds: how long a device is left alone after its last work.
        everyone: ask in one wave, for when it is known that waves would not do.
        failed: devices that earlier attempts of the round lost; they are asked last, when all others are too few.
    """
    found = Selection()
    verdicts = partial(_verdicts, fleet, rule, participants, at=at, rest_seconds=rest_seconds)
    for avoided in (failed, ()) if failed else ((),):
        if len(found.chosen) < wanted:
            _ask(found, occasion, verdicts, wanted, attempt, everyone, avoided)
    return found


def _ask(
    found: Selection,
    occasion: Occasion,
    verdicts: Callable[[Sequence[ClientId]], tuple[NDArray[np.int64], list[str]]],
    wanted: int,
    attempt: int,
    everyone: bool,
    avoided: Collection[ClientId],
) -> None:
    """Ask everyone but those that are avoided, in waves."""
    num_clients = len(occasion.population.client_ids())
    size, strangers = num_clients if everyone else wanted, 0
    for wave in range(num_clients + _WAVES):
        proposed = occasion.draw(min(size, num_clients), attempt * 1_000_000 + wave)
        if size >= num_clients and proposed == list(occasion.population.client_ids()):
            # everyone, in the population's order and no sampler's: the places must still go by chance
            proposed = _shuffled(occasion, proposed, attempt)
        new = tuple(client_id for client_id in proposed if client_id not in found.asked and client_id not in avoided)
        strangers = 0 if new else strangers + 1
        if new:
            found.take(new, *verdicts(new), wanted)
        asked = len(found.asked)
        exhausted = size >= num_clients or asked + len(avoided) >= num_clients
        if len(found.chosen) == wanted or exhausted or strangers > 2:
            return
        share = max(len(found.chosen) / max(asked, 1), _RAREST)
        size = asked + len(avoided) + math.ceil((wanted - len(found.chosen)) / share)
        if size > num_clients // 4:  # waves of strangers would now mostly meet each other
            size = num_clients


def _verdicts(
    fleet: DeviceFleet,
    rule: Rule,
    participants: Participants,
    client_ids: Sequence[ClientId],
    at: float,
    rest_seconds: float,
) -> tuple[NDArray[np.int64], list[str]]:
    numbers, reasons = rule.verdicts(fleet.conditions(client_ids, at, participants))
    if rest_seconds <= 0:
        return numbers, reasons
    levels, since = participants.levels(client_ids)
    resting = ~np.isnan(levels) & (at - since < rest_seconds)
    last = len(reasons) - 1
    # the number that meant eligible is the one of those that rest, and eligible has a new one
    return np.where((numbers == last) & ~resting, last + 1, numbers), [*reasons[:-1], RESTING, ""]


def _shuffled(occasion: Occasion, client_ids: Sequence[ClientId], attempt: int) -> list[ClientId]:
    order = uniforms(client_keys(client_ids), occasion.seed, "order", occasion.round * 1_000 + attempt)
    return [client_ids[index] for index in np.argsort(order, kind="stable").tolist()]
