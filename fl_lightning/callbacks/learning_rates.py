"""Learning rates of a client's optimizers and of their schedulers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

__all__ = ["scale_learning_rates"]

# learning rates as torch's optimizers and schedulers keep them in a parameter group
_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "base_momentum_lr")


def scale_learning_rates(
    optimizers: Sequence[Optimizer], scheduler_configs: Sequence[Any], factor: float, rate: float | None = None
) -> None:
    """Multiply every learning rate of the optimizers and of their schedulers by ``factor``.

    Args:
        optimizers: the client's optimizers, fresh from ``configure_optimizers``.
        scheduler_configs: Lightning's scheduler configurations.
        factor: from ``client_lr_schedule``, or an algorithm's own.
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
