"""Pictures of a fleet in TensorBoard: who takes part, how full batteries are, what time it is where devices are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_lightning.data import ClientPopulation
from fl_lightning.devices import DeviceBuffer, DeviceClasses, DeviceFleet, DeviceRounds
from fl_lightning.devices.classes import CLASSES
from fl_lightning.devices.rounds import ABANDONED, LATE, NOT_NEEDED
from fl_lightning.devices.trips import EMPTY, GAVE_UP, OFFLINE
from fl_lightning.reporting.charts import RoundCharts
from fl_lightning.types import ClientId, RoundReport

__all__ = ["DeviceCharts"]

_LOOKED_AT = 999
"""Devices whose batteries stand for the population's, evenly over its ids."""
_LOST = "|".join(reason.replace(" ", "_") for reason in (GAVE_UP, OFFLINE, EMPTY, LATE, NOT_NEEDED, ABANDONED))
_SECTIONS: dict[str, dict[str, list[Any]]] = {
    "Devices": {
        "Reports: part of the slow, medium and fast third": ["Multiline", ["^devices/share/"]],
        "Sent work, and reported in time": ["Multiline", ["^devices/sent$", "^devices/reports$"]],
        "Sent work, and lost": ["Multiline", [f"^devices/dropped/({_LOST})$"]],
        "Asked, and not eligible": ["Multiline", [f"^devices/dropped/(?!({_LOST})$)"]],
        "Battery when sent work: median, 10% to 90%": [
            "Margin",
            ["devices/battery/median", "devices/battery/p10", "devices/battery/p90"],
        ],
        "Time of day where the devices are": ["Multiline", ["^devices/local_hour$"]],
        "Seconds of a round, and of waiting for devices": [
            "Multiline",
            ["^devices/round_seconds$", "^devices/wait_seconds$"],
        ],
        "Energy in Wh (estimate)": ["Multiline", ["^devices/energy_wh_estimate$"]],
    }
}


class DeviceCharts:
    """Draws a fleet beside the other pictures of a round; without a fleet it draws nothing.

    Args:
        charts: the federation's pictures, whose writers and layout these share.
        fleet: devices of the clients, or ``None``.
        schedule: who works when.
        population: the clients.
    """

    def __init__(self, charts: RoundCharts, fleet: Any, schedule: Any, population: ClientPopulation) -> None:
        self._charts = charts
        self._fleet = fleet if isinstance(fleet, DeviceFleet) else None
        self._rounds = schedule if isinstance(schedule, DeviceRounds | DeviceBuffer) else None
        self._population = population

    def by_class(self, name: str, values: Mapping[ClientId, float]) -> dict[str, float]:
        """Return a metric's mean over slow, medium and fast devices, and give it a chart.

        Args:
            name: ``"clients/<metric>"``.
            values: each client's own value.
        """
        if self._fleet is None:
            return {}
        found = DeviceClasses(self._fleet, self._population.client_ids()).means(name, values)
        if found:
            tags = [f"^{re.escape(f'{name}/{device_class}')}$" for device_class in CLASSES]
            title = f"{name.removeprefix('clients/')} on slow, medium and fast devices"
            self._charts.add_sections({"Devices": {title: ["Multiline", tags]}})
        return found

    def round(self, report: RoundReport) -> None:
        """Add a round's histograms: reports by device, batteries of the population and of the cohort, hours of day."""
        if self._fleet is None or self._rounds is None or not (writers := self._charts.writers()):
            return
        self._charts.add_sections(_SECTIONS)
        ids = self._population.client_ids()
        some = ids[:: max(1, -(-len(ids) // _LOOKED_AT))]
        at = report.metrics["simulated_seconds"]
        batteries = self._fleet.battery(some, at, self._rounds.participants)
        reports = np.array(list(self._rounds.participants.counts().values()), dtype=np.float64)
        for writer in writers:
            writer.add_histogram("devices/battery_of_everyone", batteries, report.round, bins=np.linspace(0, 1, 21))
            writer.add_histogram(
                "devices/battery_when_sent_work", self._rounds.tallies.battery, report.round, bins=np.linspace(0, 1, 21)
            )
            edges = np.arange(max(reports.max(initial=0.0), 9.0) + 2) - 0.5  # one bin for each number of reports
            writer.add_histogram("devices/reports_of_a_participant", reports, report.round, bins=edges)
            _add_hours(writer, self._rounds.tallies.by_hour, report.round)


def _add_hours(writer: Any, counts: NDArray[np.int64], round: int) -> None:
    middles = np.arange(24) + 0.5
    writer.add_histogram_raw(
        "devices/hour_of_reports",
        min=0.0,
        max=24.0,
        num=int(counts.sum()),
        sum=float((counts * middles).sum()),
        sum_squares=float((counts * middles**2).sum()),
        bucket_limits=(np.arange(24) + 1.0).tolist(),
        bucket_counts=counts.tolist(),
        global_step=round,
    )
