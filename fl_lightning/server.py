"""The server is the user's module for the time of a fit.

A dynamic subclass ``Federated[MyModule]`` replaces what Lightning calls while it trains; validation, test and predict
hooks, checkpoints, ``isinstance(pl_module, MyModule)`` and callbacks see the user's module as always. Nothing is
wrapped, so ``self.log``, ``self.trainer`` and the names in the state dict are the module's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.loops import _EvaluationLoop
from lightning.pytorch.trainer.connectors.logger_connector import _LoggerConnector
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fl_lightning.metrics import alone
from fl_lightning.server_optimization import refresh_checkpoint

__all__ = ["RoundBatch", "RoundLoader", "as_lightning", "evaluate_whole", "federated", "same_start", "twin_of"]


class RoundBatch:
    """The one batch of the one step of a round. It carries no data: the clients have theirs."""


class RoundLoader:
    """The server's train loader: one batch an epoch, because one epoch of the outer Trainer is one round."""

    def __iter__(self) -> Iterator[RoundBatch]:
        yield RoundBatch()

    def __len__(self) -> int:
        return 1


class _Server:
    """What the dynamic subclass puts before the user's class."""

    trainer: Any

    # ---- a training step is a round ----------------------------------------------------------------------------

    @property
    def automatic_optimization(self) -> bool:
        return True

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.trainer.federated_fit.run_round()
        return torch.zeros((), device=self.device, requires_grad=True)  # type: ignore[attr-defined]

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        # Lightning zeroes gradients between training_step and backward; what is written here reaches the optimizer
        self.trainer.federated_fit.write_gradient()

    def configure_optimizers(self) -> Any:
        return self.trainer.federated_fit.configure_optimizers()

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Optimizer, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        optimizer.zero_grad()

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if not isinstance(scheduler, ReduceLROnPlateau):  # which steps when the round has its values
            scheduler.step()

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """The server's update is never clipped; clipping belongs to local training."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.trainer.federated_fit.commit_round()

    def on_train_epoch_end(self) -> None:
        self.trainer.federated_fit.close_round()

    def on_train_epoch_start(self) -> None:
        self.trainer.federated_fit.open_round()

    # ---- hooks of local training: clients run them -------------------------------------------------------------

    def on_train_start(self) -> None:
        pass

    def on_train_end(self) -> None:
        pass

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        pass

    def on_before_backward(self, loss: Tensor) -> None:
        pass

    def on_after_backward(self) -> None:
        pass

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        pass

    def on_before_zero_grad(self, optimizer: Optimizer) -> None:
        pass

    # ---- the batch of a round carries no data ------------------------------------------------------------------

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        if isinstance(batch, RoundBatch):
            return batch
        return super()._on_before_batch_transfer(batch, dataloader_idx)  # type: ignore[misc]

    def _apply_batch_transfer_handler(self, batch: Any, device: Any = None, dataloader_idx: int = 0) -> Any:
        if isinstance(batch, RoundBatch):
            return batch
        return super()._apply_batch_transfer_handler(batch, device=device, dataloader_idx=dataloader_idx)  # type: ignore[misc]

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        self.trainer.federated_fit.start()
        super().on_fit_start()  # type: ignore[misc]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        checkpoint["fl_lightning"] = self.trainer.federated_state()
        refresh_checkpoint(self.trainer, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.trainer.federated_fit.check_and_take(checkpoint)
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]


class _WholeEvaluation(_EvaluationLoop):
    """Evaluates as if the process were alone; callbacks that save or stop still see the group."""

    def _evaluation_step(self, *args: Any, **kwargs: Any) -> None:
        with alone():
            super()._evaluation_step(*args, **kwargs)

    def _on_evaluation_epoch_end(self) -> None:
        with alone():
            super()._on_evaluation_epoch_end()


class _WholeMetrics(_LoggerConnector):
    @property
    def metrics(self) -> Any:
        with alone():
            return super().metrics


def evaluate_whole(trainer: pl.Trainer) -> None:
    """Let every process evaluate all of the server's data, without synchronising what it finds.

    Lightning shards evaluation data over processes, pads the shards with repeated examples and averages over ranks
    only what asks for it: values would depend on the number of processes.
    """
    if trainer.world_size == 1:
        return
    trainer._accelerator_connector.use_distributed_sampler = False
    trainer._logger_connector.__class__ = _WholeMetrics
    for loop in (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop):
        loop.__class__ = _WholeEvaluation


_twins: dict[type, type] = {}


def twin_of(module: Any) -> pl.LightningModule:
    """Make a ``pytorch_lightning`` module an instance of ``lightning``'s class too, and return it.

    The two packages hold the same code in different classes, and Lightning's Trainer insists on its own.
    """
    module.__class__ = _twin_class(type(module))
    twin: pl.LightningModule = module
    return twin


def _twin_class(user_class: type) -> type:
    if issubclass(user_class, pl.LightningModule):
        return user_class
    if user_class not in _twins:
        members = {"__module__": user_class.__module__, "__qualname__": user_class.__qualname__}
        _twins[user_class] = type(
            user_class.__name__, (user_class, pl.LightningModule), members | _base_hooks(user_class)
        )
    return _twins[user_class]


def _base_hooks(user_class: type) -> dict[str, Any]:
    """Return ``lightning``'s version of everything that the user's class takes unchanged from ``pytorch_lightning``.

    Lightning asks by comparison with its own base class which hooks are overridden.
    """
    hooks = {}
    for name in dir(user_class):
        provider = next((base for base in user_class.__mro__ if name in base.__dict__), object)
        if (
            provider.__module__.startswith(("pytorch_lightning.", "lightning_fabric."))
            and not name.startswith("__")
            and hasattr(pl.LightningModule, name)
        ):
            hooks[name] = inspect.getattr_static(pl.LightningModule, name)
    return hooks


_classes: dict[type, type] = {}


def _server_class(user_class: type) -> type:
    if user_class not in _classes:
        bases = (_Server, _twin_class(user_class))
        name = f"Federated[{user_class.__name__}]"
        members = {"__module__": user_class.__module__, "__doc__": user_class.__doc__, "_user_class": user_class}
        _classes[user_class] = type(name, bases, members)
    return _classes[user_class]


@contextmanager
def federated(module: Any) -> Iterator[pl.LightningModule]:
    """Make the user's module the server inside the block.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> module = BoringModel()
        >>> with federated(module) as server:
        ...     print(type(server).__name__, server is module, isinstance(server, BoringModel))
        Federated[BoringModel] True True
        >>> type(module).__name__
        'BoringModel'
    """
    user_class = type(module)
    # methods that were set on the instance (torch.compile does) would hide the server's
    hidden = {name: module.__dict__.pop(name) for name in list(module.__dict__) if name in _Server.__dict__}
    try:
        module.__class__ = _server_class(user_class)
    except TypeError as error:
        raise MisconfigurationException(
            f"{user_class.__name__} cannot become a federation's server: {error}. Remove __slots__ from the class."
        ) from error
    try:
        yield module
    finally:
        module.__class__ = user_class
        module.__dict__.update(hidden)


@contextmanager
def as_lightning(module: Any) -> Iterator[pl.LightningModule]:
    """Let Lightning's Trainer accept a module of either package inside the block."""
    user_class = type(module)
    try:
        yield twin_of(module)
    finally:
        module.__class__ = user_class


def same_start(module: pl.LightningModule) -> None:
    """Give every process the first one's weights."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.detach(), src=0)
