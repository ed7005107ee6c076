"""Why clients did not deliver, in one line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from fl_lightning.types import ClientId, RoundReport

__all__ = ["counted", "round_summary", "summary"]

_COUNTS = "devices/dropped/"


def summary(dropped: Mapping[ClientId, str]) -> str:
    """Return how many clients were lost for each reason, the most frequent first.

    Example:
        >>> summary({1: "offline", 2: "low battery", 3: "low battery"})
        '2 low battery, 1 offline'
    """
    return counted(Counter(dropped.values()))


def round_summary(report: RoundReport) -> str:
    """Return a round's reasons; empty when everyone delivered."""
    # a report names a bounded number of the devices that a schedule asked, and its metrics count all of them
    by_reason = {
        name.removeprefix(_COUNTS).replace("_", " "): int(value)
        for name, value in report.metrics.items()
        if name.startswith(_COUNTS)
    }
    return counted(Counter(by_reason)) if by_reason else summary(report.dropped)


def counted(counts: Counter[str]) -> str:
    """Return counts in one line, the largest first."""
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{count} {reason}" for reason, count in ordered if count)
