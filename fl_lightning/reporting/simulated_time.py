"""Curves over virtual time: what a round logged, at the second of the virtual clock at which the round was complete."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from fl_lightning.reporting.client_curves import tensorboard_dir
from fl_lightning.types import RoundReport

__all__ = ["SIMULATED_TIME", "cut_after", "write_over_time"]

SIMULATED_TIME = "simulated_time"
"""The run beside the server's; its steps are simulated seconds."""
_EVENTS = "events.out.tfevents.0000000000.simulated"
_CLOCK = "simulated_seconds"
_TICK = 1e-6
"""Seconds between rounds that are complete at one moment, so that a resume knows which of them it has seen."""


def write_over_time(loggers: Sequence[Logger], report: RoundReport) -> None:
    """Add a round's values to the run over virtual time of every TensorBoard logger; a round without a clock has none.

    TensorBoard's *step* axis then is simulated seconds, rounded, and its *relative* axis is simulated time.

    Args:
        loggers: the federation's loggers.
        report: the round's report, complete.
    """
    seconds = report.metrics.get(_CLOCK)
    folders = [folder for folder in map(tensorboard_dir, loggers) if folder is not None]
    if seconds is None or not folders:
        return
    from fl_lightning.reporting.event_files import AppendingSummaryWriter  # TensorBoard is slow to import

    writer = AppendingSummaryWriter()
    for folder in folders:
        writer.open(folder / SIMULATED_TIME / _EVENTS)
        for name, value in report.metrics.items():
            if name != _CLOCK and math.isfinite(value):
                writer.add_scalar(name, value, round(seconds), walltime=seconds + report.round * _TICK)
    writer.close()


def cut_after(folder: Path, round: int, clock: float) -> None:
    """Remove the points of a round and later ones.

    Args:
        folder: the run over virtual time, which need not exist.
        round: the first round that goes.
        clock: seconds on the virtual clock when the round before it was complete.
    """
    path = folder / _EVENTS
    if not path.exists():
        return
    from fl_lightning.reporting.event_files import cut_events

    def stays(event: Any) -> bool:
        return bool(event.WhichOneof("what") != "summary" or event.wall_time < clock + (round - 0.5) * _TICK)

    cut_events(path, stays)
