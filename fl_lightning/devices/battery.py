r"""How full a battery is at any time, in closed form: no device is simulated through the hours that nobody asks about.

A day starts when the device is plugged in. It charges for ``charge_hours`` and is used for the rest. Each part moves
the level by a constant and stops at empty or full, :math:`x \mapsto \min(h, \max(l, x + a))`. Such maps compose to
maps of the same kind, and so do any number of equal days.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["level_after"]

Floats = NDArray[np.float64]
_DAY = 24.0


def level_after(
    level: Floats, hour: Floats, elapsed: Floats, charge_from: Floats, charge_hours: Floats, gain: Floats, drain: Floats
) -> Floats:
    """Return battery levels after some hours of charging and of use.

    Args:
        level: now, in ``[0, 1]``.
        hour: local hour of the day now.
        elapsed: hours to go, at least 0.
        charge_from: local hour at which the device is plugged in.
        charge_hours: hours a day on the charger.
        gain: level gained in an hour on the charger.
        drain: level lost in an hour off the charger.

    Shape:
        all ``(clients,)``

    Example:
        >>> one = np.ones(1)  # plugged in from 22 to 6; half a charge an hour; a twentieth lost in an hour of use
        >>> level_after(0.5 * one, 20 * one, 3 * one, 22 * one, 8 * one, 0.5 * one, 0.05 * one).round(6).item()
        0.9
    """
    begin = np.mod(hour - charge_from, _DAY)
    end = begin + elapsed
    same_day = end < _DAY
    within = _part(level, begin, np.minimum(end, _DAY), charge_hours, gain, drain)
    days = np.floor(end / _DAY) - 1.0  # whole days after the first, if there is a next day
    later = _whole_days(within, np.maximum(days, 0.0), charge_hours, gain, drain)
    zero = np.zeros_like(begin)
    later = _part(later, zero, np.mod(end, _DAY), charge_hours, gain, drain)
    return np.where(same_day, within, later)


def _part(level: Floats, begin: Floats, end: Floats, charge_hours: Floats, gain: Floats, drain: Floats) -> Floats:
    """Follow one day between two of its hours: first the charger, then use."""
    charging = np.minimum(end, charge_hours) - np.minimum(begin, charge_hours)
    charged = np.minimum(1.0, level + charging * gain)
    used: Floats = np.maximum(0.0, charged - (end - begin - charging) * drain)
    return used


def _whole_days(level: Floats, days: Floats, charge_hours: Floats, gain: Floats, drain: Floats) -> Floats:
    up, down = charge_hours * gain, (_DAY - charge_hours) * drain
    # one day is x -> max(0, min(1, x + up) - down), that is x + up - down kept within [low, high]
    shift, low, high = up - down, np.zeros_like(up), np.maximum(0.0, 1.0 - down)
    more = np.maximum(days - 1.0, 0.0)
    # repeated, the bound that the shift runs into stays, and the other one moves with the shift until it meets it
    low_n = np.where(shift > 0, np.minimum(low + more * shift, high), low)
    high_n = np.where(shift < 0, np.maximum(high + more * shift, low), high)
    moved = np.minimum(high_n, np.maximum(low_n, level + days * shift))
    return np.where(days > 0, moved, level)
