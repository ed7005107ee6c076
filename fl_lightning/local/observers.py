"""What a client's Trainer is watched by: steps, examples, and the metrics of its last epoch or evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.data import extract_batch_size
from torch.optim import Optimizer

from fl_lightning.callbacks.checks import has_gradient
from fl_lightning.errors import MisconfigurationException
from fl_lightning.local.client_trainer import ClientTrainer
from fl_lightning.metrics import MetricSums, StepSums, capture

__all__ = ["EvaluationObserver", "Observer", "plain_optimizers"]


class Observer(Checkpoint):
    """Counts steps and examples and takes the metrics of the last epoch.

    It is a ``Checkpoint`` because Lightning runs those last: after the module's own ``on_train_epoch_end``, before the
    results are reset.
    """

    def __init__(self, num_examples: int | None, log_every_n_steps: int) -> None:
        self.num_steps = 0
        self.num_gradients = 0
        """Steps in which some parameter had a gradient."""
        self.num_batches = 0
        self.num_examples = num_examples or 0
        self.metrics: MetricSums | None = None
        self._count_examples = num_examples is None
        self._step_sums = StepSums()
        self._handles: list[Any] = []
        self._log_every = log_every_n_steps
        self._logged_a_point = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        def stepped(optimizer: Optimizer, *_: Any) -> None:
            self.num_steps += 1
            self.num_gradients += has_gradient(optimizer)

        # a post hook runs for the steps that happened: a GradScaler skips the optimizer when a gradient overflowed
        self._handles = [
            optimizer.register_step_post_hook(stepped) for optimizer in plain_optimizers(trainer.optimizers)
        ]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.num_batches += 1
        loop = trainer.fit_loop.epoch_loop
        cast(ClientTrainer, trainer).log_every_n_steps = self._log_every
        if (loop._batches_that_stepped + 1) % self._log_every == 0:
            self._logged_a_point = True
        elif loop.batch_progress.is_last_batch and not self._logged_a_point:
            # every round leaves at least one point on the client's curve
            self._logged_a_point = True
            cast(ClientTrainer, trainer).log_every_n_steps = 1
        if self._count_examples and trainer.current_epoch == 0:
            self.num_examples += _num_examples(batch)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._step_sums.observe(trainer.fit_loop.epoch_loop._results)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.metrics = capture(trainer.fit_loop.epoch_loop._results, self._step_sums, self.num_examples)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for handle in self._handles:
            handle.remove()


class EvaluationObserver(Checkpoint):
    """Takes the metrics of an evaluation."""

    def __init__(self) -> None:
        self.metrics: MetricSums | None = None
        self._seen = 0

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._seen += _num_examples(batch)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.metrics = capture(trainer.validate_loop._results, StepSums(), self._seen)


def _num_examples(batch: Any) -> int:
    try:
        return int(extract_batch_size(batch))
    except MisconfigurationException:  # a batch without tensors counts as one example
        return 1


def plain_optimizers(optimizers: Iterable[Any]) -> list[Optimizer]:
    """Return the optimizers inside of Lightning's wrappers."""
    return [getattr(optimizer, "_optimizer", optimizer) for optimizer in optimizers]
