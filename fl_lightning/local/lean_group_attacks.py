"""Attackers in a group: they train beside honest clients, whose bits must not depend on who is an attacker."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch import Callback

from fl_lightning.callbacks.attacks import LabelFlip, UpdateAttack
from fl_lightning.local.lean_data import TensorBatches
from fl_lightning.local.lean_trainer import NotThisClient
from fl_lightning.types import Tree

__all__ = ["attacks_in_groups", "forge", "poison"]


def attacks_in_groups(callback: Callback) -> bool:
    """Return whether a callback is an attack that a group knows: on labels, or on the update after training."""
    if type(callback) is LabelFlip:
        return True
    hooks = [name for name in dir(Callback) if name.startswith("on_") or name in ("setup", "teardown")]
    return isinstance(callback, UpdateAttack) and all(
        getattr(type(callback), name) is getattr(UpdateAttack, name)
        for name in [*hooks, "begin", "report", "sent", "on_start_pass_batch"]
    )


def poison(batches: TensorBatches, callbacks: Iterable[Callback]) -> None:
    """Exchange the labels of an attacker's examples, all at once instead of batch by batch; its tensors stay.

    Raises:
        NotThisClient: when the labels are not where the attack expects them.
    """
    for callback in callbacks:
        if isinstance(callback, LabelFlip) and callback.task is not None:
            tensors = list(batches.tensors)
            try:
                callback.flip(tensors)
            except Exception as error:
                raise NotThisClient(str(error)) from None
            batches.tensors = tuple(tensors)


def forge(delta: Tree, callbacks: Iterable[Callback]) -> Tree:
    """Return what a client sends instead of what it has trained, which for honest clients is the same object."""
    for callback in callbacks:
        if isinstance(callback, UpdateAttack) and callback.task is not None:
            delta = callback.sent(delta)
    return delta
