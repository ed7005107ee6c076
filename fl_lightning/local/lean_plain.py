"""What makes a module plain: the loop that calls it directly does everything that Lightning would do for it.

The rule is an allow-list. A hook that a later Lightning adds is unknown here and sends its module to LightningLoop.
"""

from __future__ import annotations

from collections.abc import Iterable
from inspect import getattr_static, signature
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision, Precision
from torch import nn

from fl_lightning.local.settings import LocalSettings
from fl_lightning.packages import lightning_base

__all__ = ["lightning_module", "not_plain", "overrides", "strange_callback"]

_TRAINING_HOOKS = (
    "setup",
    "on_fit_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
    "teardown",
)
# local training without validation data never calls these
_ELSEWHERE = (
    *(f"{stage}_{what}" for stage in ("validation", "test", "predict") for what in ("step",)),
    *(f"{stage}_dataloader" for stage in ("train", "val", "test", "predict")),
    *(
        f"on_{stage}_{when}"
        for stage in ("validation", "test", "predict")
        for when in (
            "start", "end", "epoch_start", "epoch_end", "batch_start", "batch_end", "model_eval", "model_train",
            "model_zero_grad",
        )
    ),
    *("on_sanity_check_start", "on_sanity_check_end", "on_save_checkpoint", "on_load_checkpoint"),
    *("state_dict", "load_state_dict", "on_exception"),
)  # fmt: skip
_MODULE_ALLOWED = frozenset((*_TRAINING_HOOKS, *_ELSEWHERE, "training_step", "configure_optimizers", "forward"))
_CALLBACK_ALLOWED = frozenset((*_TRAINING_HOOKS, *_ELSEWHERE, "on_before_optimizer_step", "state_key"))
_ARGUMENTS = frozenset(
    [
        *("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "limit_train_batches"),
        *("limit_val_batches", "log_every_n_steps", "deterministic", "benchmark", "inference_mode", "precision"),
        "plugins",  # the precision plugin that is used is looked at by itself
    ]
)
_NEUTRAL: dict[str, tuple[Any, ...]] = {"overfit_batches": (0, 0.0), "detect_anomaly": (False,), "profiler": (None,)}


def not_plain(module: pl.LightningModule, settings: LocalSettings, precision: Precision) -> str | None:
    """Return what keeps a module from the lean loop, or ``None`` for a plain one.

    Args:
        module: the clients' module.
        settings: how clients train.
        precision: the precision plugin of the clients' Trainer.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel, ManualOptimBoringModel
        >>> not_plain(BoringModel(), LocalSettings(), Precision())
        >>> not_plain(ManualOptimBoringModel(), LocalSettings(), Precision())
        'ManualOptimBoringModel uses manual optimization'
    """
    name = type(module).__name__
    base = lightning_module(module)
    if base is None:
        return f"{name} is no LightningModule"
    if not module.automatic_optimization:
        return f"{name} uses manual optimization"
    strange = sorted(hook for hook in overrides(module, base) if hook not in _MODULE_ALLOWED)
    if strange:
        return f"{name} overrides {', '.join(strange)}"
    if "dataloader_iter" in signature(module.training_step).parameters:
        return f"{name}.training_step takes the loader's iterator"
    if getattr(module, "_compiler_ctx", None) is not None:
        return f"{name} is compiled by torch.compile"
    return _strange_arguments(settings) or _strange_precision(precision)


def strange_callback(callbacks: Iterable[Callback]) -> str | None:
    """Return which callback does more than observe or correct, or ``None``.

    Example:
        >>> from lightning.pytorch.callbacks import GradientAccumulationScheduler, Timer
        >>> strange_callback([Timer()]) is None
        False
        >>> strange_callback([GradientAccumulationScheduler({0: 2})])
        'the callback GradientAccumulationScheduler comes with Lightning and works on a real Trainer'
    """
    for callback in callbacks:
        kind = type(callback)
        if kind.__module__.startswith(("lightning.pytorch.", "pytorch_lightning.")):
            return f"the callback {kind.__name__} comes with Lightning and works on a real Trainer"
        hooks = [name for name in vars(Callback) if not name.startswith("__") and name not in _CALLBACK_ALLOWED]
        strange = sorted(name for name in hooks if getattr_static(kind, name, None) is not vars(Callback)[name])
        if strange:
            return f"the callback {kind.__name__} uses {', '.join(strange)}"
    return None


def overrides(part: Any, base: type) -> set[str]:
    """Return the names that ``base`` defines beyond ``nn.Module`` and that ``part`` has in a version of its own."""
    own, kind = vars(part), type(part)
    names = {name for ancestor in base.__mro__ for name in vars(ancestor) if not hasattr(nn.Module, name)}
    found = set()
    for name in names:
        if name.startswith("__"):
            continue
        theirs = getattr_static(base, name)
        if getattr_static(kind, name) is not theirs or (name in own and callable(theirs)):
            found.add(name)
    return found


def lightning_module(module: nn.Module) -> type | None:
    """Return the ``LightningModule`` that a module derives from: ``lightning``'s or ``pytorch_lightning``'s."""
    if isinstance(module, pl.LightningModule):  # also as the twin of a `pytorch_lightning` module
        return pl.LightningModule
    return lightning_base(module, "LightningModule")


def _strange_arguments(settings: LocalSettings) -> str | None:
    for name, value in settings.trainer_arguments.items():
        if name not in _ARGUMENTS and value not in _NEUTRAL.get(name, ()):
            return f"{name}={value!r} needs a real Trainer"
    return None


def _strange_precision(precision: Precision) -> str | None:
    if type(precision) is Precision:
        return None
    if type(precision) is MixedPrecision and precision.scaler is None:
        return None
    return f"precision {precision.precision!r} scales gradients or converts the weights"
