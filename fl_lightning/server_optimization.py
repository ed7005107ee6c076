"""The server's optimizer and its learning-rate schedule: what the user's functions make, checked, for Lightning."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn import Parameter
from torch.optim import Optimizer, SparseAdam
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fl_lightning.algorithms.base import Algorithm
from fl_lightning.types import RoundReport

__all__ = ["check_server_optimizer", "refresh_checkpoint", "server_optimization", "step_on_plateau"]

_KEYS = {"scheduler", "monitor", "frequency", "strict", "name", "interval"}
_PLATEAU = "lambda optimizer: {'scheduler': ReduceLROnPlateau(optimizer), 'monitor': 'val_loss'}"


def server_optimization(algorithm: Algorithm, parameters: list[Parameter]) -> Any:
    """Return what the server's ``configure_optimizers`` returns.

    Raises:
        MisconfigurationException: for an optimizer that a round cannot feed, or a schedule that is none.
    """
    try:
        optimizer = algorithm.server_optimizer(parameters)
    except (RuntimeError, TypeError, ValueError) as error:
        raise MisconfigurationException(
            f"server_optimizer cannot be made for the {len(parameters)} parameters that travel: {error} Use one that "
            "takes parameters of any shape, such as server_optimizer=torch.optim.SGD or Adam (FedAvgM, FedAdam)."
        ) from error
    check_server_optimizer(optimizer)
    if algorithm.server_lr_scheduler is None:
        return optimizer
    return {"optimizer": optimizer, "lr_scheduler": _schedule(algorithm.server_lr_scheduler(optimizer))}


def check_server_optimizer(optimizer: Optimizer) -> None:
    """Raise for an optimizer that asks for the gradient again, or for another kind: a round gives one, and dense.

    Raises:
        MisconfigurationException: when its ``step`` cannot do without a closure, as ``torch.optim.LBFGS``, or for
            ``torch.optim.SparseAdam``.

    Example:
        >>> import torch
        >>> check_server_optimizer(torch.optim.Adam([torch.zeros(1)]))
    """
    instead = "server_optimizer=torch.optim.SGD or Adam (FedAvgM, FedAdam)"
    if isinstance(optimizer, SparseAdam):
        raise MisconfigurationException(
            f"{type(optimizer).__name__} takes sparse gradients only, and the mean update of a round is dense. Use "
            f"{instead}; SparseAdam can train the clients."
        )
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise MisconfigurationException(
            f"{type(optimizer).__name__} evaluates its closure several times in a step, and a round of clients gives "
            "one gradient for one model. Use an optimizer that steps on one gradient on the server, such as "
            f"{instead}; {type(optimizer).__name__} can train the clients."
        )


def _schedule(made: Any) -> dict[str, Any]:
    """Return Lightning's configuration of the schedule that ``server_lr_scheduler`` made, one step a round."""
    config = dict(made) if isinstance(made, Mapping) else {"scheduler": made}
    scheduler = config.get("scheduler")
    # the command line's ReduceLROnPlateau (lightning.pytorch.cli) knows what it watches
    config.setdefault("monitor", getattr(scheduler, "monitor", None))
    if not isinstance(scheduler, LRScheduler | ReduceLROnPlateau) or config.keys() - _KEYS:
        raise MisconfigurationException(
            "Expected server_lr_scheduler to return a torch learning-rate scheduler, or a dict with 'scheduler' and "
            f"perhaps 'monitor', 'frequency', 'strict' and 'name', got {made!r}. Write for example "
            f"server_lr_scheduler=lambda optimizer: StepLR(optimizer, step_size=10), or {_PLATEAU}."
        )
    if isinstance(scheduler, ReduceLROnPlateau) and config["monitor"] is None:
        raise MisconfigurationException(
            "server_lr_scheduler returns ReduceLROnPlateau, and nobody said which value it watches. Write "
            f"server_lr_scheduler={_PLATEAU}, with any value that a round logs, or on the command line "
            "class_path: lightning.pytorch.cli.ReduceLROnPlateau with monitor: val_loss."
        )
    # Lightning would step a plateau's schedule after the round's checkpoint, which then could not be resumed from
    return {"name": "server_lr", **config, "interval": "epoch", "reduce_on_plateau": False}


def step_on_plateau(trainer: pl.Trainer, report: RoundReport, every: int) -> None:
    """Show the round's value to a schedule that watches one; a round that has not measured it does not count.

    Args:
        trainer: of the federation.
        report: of the round that ends, with its values.
        every: the watched value is there at the latest in each ``every``-th round.

    Raises:
        MisconfigurationException: when a round that trained and evaluated has no such value.
    """
    for config in trainer.lr_scheduler_configs:
        if not isinstance(config.scheduler, ReduceLROnPlateau) or (report.round + 1) % config.frequency:
            continue
        value = report.metrics.get(str(config.monitor))
        if value is not None:
            config.scheduler.step(value)
        elif config.strict and report.cohort and (report.round + 1) % every == 0:
            raise MisconfigurationException(
                f"server_lr_scheduler watches {config.monitor!r}, which round {report.round} has no value of. It has "
                f"{', '.join(map(repr, sorted(report.metrics))) or 'none'}. Give the name of one of them as 'monitor', "
                "give the trainer what logs it (a validation loader, evaluate_clients=True), or pass 'strict': False."
            )


def refresh_checkpoint(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Write the states again that a plateau's schedule changed while the checkpoint was being made."""
    configs = trainer.lr_scheduler_configs
    if "lr_schedulers" in checkpoint and any(isinstance(config.scheduler, ReduceLROnPlateau) for config in configs):
        checkpoint["lr_schedulers"] = [config.scheduler.state_dict() for config in configs]
        checkpoint["optimizer_states"] = [trainer.strategy.optimizer_state(o) for o in trainer.optimizers]
