"""Lightning's Rich progress bar, counting rounds and clients."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar

from fl_lightning.reporting.round_clock import (
    RoundClock,
    is_live,
    line_is_due,
    max_rounds,
    round_line,
    shown_metrics,
    title,
)
from fl_lightning.types import ClientId, RoundReport

if TYPE_CHECKING:
    from rich.progress import Task

__all__ = ["FederatedRichProgressBar"]

# Lightning's columns for batches and batches a second, in whose place the rounds' task brings its own words
_OWN_TEXT = {"BatchesProcessedColumn": "clients", "ProcessingSpeedColumn": "rate"}


class FederatedRichProgressBar(RichProgressBar):
    """Lightning's Rich bar over all rounds, with clients done and examples a second in place of batches.

    Validation, test and prediction have Lightning's own bars. Where the output is no terminal, a run prints about
    twenty lines.

    Args:
        refresh_rate: redraws a second; 0 shows nothing.
        leave: leave a line for every round.
        theme: Lightning's ``RichProgressBarTheme``.
        console_kwargs: arguments of the ``rich.console.Console``.
    """

    def __init__(self, refresh_rate: int = 100, leave: bool = False, **arguments: Any) -> None:
        super().__init__(refresh_rate, leave, **arguments)
        self._clock = RoundClock()

    @property
    def is_enabled(self) -> bool:
        """Whether bars are drawn; what is printed in their place is not drawn."""
        return super().is_enabled and (is_live() or bool(self._console_kwargs.get("force_terminal")))

    def configure_columns(self, trainer: pl.Trainer) -> list[Any]:
        return [_with_own_text(column) for column in super().configure_columns(trainer)]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._clock.start()
        if self.is_disabled or self.progress is None:
            return
        if self.train_progress_bar_id is None:
            # rounds of an earlier run took none of this run's time, so they are there from the start
            self.train_progress_bar_id = self.progress.add_task(
                self._title(trainer), total=max_rounds(trainer) or math.inf, completed=trainer.current_epoch
            )
        self._draw(trainer, trainer.current_epoch)

    def on_client_end(self, trainer: pl.Trainer, client_id: ClientId, done: int, total: int, num_examples: int) -> None:
        """Show that a client of the round is done; arguments as for :class:`FederatedTQDMProgressBar`."""
        self._clock.client_ended(done, total, num_examples)
        self._draw(trainer, trainer.current_epoch + self._clock.fraction)

    def on_round_end(self, trainer: pl.Trainer, report: RoundReport) -> None:
        """Show the whole round, of all processes."""
        self._clock.round_ended(report)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._draw(trainer, trainer.current_epoch + 1)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._draw(trainer, trainer.current_epoch + 1)
        if self.is_enabled and self._leave and self.progress is not None:
            self.progress.console.print(self._line(trainer), highlight=False, markup=False)
        elif not self.is_enabled and super().is_enabled and line_is_due(trainer, 1):
            print(self._line(trainer), flush=True)  # noqa: T201 — a progress bar's output

    def _line(self, trainer: pl.Trainer) -> str:
        return f"{title(trainer)}: {round_line(self, self._clock, trainer)}"

    def _title(self, trainer: pl.Trainer) -> str:
        return f"[{self.theme.description}]{title(trainer)}" if self.theme.description else title(trainer)

    def _update_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.is_enabled and self._metric_component is not None:
            self._metric_component.update(dict(shown_metrics(self, trainer, pl_module)))

    def _draw(self, trainer: pl.Trainer, rounds_done: float) -> None:
        if self.is_disabled or self.progress is None or self.train_progress_bar_id is None:
            return
        self.progress.update(
            self.train_progress_bar_id,
            description=self._title(trainer),
            completed=rounds_done,
            clients=self._clock.clients,
            rate=self._clock.rate,
        )
        self._update_metrics(trainer, trainer.lightning_module)
        self.refresh()


def _with_own_text(column: Any) -> Any:
    """Let a column show a task's own text where the task has one."""
    field = _OWN_TEXT.get(type(column).__name__)
    if field is None:
        return column
    from rich.text import Text  # Lightning needs Rich for this bar only

    usual = column.render

    def render(task: Task) -> Any:
        return Text(task.fields[field], style=column.style) if field in task.fields else usual(task)

    column.render = render
    return column
