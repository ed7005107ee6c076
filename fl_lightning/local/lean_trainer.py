"""What a module finds at ``self.trainer`` in the lean loop: a few true answers, and a refusal for everything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import Precision
from torch.optim import Optimizer

__all__ = ["LeanTrainer", "NeedsResults", "NotPlain", "NotThisClient", "Progress"]


class NotPlain(BaseException):
    """The lean loop does not offer what the module asked for; LightningLoop takes over, for good.

    It is no ``Exception``, so that a module's own ``except Exception`` does not swallow it.
    """


class NeedsResults(BaseException):
    """A value that only Lightning's own collection can hold: the client starts again with a ``ResultLog``."""


class NotThisClient(NotPlain):
    """This client brings something that needs a real Trainer; the next one may not."""


@dataclass(slots=True)
class Progress:
    """Where a client's training is, and what it is made of."""

    epochs: int | None = 1
    steps: int | None = None
    accumulate: int = 1
    log_every: int = 50
    epoch: int = 0
    global_step: int = 0
    num_batches: int | None = None
    is_last_batch: bool = False
    optimizers: list[Optimizer] = field(default_factory=list)
    schedulers: list[Any] = field(default_factory=list)
    open_data: Callable[[], int] = lambda: 0
    refused: str | None = None

    def refuse(self, reason: str) -> NoReturn:
        """Hand the module over to LightningLoop, even if it swallows the exception."""
        self.refused = reason
        raise NotPlain(reason)


class LeanTrainer:
    """Stands for the ``lightning.Trainer`` of a plain module.

    Args:
        progress: where the training is.
        callbacks: the client's callbacks.
        loggers: the logger of the client's curve, or none.
        device: where the client trains.
        precision: Lightning's precision plugin of the clients.
        loader: the client's train loader.

    Example:
        >>> from lightning.pytorch.plugins import Precision
        >>> trainer = LeanTrainer(Progress(epochs=3), [], [], torch.device("cpu"), Precision())
        >>> trainer.max_epochs, trainer.global_step, trainer.is_global_zero
        (3, 0, True)
        >>> trainer.save_checkpoint
        Traceback (most recent call last):
        ...
        fl_lightning.local.lean_trainer.NotPlain: it uses self.trainer.save_checkpoint
    """

    world_size = num_nodes = num_devices = 1
    global_rank = local_rank = node_rank = 0
    is_global_zero = training = True
    validating = testing = predicting = evaluating = sanity_checking = barebones = False
    fast_dev_run = should_stop = interrupted = received_sigterm = False
    min_epochs = min_steps = datamodule = progress_bar_callback = None

    def __init__(
        self,
        progress: Progress,
        callbacks: Sequence[Callback],
        loggers: Sequence[Any],
        device: torch.device,
        precision: Precision,
        loader: Any = None,
    ) -> None:
        own = vars(self)
        own["_progress"] = progress
        own["callbacks"] = list(callbacks)
        own["loggers"] = list(loggers)
        own["precision"] = precision.precision
        own["precision_plugin"] = precision
        own["train_dataloader"] = loader
        own["strategy"] = _LeanStrategy(progress, device)
        own["results"] = None
        own["_logger_connector"] = None

    @property
    def _results(self) -> Any:
        """Where ``LightningModule.log`` looks."""
        results = vars(self)["results"]
        if results is None:
            raise NeedsResults
        return results

    @property
    def logger(self) -> Any:
        return self.loggers[0] if self.loggers else None

    @property
    def current_epoch(self) -> int:
        return self._own.epoch

    @property
    def global_step(self) -> int:
        return self._own.global_step

    @property
    def max_epochs(self) -> int:
        return -1 if self._own.epochs is None else self._own.epochs

    @property
    def max_steps(self) -> int:
        return -1 if self._own.steps is None else self._own.steps

    @property
    def accumulate_grad_batches(self) -> int:
        return self._own.accumulate

    @property
    def is_last_batch(self) -> bool:
        return self._own.is_last_batch

    @property
    def optimizers(self) -> list[Optimizer]:
        return self._own.optimizers

    @property
    def lr_scheduler_configs(self) -> list[Any]:
        return self._own.schedulers

    @property
    def num_training_batches(self) -> int:
        if self._own.num_batches is None:
            self._own.refuse("it uses self.trainer.num_training_batches before training begins")
        return self._own.num_batches

    @property
    def estimated_stepping_batches(self) -> int:
        """Optimizer steps of this round, as ``lightning.Trainer`` counts them."""
        own = self._own
        if own.epochs is None:
            return self.max_steps
        steps = -(-own.open_data() // own.accumulate) * max(own.epochs, 1)
        return steps if own.steps is None else min(steps, own.steps)

    @property
    def _own(self) -> Progress:
        progress: Progress = vars(self)["_progress"]
        return progress

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self._own.refuse(f"it uses self.trainer.{name}")

    def __setattr__(self, name: str, value: Any) -> None:
        self._own.refuse(f"it sets self.trainer.{name}")

    def take_results(self, results: Any, connector: Any) -> None:
        """Let ``LightningModule.log`` write to Lightning's own collection."""
        vars(self).update(results=results, _logger_connector=connector)


class _LeanStrategy:
    """One device and no process group."""

    def __init__(self, progress: Progress, device: torch.device) -> None:
        self._progress = progress
        self.root_device = device

    def reduce(self, tensor: Any, *_: Any, **__: Any) -> Any:
        return tensor

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        used = "self.optimizers()" if "optimizers" in name else f"self.trainer.strategy.{name}"
        self._progress.refuse(f"it uses {used}")
