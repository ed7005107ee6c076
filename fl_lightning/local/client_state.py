"""Optimizer and scheduler state of a client between its rounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from fl_lightning.callbacks.learning_rates import scale_learning_rates
from fl_lightning.types import Memory

__all__ = ["load_optimizers", "save_optimizers"]


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
