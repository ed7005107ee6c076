"""The properties of a device: unit, range, what an ideal device has, and what a population of smartphones has.

The smartphone column is a starting point for experiments, not a measurement: each entry says where its order of
magnitude comes from, and every one can be replaced by a number, another distribution, a callable or a trace.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fl_lightning.devices.distributions import Choice, Distribution, LogNormal, Normal, Uniform

__all__ = ["FIELDS", "PROFILES", "Field"]


@dataclass(frozen=True, slots=True)
class Field:
    """One property.

    Args:
        unit: of the numbers.
        low, high: smallest and largest value that is allowed; distributions are cut to it.
        ideal: value of a device that is never in the way.
        smartphones: spread over a population of phones.
        about: what it means.
        source: where the smartphones' numbers come from.
    """

    unit: str
    low: float
    high: float
    ideal: float
    smartphones: float | Distribution
    about: str
    source: str = "assumption"


_INF = math.inf
_TINY = 1e-9
_BONAWITZ = "Bonawitz et al., Towards Federated Learning at Scale, 2019"

FIELDS: dict[str, Field] = {
    "speed": Field(
        "steps/s",
        _TINY,
        _INF,
        1.0,
        LogNormal(8.0, 0.7),
        "optimizer steps (or examples, see `speed_unit`) a second",
        "a factor of ten between the 5th and the 95th percentile: Lai et al., Oort, 2021, figure 2",
    ),
    "memory_gb": Field("GB", _TINY, _INF, _INF, Choice([3, 4, 4, 6, 6, 8, 8, 12]), "memory", "phones on sale"),
    "battery_wh": Field(
        "Wh",
        _TINY,
        _INF,
        _INF,
        Normal(15.4, 2.3),
        "capacity of the battery; infinite is mains",
        "3,000-5,000 mAh at 3.85 V",
    ),
    "battery_level": Field("", 0.0, 1.0, 1.0, Uniform(0.2, 1.0), "level when the clock starts, 0 empty to 1 full"),
    "charge_from_hour": Field(
        "h",
        0.0,
        24.0,
        0.0,
        Normal(22.0, 1.5),
        "local hour at which the device is plugged in",
        "charging by night: " + _BONAWITZ,
    ),
    "charge_hours": Field("h", 0.0, 24.0, 24.0, Normal(7.5, 1.5), "hours a day on the charger", _BONAWITZ),
    "charge_watts": Field("W", 0.0, _INF, 10.0, Uniform(5.0, 18.0), "what the charger gives", "USB chargers"),
    "idle_watts": Field(
        "W", 0.0, _INF, 0.0, Uniform(0.3, 0.9), "what the owner's use takes, off the charger", "a charge a day"
    ),
    "train_watts": Field(
        "W", 0.0, _INF, 0.0, Uniform(2.0, 5.0), "what training takes", "sustained power of a phone's processor"
    ),
    "radio_watts": Field(
        "W",
        0.0,
        _INF,
        0.0,
        Uniform(0.13, 1.29),
        "what sending and receiving takes",
        "base power of Wi-Fi 0.133 W to LTE 1.288 W: Huang et al., A Close Examination of 4G LTE, 2012, table 4",
    ),
    "download_mbps": Field("Mbit/s", _TINY, _INF, _INF, LogNormal(20.0, 0.9), "bandwidth down", "mobile speed tests"),
    "upload_mbps": Field("Mbit/s", _TINY, _INF, _INF, LogNormal(6.0, 0.9), "bandwidth up", "mobile speed tests"),
    "latency_seconds": Field("s", 0.0, _INF, 0.0, LogNormal(0.06, 0.6), "one way", "mobile speed tests"),
    "quality": Field("", 0.0, 1.0, 1.0, Normal(0.75, 0.15), "quality of the network, 0 none to 1 perfect"),
    "quality_spread": Field("", 0.0, 1.0, 0.0, 0.2, "how far quality moves from hour to hour, either way"),
    "metered": Field("", 0.0, 1.0, 0.0, Choice([0, 0, 0, 1]), "1: its owner pays for the bytes"),
    "timezone_hours": Field(
        "h",
        -12.0,
        14.0,
        0.0,
        Choice([-8, -7, -6, -6, -5, -5]),
        "local time minus the clock's",
        "a US-centric population: " + _BONAWITZ,
    ),
    "online_from_hour": Field("h", 0.0, 24.0, 0.0, 0.0, "local hour at which the device comes online"),
    "online_hours": Field("h", 0.0, 24.0, 24.0, 24.0, "hours a day online"),
    "online_probability": Field("", 0.0, 1.0, 1.0, 0.85, "of being online in an hour of that time"),
    "idle_from_hour": Field(
        "h", 0.0, 24.0, 0.0, Normal(23.0, 1.5), "local hour at which its owner puts it away", "night: " + _BONAWITZ
    ),
    "idle_hours": Field("h", 0.0, 24.0, 24.0, Normal(7.5, 1.5), "hours a day unused", _BONAWITZ),
    "dropout": Field("", 0.0, 1.0, 0.0, 0.08, "probability of giving up in mid-training", "6% to 10%: " + _BONAWITZ),
}

PROFILES: dict[str, dict[str, float | Distribution]] = {
    "ideal": {name: field.ideal for name, field in FIELDS.items()},
    "smartphones": {name: field.smartphones for name, field in FIELDS.items()},
}
