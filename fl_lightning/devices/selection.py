"""Who is sent work: the sampler proposes, the rule refuses, until enough devices are found or everyone was asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fl_lightning.devices.draws import client_keys, uniforms
from fl_lightning.devices.eligibility import Rule
from fl_lightning.devices.fleet import DeviceFleet
from fl_lightning.devices.participants import Participants
from fl_lightning.schedules.plan import Occasion
from fl_lightning.types import ClientId

__all__ = ["RESTING", "Selection", "select"]

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
        refused: who was asked and may not work, with the reason.
    """

    chosen: list[ClientId] = field(default_factory=list)
    refused: dict[ClientId, str] = field(default_factory=dict)


def select(
    occasion: Occasion,
    fleet: DeviceFleet,
    rule: Rule,
    participants: Participants,
    wanted: int,
    at: float,
    attempt: int = 0,
    rest_seconds: float = 0.0,
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
    """
    found = Selection()
    size, empty = wanted, 0
    num_clients = len(occasion.population.client_ids())
    for wave in range(num_clients + _WAVES):
        proposed = occasion.draw(min(size, num_clients), attempt * 1_000_000 + wave)
        if size >= num_clients:  # everyone, in the population's order: the places must still go by chance
            proposed = _shuffled(occasion, proposed, attempt)
        known = {*found.refused, *found.chosen}
        new = tuple(client_id for client_id in proposed if client_id not in known)
        empty = 0 if new else empty + 1
        for client_id, reason in zip(new, _refusals(fleet, rule, participants, new, at, rest_seconds), strict=True):
            if len(found.chosen) == wanted:
                return found
            if reason:
                found.refused[client_id] = reason
            else:
                found.chosen.append(client_id)
        asked = len(found.chosen) + len(found.refused)
        if len(found.chosen) == wanted or asked >= num_clients or size >= num_clients or empty > 2:
            return found
        share = max(len(found.chosen) / max(asked, 1), _RAREST)
        size = asked + math.ceil((wanted - len(found.chosen)) / share)
        if size > num_clients // 2:  # waves of strangers would now mostly meet each other
            size = num_clients
    return found


def _refusals(
    fleet: DeviceFleet,
    rule: Rule,
    participants: Participants,
    client_ids: Sequence[ClientId],
    at: float,
    rest_seconds: float,
) -> list[str]:
    if not client_ids:
        return []
    reasons = rule.refusals(fleet.conditions(client_ids, at, participants))
    if rest_seconds > 0:
        levels, since = participants.levels(client_ids)
        resting = ~np.isnan(levels) & (at - since < rest_seconds)
        reasons = [reason or (RESTING if rests else "") for reason, rests in zip(reasons, resting, strict=True)]
    return reasons


def _shuffled(occasion: Occasion, client_ids: Sequence[ClientId], attempt: int) -> list[ClientId]:
    order = uniforms(client_keys(client_ids), occasion.seed, "order", occasion.round * 1_000 + attempt)
    return [client_ids[index] for index in np.argsort(order, kind="stable").tolist()]
