"""A device for every client, computed when somebody asks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fl_lightning.devices.checks import is_integer
from fl_lightning.devices.fields import FIELDS
from fl_lightning.devices.moments import Moments
from fl_lightning.devices.properties import FieldValue
from fl_lightning.devices.trace import read_trace
from fl_lightning.errors import MisconfigurationException
from fl_lightning.types import ClientId

__all__ = ["DeviceFleet"]

Floats = NDArray[np.float64]


class DeviceFleet(Moments):
    r"""Gives every client a device: compute, memory, battery, network, and when it can be reached.

    A property is a number, a distribution (``"lognormal(8, 0.7)"`` or :class:`LogNormal`), the name of a profile
    (``"smartphones"``), or a callable ``client_id -> number``. What is left out is the profile's. Everything is pure in
    ``(seed, client_id, time)``; nothing is kept for a population, and a million devices cost nothing until they are
    asked about.

    .. math:: t_k = 2\,\text{latency}_k + \frac{8\,\text{bytes}_\downarrow}{10^6\,\text{download}_k}
        + \frac{\text{steps}}{\text{speed}_k} + \frac{8\,\text{bytes}_\uparrow}{10^6\,\text{upload}_k}

    Args:
        speed: optimizer steps a second, > 0; examples with ``speed_unit="examples"``.
        profile: ``"ideal"`` devices are mains-powered, always there, with a network that takes no time and one step a
            second; ``"smartphones"`` are spread as :mod:`fl_lightning.devices.fields` says.
        speed_unit: what ``speed`` counts; ``"examples"`` needs ``batch_size``.
        batch_size: examples of a step, for ``speed_unit="examples"``.
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
        quality_spread: how far quality moves from hour to hour, in [0, 1].
        metered: 1 (or ``True``) when its owner pays for the bytes.
        timezone_hours: local time minus the clock's.
        online_from_hour: local hour at which it comes online.
        online_hours: hours a day online.
        online_probability: of being online in an hour of that time.
        idle_from_hour: local hour at which its owner puts it away.
        idle_hours: hours a day unused.
        dropout: probability of giving up in mid-training, in [0, 1].
        start_hour: UTC hour of the day at which the clock starts.
        seed: root of everything that is drawn.

    Raises:
        MisconfigurationException: for a property outside of its range, an unknown profile or distribution, a seed that
            is no integer.

    Example:
        >>> fleet = DeviceFleet(speed=lambda client_id: 4.0 if client_id == "fast" else 0.5)
        >>> fleet.seconds("fast", num_steps=10), fleet.seconds("slow", num_steps=10)
        (2.5, 20.0)
        >>> phones = DeviceFleet(profile="smartphones", speed="lognormal(8, 0.7)")
        >>> phones.device(123_456) == phones.device(123_456), phones.device(0).speed != phones.device(1).speed
        (True, True)
    """

    def __init__(
        self,
        speed: FieldValue = None,
        profile: Literal["ideal", "smartphones"] = "ideal",
        speed_unit: Literal["steps", "examples"] = "steps",
        batch_size: int | None = None,
        memory_gb: FieldValue = None,
        battery_wh: FieldValue = None,
        battery_level: FieldValue = None,
        charge_from_hour: FieldValue = None,
        charge_hours: FieldValue = None,
        charge_watts: FieldValue = None,
        idle_watts: FieldValue = None,
        train_watts: FieldValue = None,
        radio_watts: FieldValue = None,
        download_mbps: FieldValue = None,
        upload_mbps: FieldValue = None,
        latency_seconds: FieldValue = None,
        quality: FieldValue = None,
        quality_spread: FieldValue = None,
        metered: FieldValue = None,
        timezone_hours: FieldValue = None,
        online_from_hour: FieldValue = None,
        online_hours: FieldValue = None,
        online_probability: FieldValue = None,
        idle_from_hour: FieldValue = None,
        idle_hours: FieldValue = None,
        dropout: FieldValue = None,
        start_hour: float = 0.0,
        seed: int = 0,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in FIELDS}
        super().__init__(given, profile, seed, start_hour)
        _check_unit(speed_unit, batch_size)
        self.examples_per_step = float(batch_size or 1) if speed_unit == "examples" else 1.0

    @classmethod
    def from_trace(
        cls,
        path: str | os.PathLike[str],
        assign: Literal["id", "draw"] = "id",
        max_gap_seconds: float = 86_400.0,
        **properties: Any,
    ) -> DeviceFleet:
        """Make a fleet whose devices were measured.

        The CSV file has a column ``client_id``, optionally ``seconds`` on the clock, and any of the properties above
        and of ``online``, ``charging``, ``idle`` (0 or 1). Columns replace the profile's properties. Without
        ``seconds`` a device has one row; with it a row holds until the next one, the first row from the clock's start,
        and the last row ``max_gap_seconds`` long: after that the device counts as offline.

        Args:
            path: the file.
            assign: ``"id"`` gives client ``7`` (or ``"7"``) the device named 7; ``"draw"`` gives every client a device
                of the trace by chance, so that a hundred measured devices serve a million clients.
            max_gap_seconds: longest time between two rows of a device, before its first one and after its last one;
                ``float("inf")`` lets the last row hold for ever.
            **properties: as in the constructor, for what the trace does not say.

        Raises:
            MisconfigurationException: names the line of the file: an unknown column, a missing or impossible value,
                times that go backwards, a gap; and, with ``assign="id"``, a client that the trace does not know.

        Example:
            >>> from pathlib import Path
            >>> lines = "client_id,seconds,online,speed", "7,0,1,2.0", "7,60,0,2.0"
            >>> _ = Path("phones.csv").write_text(chr(10).join(lines))
            >>> fleet = DeviceFleet.from_trace("phones.csv")
            >>> fleet.conditions([7], at=59.0).online.tolist(), fleet.conditions([7], at=60.0).online.tolist()
            ([True], [False])
        """
        if assign not in ("id", "draw"):
            raise MisconfigurationException(f"Expected assign to be 'id' or 'draw', got {assign!r}.")
        fleet = cls(**properties)
        fleet._trace, fleet._assign = read_trace(path, max_gap_seconds), assign
        return fleet

    # ---- how long work takes -----------------------------------------------------------------------------------

    def times(
        self, client_ids: Sequence[ClientId], num_steps: Floats, num_bytes_down: int, num_bytes_up: int, at: float = 0.0
    ) -> tuple[Floats, Floats, Floats]:
        """Return the seconds of downloading, training and uploading.

        Shape:
            each ``(clients,)``
        """
        latency = self.values("latency_seconds", client_ids, at)
        down = latency + 8e-6 * num_bytes_down / self.values("download_mbps", client_ids, at)
        up = latency + 8e-6 * num_bytes_up / self.values("upload_mbps", client_ids, at)
        return down, num_steps * self.examples_per_step / self.values("speed", client_ids, at), up

    def seconds(
        self, client_id: ClientId, num_steps: int, num_bytes_down: int = 0, num_bytes_up: int = 0, at: float = 0.0
    ) -> float:
        """Return how long one client takes from the broadcast to its report.

        Args:
            client_id: who works.
            num_steps: optimizer steps.
            num_bytes_down, num_bytes_up: what travels.
            at: seconds on the clock.
        """
        parts = self.times([client_id], np.array([float(num_steps)]), num_bytes_down, num_bytes_up, at)
        return float(sum(part[0] for part in parts))


def _check_unit(speed_unit: str, batch_size: int | None) -> None:
    if speed_unit not in ("steps", "examples"):
        raise MisconfigurationException(f"Expected speed_unit to be 'steps' or 'examples', got {speed_unit!r}.")
    if (speed_unit == "examples") != (batch_size is not None):
        raise MisconfigurationException(
            f"Expected batch_size exactly with speed_unit='examples', got speed_unit={speed_unit!r} and "
            f"batch_size={batch_size!r}. Write DeviceFleet(speed=80, speed_unit='examples', batch_size=10)."
        )
    if batch_size is not None and not (is_integer(batch_size) and batch_size >= 1):
        raise MisconfigurationException(f"Expected batch_size to be an integer >= 1, got {batch_size!r}.")
