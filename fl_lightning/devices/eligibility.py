"""Who may be asked: rules about a device's condition, which compose and say why they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_lightning.devices.conditions import Conditions
from fl_lightning.errors import MisconfigurationException

__all__ = [
    "AllOf",
    "BatteryAtLeast",
    "Charging",
    "Eligibility",
    "Idle",
    "LocalHours",
    "MemoryAtLeast",
    "Online",
    "QualityAtLeast",
    "Rule",
    "Satisfies",
    "Unmetered",
    "checked_rule",
]

Booleans = NDArray[np.bool_]


class Rule:
    """One condition that a device must meet; ``a & b`` is both.

    Attributes:
        reason: what the round's report says of a device that does not.
    """

    reason: str = "not eligible"

    def holds(self, conditions: Conditions) -> Booleans:
        """Return who meets it.

        Shape:
            ``(clients,)``
        """
        raise NotImplementedError(f"{type(self).__name__} must define holds(conditions).")

    def verdicts(self, conditions: Conditions) -> tuple[NDArray[np.int64], list[str]]:
        """Return for each device a number, and what the numbers mean: the last one, ``""``, is eligible.

        The first rule that fails gives the reason.
        """
        return np.where(self.holds(conditions), 1, 0), [self.reason, ""]

    def refusals(self, conditions: Conditions) -> list[str]:
        """Return for each device why it is refused, or ``""``."""
        numbers, reasons = self.verdicts(conditions)
        return [reasons[number] for number in numbers.tolist()]

    def __and__(self, other: Rule) -> AllOf:
        return AllOf([self, other])


class AllOf(Rule):
    """Every one of some rules, asked in their order.

    Args:
        rules: a list; without any everybody is eligible.
    """

    def __init__(self, rules: list[Rule]) -> None:
        for rule in rules:
            if not isinstance(rule, Rule):
                raise MisconfigurationException(
                    f"Expected eligibility rules such as BatteryAtLeast(0.2), got {rule!r}. A function becomes "
                    "one with Satisfies(function, reason)."
                )
        self.rules: list[Rule] = [
            leaf for rule in rules for leaf in (rule.rules if isinstance(rule, AllOf) else [rule])
        ]

    def holds(self, conditions: Conditions) -> Booleans:
        held = np.ones(len(conditions), dtype=np.bool_)
        for rule in self.rules:
            held &= rule.holds(conditions)
        return held

    def verdicts(self, conditions: Conditions) -> tuple[NDArray[np.int64], list[str]]:
        first = np.full(len(conditions), len(self.rules), dtype=np.int64)
        for number in reversed(range(len(self.rules))):
            first[~self.rules[number].holds(conditions)] = number
        return first, [*(rule.reason for rule in self.rules), ""]


class Online(Rule):
    """The device can be reached."""

    reason = "offline"

    def holds(self, conditions: Conditions) -> Booleans:
        return conditions.online


class BatteryAtLeast(Rule):
    """Enough charge.

    Args:
        level: lowest level, in [0, 1].
        or_charging: a device on the charger may be below it.
    """

    reason = "low battery"

    def __init__(self, level: float = 0.2, or_charging: bool = False) -> None:
        self.level, self.or_charging = _fraction("BatteryAtLeast", "level", level), or_charging

    def holds(self, conditions: Conditions) -> Booleans:
        enough: Booleans = conditions.battery >= self.level
        return enough | conditions.charging if self.or_charging else enough


class QualityAtLeast(Rule):
    """A network that is good enough.

    Args:
        quality: lowest quality, in [0, 1].
    """

    reason = "poor network"

    def __init__(self, quality: float = 0.5) -> None:
        self.quality = _fraction("QualityAtLeast", "quality", quality)

    def holds(self, conditions: Conditions) -> Booleans:
        enough: Booleans = conditions.quality >= self.quality
        return enough


class Idle(Rule):
    """Its owner leaves it alone."""

    reason = "in use"

    def holds(self, conditions: Conditions) -> Booleans:
        return conditions.idle


class Charging(Rule):
    """It is on the charger."""

    reason = "not charging"

    def holds(self, conditions: Conditions) -> Booleans:
        return conditions.charging


class Unmetered(Rule):
    """Nobody pays for the bytes."""

    reason = "metered network"

    def holds(self, conditions: Conditions) -> Booleans:
        return ~conditions.metered


class MemoryAtLeast(Rule):
    """Room for the model and its training.

    Args:
        gb: least memory in GB.
    """

    reason = "too little memory"

    def __init__(self, gb: float) -> None:
        if not (math.isfinite(gb) and gb >= 0):
            raise MisconfigurationException(f"MemoryAtLeast expected gb to be finite and >= 0, got {gb!r}.")
        self.gb = float(gb)

    def holds(self, conditions: Conditions) -> Booleans:
        enough: Booleans = conditions.memory_gb >= self.gb
        return enough


class LocalHours(Rule):
    """Only at some time of the device's own day; from 22 to 6 is the night.

    Args:
        begin, end: hours in [0, 24].
    """

    reason = "wrong time of day"

    def __init__(self, begin: float, end: float) -> None:
        if not (0 <= begin <= 24 and 0 <= end <= 24 and begin != end):
            raise MisconfigurationException(
                f"LocalHours expected two different hours in [0, 24], got begin={begin!r} and end={end!r}."
            )
        self.begin, self.end = float(begin), float(end)

    def holds(self, conditions: Conditions) -> Booleans:
        inside: Booleans = np.mod(conditions.local_hour - self.begin, 24.0) < np.mod(
            self.end - self.begin - 1e-12, 24.0
        )
        return inside


class Satisfies(Rule):
    """A condition of one's own.

    Args:
        condition: conditions to an array of booleans, one for each device.
        reason: what the round's report says of a device that it refuses.

    Example:
        >>> (Eligibility() & Satisfies(lambda now: now.battery > now.quality, "odd")).rules[-1].reason
        'odd'
    """

    def __init__(self, condition: Callable[[Conditions], Booleans], reason: str) -> None:
        self.condition, self.reason = condition, reason

    def holds(self, conditions: Conditions) -> Booleans:
        held = np.asarray(self.condition(conditions))
        if held.dtype != np.bool_ or held.shape != (len(conditions),):
            raise MisconfigurationException(
                f"Expected the condition of {self.reason!r} to return {len(conditions)} booleans, got {held.dtype} of "
                f"shape {held.shape}."
            )
        return held


class Eligibility(AllOf):
    """The usual conditions: online, a fifth of the battery, a network that is good enough; others on request.

    Args:
        battery: lowest level, in [0, 1].
        quality: lowest quality of the network, in [0, 1].
        idle: only devices that their owners leave alone.
        charging: only devices on the charger.
        unmetered: only where nobody pays for the bytes.
        memory_gb: least memory in GB.

    Raises:
        MisconfigurationException: for a level outside of [0, 1], and a condition that is neither on nor off.

    Example:
        >>> from fl_lightning.devices import DeviceFleet
        >>> fleet = DeviceFleet(battery_level=lambda client_id: 0.1 if client_id == "empty" else 1.0)
        >>> Eligibility().refusals(fleet.conditions(["empty", "full"], at=0.0))
        ['low battery', '']

    References:
        Bonawitz et al., *Towards Federated Learning at Scale: System Design*, 2019, section 3: idle, charging, and on
        an unmetered network. Those three are off here, so that a small fleet trains out of the box.
    """

    def __init__(
        self,
        battery: float = 0.2,
        quality: float = 0.5,
        idle: bool = False,
        charging: bool = False,
        unmetered: bool = False,
        memory_gb: float = 0.0,
    ) -> None:
        for name, value in (("idle", idle), ("charging", charging), ("unmetered", unmetered)):
            if not isinstance(value, bool):
                raise MisconfigurationException(f"Eligibility expected {name} to be True or False, got {value!r}.")
        rules: list[Rule] = [Online(), BatteryAtLeast(battery), QualityAtLeast(quality)]
        rules += [Idle()] * idle + [Charging()] * charging + [Unmetered()] * unmetered
        super().__init__([*rules, MemoryAtLeast(memory_gb)] if memory_gb else rules)


def checked_rule(of: str, rule: Any) -> Rule:
    """Return a schedule's rule; ``None`` is :class:`Eligibility`.

    Args:
        of: the schedule, for the error.
        rule: what it was given.

    Raises:
        MisconfigurationException: for what is no rule.
    """
    if rule is None:
        return Eligibility()
    if not isinstance(rule, Rule):
        raise MisconfigurationException(
            f"{of} expected eligibility to be a rule such as Eligibility(battery=0.2), got {rule!r}. A function "
            "becomes one with Satisfies(function, reason)."
        )
    return rule


def _fraction(of: str, name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise MisconfigurationException(f"{of} expected {name} to be a number in [0, 1], got {value!r}.")
    return float(value)
