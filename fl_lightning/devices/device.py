"""One device, as a value to look at."""

from __future__ import annotations

from dataclasses import dataclass

from fl_lightning.types import ClientId

__all__ = ["Device"]


@dataclass(frozen=True, slots=True)
class Device:
    """What a fleet says about one client; :mod:`fl_lightning.devices.fields` has units, ranges and sources.

    Args:
        client_id: whose device it is.
        speed: optimizer steps (or examples) a second.
        memory_gb: memory in GB.
        battery_wh: capacity in Wh; infinite on mains.
        battery_level: level when the clock starts, in [0, 1].
        charge_from_hour: local hour at which it is plugged in.
        charge_hours: hours a day on the charger.
        charge_watts: what the charger gives.
        idle_watts: what its owner's use takes off the charger.
        train_watts: what training takes.
        radio_watts: what sending and receiving takes.
        download_mbps: bandwidth down in Mbit/s.
        upload_mbps: bandwidth up in Mbit/s.
        latency_seconds: one way.
        quality: mean quality of the network, in [0, 1].
        quality_spread: how far quality moves from hour to hour.
        metered: 1 when its owner pays for the bytes.
        timezone_hours: local time minus the clock's.
        online_from_hour: local hour at which it comes online.
        online_hours: hours a day online.
        online_probability: of being online in an hour of that time.
        idle_from_hour: local hour at which its owner puts it away.
        idle_hours: hours a day unused.
        dropout: probability of giving up in mid-training.
    """

    client_id: ClientId
    speed: float
    memory_gb: float
    battery_wh: float
    battery_level: float
    charge_from_hour: float
    charge_hours: float
    charge_watts: float
    idle_watts: float
    train_watts: float
    radio_watts: float
    download_mbps: float
    upload_mbps: float
    latency_seconds: float
    quality: float
    quality_spread: float
    metered: float
    timezone_hours: float
    online_from_hour: float
    online_hours: float
    online_probability: float
    idle_from_hour: float
    idle_hours: float
    dropout: float
