"""Lightning's TQDM progress bar, counting rounds and clients."""

from __future__ import annotations

import sys
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from fl_lightning.reporting.round_clock import RoundClock, is_live, line_is_due, max_rounds, round_line, title
from fl_lightning.types import ClientId, RoundReport

__all__ = ["FederatedTQDMProgressBar"]


class FederatedTQDMProgressBar(TQDMProgressBar):
    """Lightning's TQDM bar over all rounds: ``Round 12/100 |████ | 00:12<01:31, clients 7/10, 5,234 examples/s, …``.

    Validation, test and prediction have Lightning's own bars. Where the output is no terminal, a run prints about
    twenty lines instead of redrawing one.

    Args:
        refresh_rate: clients between two redraws; 0 shows nothing.
        process_position: lines by which the bars are moved down.
        leave: leave a line for every round.
    """

    ROUND_FORMAT = "{desc} |{bar:16}| {elapsed}<{remaining}{postfix}"

    def __init__(self, refresh_rate: int = 1, process_position: int = 0, leave: bool = False) -> None:
        super().__init__(refresh_rate, process_position, leave)
        self._clock = RoundClock()

    @property
    def is_enabled(self) -> bool:
        """Whether bars are drawn; what is printed in their place is not drawn."""
        return super().is_enabled and is_live()

    def init_train_tqdm(self) -> Tqdm:
        return Tqdm(
            desc="Round",
            position=2 * self.process_position,
            disable=self.is_disabled,
            leave=True,
            dynamic_ncols=True,
            file=sys.stdout,
            smoothing=0,
            bar_format=self.ROUND_FORMAT,
        )

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        super().on_train_start(trainer, *_)
        bar = self.train_progress_bar
        bar.total = max_rounds(trainer)
        # rounds of an earlier run took none of this run's time
        bar.initial = bar.n = trainer.current_epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._clock.start()
        self.train_progress_bar.set_description_str(title(trainer), refresh=False)

    def on_client_end(self, trainer: pl.Trainer, client_id: ClientId, done: int, total: int, num_examples: int) -> None:
        """Show that a client of the round is done.

        Args:
            trainer: the federation's Trainer.
            client_id: who is done.
            done: clients of the round that are done, this one included.
            total: clients of the round.
            num_examples: examples that this client trained on.
        """
        self._clock.client_ended(done, total, num_examples)
        if self._should_update(done, total):
            self._draw(trainer, trainer.current_epoch + self._clock.fraction)

    def on_round_end(self, trainer: pl.Trainer, report: RoundReport) -> None:
        """Show the whole round, of all processes."""
        self._clock.round_ended(report)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.is_enabled:
            self._draw(trainer, trainer.current_epoch + 1)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.val_progress_bar.close()
        self.reset_dataloader_idx_tracker()
        if self._train_progress_bar is not None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._draw(trainer, self.train_progress_bar.n)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        text = round_line(self, self._clock, trainer)
        if self.is_enabled:
            self._draw(trainer, trainer.current_epoch + 1)
            if self._leave:
                self.train_progress_bar.write(f"{title(trainer)}: {text}", file=sys.stdout)
        elif super().is_enabled and line_is_due(trainer, self.refresh_rate):
            print(f"{title(trainer)}: {text}", flush=True)  # noqa: T201 — a progress bar's output

    def _draw(self, trainer: pl.Trainer, rounds_done: float) -> None:
        bar = self.train_progress_bar
        if not bar.disable:
            bar.n = rounds_done
            bar.set_postfix_str(round_line(self, self._clock, trainer), refresh=False)
            bar.refresh()
