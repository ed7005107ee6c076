"""Optimizer and scheduler state of a client between its rounds, and its learning rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from fl_lightning.types import Memory

__all__ = ["load_optimizers", "save_optimizers", "scale_learning_rates"]

# learning rates as torch's optimizers and schedulers keep them in a parameter group
_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "base_momentum_lr")


def scale_learning_rates(
    optimizers: Sequence[Optimizer], scheduler_configs: Sequence[Any], factor: float, rate: float | None = None
) -> None:
    """Multiply every learning rate of the optimizers and of their schedulers by ``factor``.

    Args:
        optimizers: the client's optimizers, fresh from ``configure_optimizers``.
        scheduler_configs: Lightning's scheduler configurations.
        factor: from ``client_lr_schedule``.
        rate: replaces the learning rate first (``client_overrides``); the schedule keeps its shape.
    """
    if factor == 1.0 and rate is None:
        return
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            ratio = factor if rate is None else factor * rate / float(group.get("initial_lr", group["lr"]))
            group["fl_ratio"] = ratio
            for key in _RATES:
                if key in group:
                    group[key] = group[key] * ratio
    for config in scheduler_configs:
        scheduler = config.scheduler
        ratios = [group.get("fl_ratio", 1.0) for group in scheduler.optimizer.param_groups]
        for name in ("base_lrs", "_last_lr", "min_lrs"):
            values = getattr(scheduler, name, None)
            if isinstance(values, list) and len(values) == len(ratios):
                setattr(scheduler, name, [value * ratio for value, ratio in zip(values, ratios, strict=True)])
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.pop("fl_ratio", None)


def save_optimizers(optimizers: Sequence[Optimizer], scheduler_configs: Sequence[Any], factor: float) -> Memory:
    """Return the state that ``client_state="keep"`` carries to the client's next round.

    A scheduler goes on counting where it ended; one with a fixed number of steps (``OneCycleLR``) must be given the
    steps of all rounds, not of one.
    """
    return {
        "factor": factor,
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "schedulers": [_primitive(config.scheduler.state_dict()) for config in scheduler_configs],
    }


def load_optimizers(
    optimizers: Sequence[Optimizer], scheduler_configs: Sequence[Any], saved: Memory | None, factor: float
) -> None:
    """Go on from :func:`save_optimizers`; nothing is saved in a client's first round."""
    if saved is None:
        return
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    for config, state in zip(scheduler_configs, saved["schedulers"], strict=True):
        config.scheduler.load_state_dict(state)
    # the saved rates carry that round's factor; this round has its own
    scale_learning_rates(optimizers, scheduler_configs, factor / saved["factor"])


def _primitive(state: dict[str, Any]) -> dict[str, Any]:
    # a LambdaLR keeps its functions in the state dict as None; anything else that is no primitive is built anew
    return {key: value for key, value in state.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str | int) and _is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, int | float | str | bool | torch.Tensor)
