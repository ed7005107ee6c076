"""Pictures of a federation in TensorBoard: histograms and spreads over clients, and who has which data."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from fl_lightning.data.picture import partition_figure
from fl_lightning.errors import MisconfigurationException
from fl_lightning.local.recorder import Record, scalar_of
from fl_lightning.metrics import higher_is_better, spread
from fl_lightning.reporting.client_curves import is_logger
from fl_lightning.reporting.simulated_time import write_over_time
from fl_lightning.schedules.reasons import round_summary
from fl_lightning.types import ClientId, RoundReport

__all__ = ["RoundCharts", "add_client_histograms", "client_layout", "spread_metrics"]

_SHOWN = ("min", "median", "max", "worst_decile", "std")
_BINS = 30  # linear; TensorBoard's own bins grow by a tenth each and show ten clients as ten needles
_STEPS = np.arange(_BINS + 1, dtype=np.float64)


class _ClientResult(Protocol):
    """What :meth:`RoundCharts.round` reads of a client's result."""

    client_id: ClientId
    num_examples: int
    num_bytes_up: int
    update_norm: float
    records: list[Record]


def add_client_histograms(writer: Any, round: int, values: Mapping[str, Mapping[ClientId, float]]) -> None:
    """Add one histogram over clients for each name.

    Args:
        writer: a ``SummaryWriter``.
        round: the 0-based round, which is the step.
        values: by tag and client; what is not finite is left out, as is a histogram of nothing.
    """
    for tag, by_client in values.items():
        finite = [float(value) for value in by_client.values() if math.isfinite(value)]
        if finite:
            _add_histogram(writer, tag, np.asarray(finite), round)


def _add_histogram(writer: Any, tag: str, values: Any, round: int) -> None:
    """Do what ``writer.add_histogram(tag, values, round, bins=_BINS)`` does, at a fifth of its time."""
    low, high = float(values.min()), float(values.max())
    left, right = (low, high) if high > low else (low - 0.5, high + 0.5)
    edges = _STEPS * ((right - left) / _BINS) + left
    edges[-1] = right  # np.linspace, at a tenth of its time
    places = np.minimum(np.searchsorted(edges, values, side="right"), _BINS)  # the last bin has both of its ends
    counts = np.bincount(places, minlength=_BINS + 1)
    # TensorBoard reads right ends only: an empty bin, which nothing lies in, brings the first left end
    first, last = int(counts.nonzero()[0][0]), int(counts.nonzero()[0][-1])
    writer.add_histogram_raw(
        tag, low, high, len(values), float(values.sum()), float(values.dot(values)),
        edges[first - 1 : last + 1].tolist(), counts[first - 1 : last + 1].tolist(), round,
    )  # fmt: skip


def spread_metrics(name: str, values: Mapping[ClientId, float]) -> dict[str, float]:
    """Return ``<name>/min``, ``/median``, ``/max``, ``/worst_decile`` and ``/std`` of one metric over clients.

    The worst decile is the mean of the worst tenth of the clients, at least one; whether low or high is worst is read
    off the name (:func:`fl_lightning.metrics.higher_is_better`).

    Example:
        >>> spread_metrics("clients/val_acc", {"a": 0.5, "b": 0.75, "c": 1.0})["clients/val_acc/worst_decile"]
        0.5
    """
    numbers = spread(values, higher_is_better=higher_is_better(name))
    return {f"{name}/{number}": numbers[number] for number in _SHOWN}


def client_layout(names: Iterable[str]) -> dict[str, dict[str, list[Any]]]:
    """Return the layout of TensorBoard's *Custom scalars* tab, for ``SummaryWriter.add_custom_scalars``.

    Each metric has a margin chart (the median between minimum and maximum over clients) and a chart of its global
    value beside the median and the worst decile of clients.

    Args:
        names: metrics whose spread is logged, ``"clients/val_acc"`` for example.

    Example:
        >>> charts = client_layout(["clients/val_acc"])["Spread over clients"]
        >>> charts["val_acc: median, minimum to maximum"][1][0]
        'clients/val_acc/median'
    """
    layout: dict[str, dict[str, list[Any]]] = {"Spread over clients": {}, "Who is left behind": {}}
    for name in sorted(names):
        title = name.removeprefix("clients/")
        margin = ["Margin", [f"{name}/median", f"{name}/min", f"{name}/max"]]
        layout["Spread over clients"][f"{title}: median, minimum to maximum"] = margin
        # a multiline chart takes patterns, unanchored ones unless they say otherwise
        tags = [f"^{re.escape(tag)}$" for tag in (name, f"{name}/median", f"{name}/worst_decile")]
        layout["Who is left behind"][f"{title}: global, median and worst tenth of clients"] = ["Multiline", tags]
    return layout


