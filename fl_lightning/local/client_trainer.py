"""The ``lightning.Trainer`` of a client, made once per process and used for every client in turn."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loops import _TrainingEpochLoop
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.callback_connector import _CallbackConnector
from lightning.pytorch.trainer.states import TrainerFn, TrainerState, TrainerStatus
from torch import nn
from torch.optim import Optimizer

from fl_lightning.local.client_results import ClientResults

__all__ = ["ClientTrainer"]


class _ClientStrategy(SingleDeviceStrategy):
    """One device, no process group; the client's start is loaded between ``setup`` and the optimizers."""

    before_setup: Callable[[nn.Module], None] | None = None
    after_optimizers: Callable[[list[Optimizer], list[Any]], None] | None = None

    def setup(self, trainer: pl.Trainer) -> None:
        if self.before_setup is not None and self.model is not None:
            self.before_setup(self.model)
        super().setup(trainer)

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        super().setup_optimizers(trainer)
        if self.after_optimizers is not None:
            self.after_optimizers(self.optimizers, self.lr_scheduler_configs)


_NOTHING: AbstractContextManager[None] = nullcontext()


class _NoProfiler(PassThroughProfiler):
    """Lightning's profiler that does nothing, without a new generator for each of the 24 hooks of a step."""

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # type: ignore[override]
        return _NOTHING


class _ClientEpochLoop(_TrainingEpochLoop):
    """Reads the signature of ``training_step`` once a client and not in every step."""

    _takes_batch_idx: bool | None = None

    def _build_kwargs(self, kwargs: OrderedDict[str, Any], batch: Any, batch_idx: int) -> OrderedDict[str, Any]:
        if self._takes_batch_idx is None:
            kwargs = super()._build_kwargs(kwargs, batch, batch_idx)
            self._takes_batch_idx = "batch_idx" in kwargs
            return kwargs
        kwargs["batch"] = batch
        if self._takes_batch_idx:
            kwargs["batch_idx"] = batch_idx
        return kwargs


class _ClientCallbacks(_CallbackConnector):
    """Adds the module's own callbacks, except what belongs to the server."""

    trainer: ClientTrainer

    def _attach_model_callbacks(self) -> None:
        given = {id(callback) for callback in self.trainer.callbacks}
        super()._attach_model_callbacks()
        kept = []
        for callback in self.trainer.callbacks:
            if id(callback) not in given:
                if isinstance(callback, Checkpoint):
                    continue  # checkpoints are of the global model
                if isinstance(callback, EarlyStopping) and not self._validates():
                    callback.strict = False  # what it monitors may exist on the server only
            kept.append(callback)
        self.trainer.callbacks = kept

    def _validates(self) -> bool:
        trainer = self.trainer
        return trainer.limit_val_batches != 0 and trainer.fit_loop.epoch_loop.val_loop._data_source.is_defined()


class ClientTrainer(pl.Trainer):
    """A ``lightning.Trainer`` for one client after the other.

    Args:
        device: the device of this process.
        **arguments: Lightning's Trainer arguments that describe local training.
    """

    callbacks: list[Callback]
    log_every_n_steps: int

    def __init__(self, device: torch.device, **arguments: Any) -> None:
        super().__init__(
            accelerator=_accelerator(device),
            devices=1 if device.index is None else [device.index],
            strategy=_ClientStrategy(device),
            logger=False,
            callbacks=[],
            max_epochs=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_autolog_hparams=False,
            num_sanity_val_steps=0,
            profiler=_NoProfiler(),
            **arguments,
        )
        self._callback_connector = _ClientCallbacks(self)
        self._accumulate = self.accumulate_grad_batches
        self._limit_val_batches = self.limit_val_batches
        self._log_every = self.log_every_n_steps
        # the federation's own signal handlers stay in place while a client trains
        self._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        self._signal_connector.teardown = lambda: None  # type: ignore[method-assign]

    @property
    def client_strategy(self) -> _ClientStrategy:
        strategy = self.strategy
        assert isinstance(strategy, _ClientStrategy)
        return strategy

    def renew(
        self,
        epochs: int | None,
        steps: int | None,
        callbacks: Sequence[Callback],
        logger: Logger | None,
        log_offset: int,
    ) -> None:
        """Forget the client before: new loops, callbacks and counters.

        Args:
            epochs: local epochs, or ``None`` when ``steps`` counts.
            steps: local optimizer steps, or ``None``.
            callbacks: this client's own copies.
            logger: where ``self.log`` goes, or ``None``.
            log_offset: steps of earlier rounds, so that a client's curve goes on where it ended.
        """
        self.fit_loop = _FitLoop(self, max_epochs=-1 if epochs is None else epochs)
        self.fit_loop.epoch_loop = _ClientEpochLoop(self, max_steps=-1 if steps is None else steps)
        self.fit_loop.epoch_loop._batches_that_stepped = log_offset
        self.fit_loop.epoch_loop._results = ClientResults(training=True)
        self.validate_loop._results = ClientResults(training=False)
        self.state = TrainerState()
        self.should_stop = False
        self.accumulate_grad_batches = self._accumulate
        self.log_every_n_steps = self._log_every
        self.callbacks = self._callback_connector._reorder_callbacks(list(callbacks))
        self.loggers = [] if logger is None else [logger]
        self._logger_connector.reset_metrics()
        self.strategy.optimizers = []
        self.strategy.lr_scheduler_configs = []

    def fit_client(self, module: pl.LightningModule, validates: bool, **data: Any) -> None:
        """Run Lightning's fit; errors come out as they are (a Ctrl-C stays a ``KeyboardInterrupt``).

        Args:
            module: the client's module.
            validates: whether the client brings validation data; a ``val_dataloader`` of the module is the server's.
            **data: the data arguments of Lightning's ``fit``.
        """
        self.limit_val_batches = self._limit_val_batches if validates else 0
        self.strategy._lightning_module = module
        self.state.fn = TrainerFn.FITTING
        self.state.status = TrainerStatus.RUNNING
        self.training = True
        self._guarded(self._fit_impl, module, **data)

    def validate_client(self, module: pl.LightningModule, dataloaders: Any) -> None:
        """Run Lightning's validate without printing."""
        self.limit_val_batches = self._limit_val_batches
        self.strategy._lightning_module = module
        self.state.fn = TrainerFn.VALIDATING
        self.state.status = TrainerStatus.RUNNING
        self.validating = True
        self._guarded(self._validate_impl, module, dataloaders, None, False, None)

    def _guarded(self, run: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        try:
            run(*arguments, **named)
        except BaseException as error:
            # Lightning's own wrapper would turn Ctrl-C into an exit of the whole program
            call._interrupt(self, error)
            with suppress(Exception):  # a fit that broke while it was built fails here too; the first error says why
                self._teardown()
            self.state.stage = None
            raise


def _accelerator(device: torch.device) -> str:
    return {"cuda": "gpu"}.get(device.type, device.type)
