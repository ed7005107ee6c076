"""What a round costs in energy and carbon dioxide: estimates from the device model, not measurements."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fl_lightning.devices.fleet import DeviceFleet
from fl_lightning.errors import MisconfigurationException
from fl_lightning.types import ClientId

__all__ = ["CARBON_GRAMS_PER_KWH", "EnergyModel"]

CARBON_GRAMS_PER_KWH = 480.0
"""Grams of CO2 for a kilowatt-hour of the world's electricity, rounded (Ember, *Electricity Review 2024*: 481)."""
Floats = NDArray[np.float64]


class EnergyModel:
    r"""Estimates watt-hours from the seconds that devices train and their radios are on.

    .. math:: E_k = \frac{P^\text{train}_k t^\text{train}_k + P^\text{radio}_k t^\text{radio}_k}{3600}, \qquad
        \text{CO}_2 = \frac{I}{1000} \sum_k \frac{E_k}{\eta}

    Only devices are counted: neither the network between them and the server, nor the server, nor their manufacture.

    Args:
        carbon_grams_per_kwh: intensity :math:`I` of the electricity, >= 0.
        charger_efficiency: part :math:`\eta` of the socket's energy that reaches the battery, in (0, 1].

    Raises:
        MisconfigurationException: for numbers outside of these ranges.

    Example:
        >>> fleet = DeviceFleet(train_watts=3.6, radio_watts=1.8)
        >>> EnergyModel().watt_hours(fleet, ["a"], np.array([1000.0]), np.array([200.0])).tolist()
        [1.1]

    References:
        Qiu et al., *A First Look into the Carbon Footprint of Federated Learning*, 2023, section 3, has the same terms
        and adds routers and idle time.
    """

    def __init__(self, carbon_grams_per_kwh: float = CARBON_GRAMS_PER_KWH, charger_efficiency: float = 0.85) -> None:
        if not (0 <= carbon_grams_per_kwh < float("inf") and 0 < charger_efficiency <= 1):
            raise MisconfigurationException(
                "EnergyModel expected carbon_grams_per_kwh >= 0 and charger_efficiency in (0, 1], got "
                f"carbon_grams_per_kwh={carbon_grams_per_kwh!r} and charger_efficiency={charger_efficiency!r}."
            )
        self.carbon_grams_per_kwh = float(carbon_grams_per_kwh)
        self.charger_efficiency = float(charger_efficiency)

    def watt_hours(
        self, fleet: DeviceFleet, client_ids: Sequence[ClientId], train_seconds: Floats, radio_seconds: Floats
    ) -> Floats:
        """Return what each device took out of its battery or its charger.

        Shape:
            ``(clients,)``
        """
        watts, radio = fleet.values("train_watts", client_ids), fleet.values("radio_watts", client_ids)
        return (watts * train_seconds + radio * radio_seconds) / 3600.0

    def metrics(self, fleet: DeviceFleet, client_ids: Sequence[ClientId], watt_hours: float) -> dict[str, float]:
        """Return a round's estimates for its report; their names say that they are estimates.

        Where no device of the round has watts nothing is known, which is not 0: there are none then.

        Args:
            fleet: the devices.
            client_ids: who was sent work, at least one.
            watt_hours: of all of them.
        """
        if not any(fleet.values(name, client_ids).any() for name in ("train_watts", "radio_watts")):
            return {}
        grams = watt_hours / self.charger_efficiency * self.carbon_grams_per_kwh / 1000.0
        return {"devices/energy_wh_estimate": watt_hours, "devices/co2_g_estimate": grams}
