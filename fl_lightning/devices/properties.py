"""What devices are: each property from a number, a distribution, a callable or a trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fl_lightning.devices.checks import is_integer
from fl_lightning.devices.device import Device
from fl_lightning.devices.distributions import Distribution, parse
from fl_lightning.devices.draws import client_keys, uniforms
from fl_lightning.devices.fields import FIELDS, PROFILES
from fl_lightning.devices.trace import Trace
from fl_lightning.errors import MisconfigurationException
from fl_lightning.types import ClientId

__all__ = ["FieldValue", "Properties", "spread_out"]

Floats = NDArray[np.float64]
FieldValue: TypeAlias = float | str | Distribution | Callable[[ClientId], float] | None
"""A number for all, a distribution or its text, the name of a profile, or a callable ``client_id -> number``."""


class Properties:
    """The properties of a fleet's devices, pure in ``(seed, client_id)``.

    Args:
        given: by the names of :data:`fl_lightning.devices.fields.FIELDS`; ``None`` takes the profile's.
        profile: a name of :data:`fl_lightning.devices.fields.PROFILES`.
        seed: root of everything that is drawn.
    """

    def __init__(self, given: Mapping[str, FieldValue], profile: str, seed: int) -> None:
        if profile not in PROFILES:
            raise MisconfigurationException(f"Expected profile to be one of {sorted(PROFILES)}, got {profile!r}.")
        if not is_integer(seed):
            raise MisconfigurationException(f"DeviceFleet expected seed to be an integer, got {seed!r}. Write seed=0.")
        self.seed = int(seed)
        self._properties = {
            name: PROFILES[profile][name] if value is None else _property(name, value) for name, value in given.items()
        }
        self._trace: Trace | None = None
        self._assign: Literal["id", "draw"] = "id"
        self._last: tuple[Any, NDArray[np.uint64]] = (), client_keys([])

    def values(self, name: str, client_ids: Sequence[ClientId], at: float | Floats = 0.0) -> Floats:
        """Return one property of some devices.

        Args:
            name: of :data:`fl_lightning.devices.fields.FIELDS`.
            client_ids: the devices.
            at: seconds on the clock, which only a trace looks at; one number or one for each device.

        Shape:
            ``(clients,)``
        """
        if self._trace is not None and self._measures(name):
            return self._trace.values(name, self._devices(client_ids), spread_out(at, client_ids))
        value, field = self._properties[name], FIELDS[name]
        if isinstance(value, Distribution):
            drawn = value.quantile(self.draw(client_ids, name))
            return np.clip(drawn, field.low, field.high)
        if callable(value):
            return np.array([_checked(name, value(client_id), client_id) for client_id in client_ids], dtype=np.float64)
        return np.full(len(client_ids), value)

    def device(self, client_id: ClientId) -> Device:
        """Return one client's device."""
        return Device(client_id, **{name: float(self.values(name, [client_id])[0]) for name in FIELDS})

    def draw(self, client_ids: Sequence[ClientId], purpose: str, slot: int | NDArray[np.int64] = 0) -> Floats:
        """Return a uniform number in ``(0, 1)`` for each device, purpose and slot.

        Shape:
            ``(clients,)``
        """
        # twenty properties of the same devices are asked in a row; only what cannot change is remembered
        if client_ids is not self._last[0] or not isinstance(client_ids, tuple | range):
            self._last = client_ids, client_keys(client_ids)
        return uniforms(self._last[1], self.seed, purpose, slot)

    def _devices(self, client_ids: Sequence[ClientId]) -> NDArray[np.int64]:
        assert self._trace is not None
        if self._assign == "draw":
            drawn = self.draw(client_ids, "device of the trace")
            return (drawn * len(self._trace.names)).astype(np.int64)
        found = [self._trace.position(str(client_id)) for client_id in client_ids]
        if None in found:
            raise MisconfigurationException(
                f"The trace has no device for client {client_ids[found.index(None)]!r}; it has "
                f"{len(self._trace.names)} devices, the first is {self._trace.names[0]!r}. Name the devices as "
                "client_ids() does, or use assign='draw'."
            )
        return np.array(found, dtype=np.int64)

    def _measures(self, name: str) -> bool:
        return self._trace is not None and name in self._trace.columns


def spread_out(at: float | Floats, client_ids: Sequence[ClientId]) -> Floats:
    """Return a time for each client."""
    return np.broadcast_to(np.asarray(at, dtype=np.float64), (len(client_ids),))


def _property(name: str, value: Any) -> float | Distribution | Callable[[ClientId], float]:
    if isinstance(value, str) and value in PROFILES:
        return PROFILES[value][name]
    if isinstance(value, str):
        return parse(value)
    if isinstance(value, Distribution) or callable(value):
        found: Distribution | Callable[[ClientId], float] = value
        return found
    return _checked(name, value)


def _checked(name: str, value: Any, client_id: ClientId | None = None) -> float:
    field = FIELDS[name]
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not field.low <= number <= field.high:  # NaN is not within either
        whose = "" if client_id is None else f" of client {client_id!r}"
        unit = f" {field.unit}" if field.unit else ""
        raise MisconfigurationException(
            f"DeviceFleet expected {name}{whose} in [{field.low:g}, {field.high:g}]{unit} ({field.about}), got "
            f"{value!r}. Give a number, a distribution such as 'lognormal(8, 0.7)', 'smartphones', or a callable "
            "client_id -> number."
        )
    return number
