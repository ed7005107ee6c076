"""One device, as a value to look at."""

from __future__ import annotations

from dataclasses import dataclass

from fl_lightning.types import ClientId

__all__ = ["Device"]


@dataclass(frozen=True, slots=True)
class Device:
    """What a fleet says about one client; :mod:`fl_lightning.devices.fields` has units, ranges and sources.

    Its attributes are the client's id and the properties of a fleet under their names, in their order there.

    Example:
        >>> from dataclasses import fields
        >>> from fl_lightning.devices.fields import FIELDS
        >>> [field.name for field in fields(Device)] == ["client_id", *FIELDS]
        True
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
