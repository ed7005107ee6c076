"""What the progress bars say of a round, and when they say it."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from fl_lightning.schedules.reasons import round_summary
from fl_lightning.types import RoundReport

__all__ = ["RoundClock", "is_live", "line_is_due", "max_rounds", "metric_texts", "round_line", "shown_metrics", "title"]

_LINES = 20  # of a whole run, where the output is a file and no terminal
_SHOWN = 4  # metrics that have place on a line of a terminal

_REASONS = 3  # why clients did not deliver, the most frequent


class RoundClock:
    """How far a round is: clients done, and examples a second."""

    def __init__(self) -> None:
        self.done = self.total = 0
        self._num_examples = 0
        self._started = time.monotonic()
        # until the first client of a round is done, the rate is that of the round before
        self.rate = ""

    def start(self) -> None:
        """Begin a round."""
        self.done = self._num_examples = 0
        self._started = time.monotonic()

    def client_ended(self, done: int, total: int, num_examples: int) -> None:
        """Count a client; the rate stands still after the last one, because the server's own work is no examples."""
        self.done, self.total = done, total
        self._num_examples += num_examples
        seconds = time.monotonic() - self._started
        if seconds > 0:
            self.rate = f"{self._num_examples / seconds:,.0f} examples/s"

    def round_ended(self, report: RoundReport) -> None:
        """Show what all processes did together; until then it is this one's share."""
        self.done = len(report.cohort)
        self.total = self.done + len(report.skipped) + len(report.dropped)
        if report.seconds > 0:
            self.rate = f"{report.num_examples / report.seconds:,.0f} examples/s"

    @property
    def fraction(self) -> float:
        """The part of the cohort that is done, in [0, 1]."""
        return self.done / self.total if self.total else 0.0

    @property
    def clients(self) -> str:
        """``clients 7/10``."""
        return f"clients {self.done}/{self.total}"


def max_rounds(trainer: pl.Trainer) -> int | None:
    """Return the rounds of the whole run, ``None`` when only something else ends it."""
    return trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else None


def title(trainer: pl.Trainer) -> str:
    """Return ``Round 12/100``; people count from one."""
    rounds = max_rounds(trainer)
    return f"Round {trainer.current_epoch + 1}" + (f"/{rounds}" if rounds is not None else "")


def shown_metrics(bar: ProgressBar, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Mapping[str, Any]:
    """Return what is logged with ``prog_bar=True``, and of the rest as much as there is place for."""
    metrics = bar.get_metrics(trainer, pl_module)
    place = max(0, _SHOWN - len(trainer.progress_bar_metrics))
    others = [name for name in trainer.callback_metrics if "/" not in name and name not in metrics]
    others.sort(key=lambda name: not name.startswith("val"))  # what the global model achieves comes first
    return {**metrics, **{name: float(trainer.callback_metrics[name]) for name in others[:place]}}


def metric_texts(metrics: Mapping[str, Any]) -> list[str]:
    """Return ``name=value`` of each metric, in Lightning's format, which keeps its width."""
    return [f"{name}={value if isinstance(value, str) else Tqdm.format_num(value)}" for name, value in metrics.items()]


def is_live() -> bool:
    """Return whether the output is redrawn, as a terminal's is and a file's is not."""
    # a running Rich display puts a file of its own, which is no terminal, before the output
    output = getattr(sys.stdout, "rich_proxied_file", sys.stdout)
    # a notebook is no terminal, but redraws; its interpreter has a prompt
    return bool(output.isatty()) or hasattr(sys, "ps1")


def line_is_due(trainer: pl.Trainer, refresh_rate: float) -> bool:
    """A file gets at most about twenty lines in a run, evenly spaced, the last round's among them."""
    round, rounds = trainer.current_epoch + 1, max_rounds(trainer)
    every = max(1, int(refresh_rate), math.ceil((rounds or 1000) / _LINES))
    return round % every == 0 or round == rounds or trainer.should_stop


def round_line(bar: ProgressBar, clock: RoundClock, trainer: pl.Trainer) -> str:
    """Return ``clients 7/10, 5,234 examples/s, val_acc=0.913``."""
    parts = [clock.clients, clock.rate, *metric_texts(shown_metrics(bar, trainer, trainer.lightning_module))]
    return ", ".join(part for part in [*parts, _dropped(trainer)] if part)


def _dropped(trainer: pl.Trainer) -> str:
    """Return ``dropped: 3 low battery, 2 offline``, once a round's clients are through."""
    fit = getattr(trainer, "_fit", None)
    report = fit.newest_report if fit is not None else None
    reasons = round_summary(report).split(", ")[:_REASONS] if report is not None else []
    return f"dropped: {', '.join(reasons)}" if any(reasons) else ""