class RoundCharts:
    """Draws the federation's pictures in every TensorBoard logger; without one it only computes.

    Args:
        loggers: the federation's loggers.
    """

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self._loggers = [logger for logger in loggers if is_logger(logger, "TensorBoardLogger")]
        self._in_layout: set[str] = set()
        self._sections: dict[str, dict[str, list[Any]]] = {}

    def round(self, report: RoundReport, results: Iterable[_ClientResult]) -> None:
        """Add the round's histograms over clients, and ``num_bytes/up`` and ``num_bytes/down`` of the whole cohort.

        ``round/update_norm``, ``round/num_examples`` and ``round/num_bytes_up``, a client's upload, are over all
        clients of the cohort; ``round/<name>`` over those whose curves are kept, each with its last value.

        Args:
            report: the round's report; only clients of its cohort are drawn.
            results: what came back from the clients.
        """
        if not self._loggers:
            return
        cohort = set(report.cohort)
        norms: dict[ClientId, float] = {}
        sizes: dict[ClientId, float] = {}
        uploads: dict[ClientId, float] = {}
        last: dict[str, dict[ClientId, float]] = {}
        for result in results:
            if result.client_id not in cohort:
                continue
            norms[result.client_id] = result.update_norm
            sizes[result.client_id] = result.num_examples
            uploads[result.client_id] = result.num_bytes_up
            for name, value, _ in filter(None, map(scalar_of, result.records)):
                last.setdefault(f"round/{name}", {})[result.client_id] = value
        for writer in self.writers():
            over_cohort = {"round/update_norm": norms, "round/num_examples": sizes, "round/num_bytes_up": uploads}
            add_client_histograms(writer, report.round, {**last, **over_cohort})
            writer.add_scalar("num_bytes/up", report.num_bytes_up, report.round)
            writer.add_scalar("num_bytes/down", report.num_bytes_down, report.round)
            if report.dropped:
                writer.add_text("round/dropped", round_summary(report), report.round)

    def spread(self, name: str, values: Mapping[ClientId, float]) -> dict[str, float]:
        """Return the spread of a metric over clients, to be logged, and give it its charts.

        Args:
            name: ``"clients/<metric>"``, under which the global value is logged.
            values: each client's own value.
        """
        if name not in self._in_layout:
            # one layout counts in a run, the newest; it is written again only when it has grown
            self._in_layout.add(name)
            self._write_layout()
        return spread_metrics(name, values)

    def add_sections(self, sections: Mapping[str, dict[str, list[Any]]]) -> None:
        """Add charts to the *Custom scalars* tab, by section and title; what is there already is not written again."""
        merged = {name: {**self._sections.get(name, {}), **charts} for name, charts in sections.items()}
        if any(self._sections.get(name) != charts for name, charts in merged.items()):
            self._sections.update(merged)
            self._write_layout()

    def _write_layout(self) -> None:
        layout = client_layout(self._in_layout) if self._in_layout else {}
        for writer in self.writers():
            writer.add_custom_scalars({**self._sections, **layout})

    def over_time(self, report: RoundReport) -> None:
        """Add the values of a round, which is complete, to the run over virtual time."""
        write_over_time(self._loggers, report)

    def partition(self, source: Any) -> None:
        """Add the picture of who has which labels, if the data know their labels and matplotlib is installed.

        Args:
            source: the data; drawn if it has ``label_counts()`` as :class:`fl_lightning.data.FederatedDataModule` has.
        """
        if not self._loggers or not hasattr(source, "label_counts"):
            return
        try:
            client_ids, classes, counts = source.label_counts()
            distances = source.distance_to_global() if hasattr(source, "distance_to_global") else None
            for writer in self.writers():
                writer.add_figure("data/partition", partition_figure(client_ids, classes, counts, distances), 0)
        except (MisconfigurationException, ModuleNotFoundError) as error:
            rank_zero_info(f"No picture of the partition: {error}")

    def writers(self) -> list[Any]:
        """Return the ``SummaryWriter`` of every TensorBoard logger."""
        loggers: list[Any] = self._loggers
        return [logger.experiment for logger in loggers]
