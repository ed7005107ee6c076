"""Lightning comes as two packages with classes of their own: ``lightning`` and ``pytorch_lightning``."""

from __future__ import annotations

from typing import Any

__all__ = ["from_lightning", "lightning_base"]

_PACKAGES = ("lightning.", "pytorch_lightning.")


def from_lightning(kind: type) -> bool:
    """Return whether a class is defined in Lightning itself, in either package.

    Example:
        >>> from lightning.pytorch.callbacks import EarlyStopping
        >>> from_lightning(EarlyStopping), from_lightning(type("Mine", (EarlyStopping,), {"__module__": "mine"}))
        (True, False)
    """
    return kind.__module__.startswith(_PACKAGES)


def lightning_base(value: Any, name: str) -> type | None:
    """Return Lightning's class of that name that a value derives from, or ``None``.

    The package that is not in use is not imported: its classes are known by name.

    Args:
        value: any object.
        name: of the class, for example ``"LightningModule"``, ``"LightningDataModule"`` or ``"Callback"``.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> lightning_base(BoringModel(), "LightningModule").__name__, lightning_base("text", "Callback")
        ('LightningModule', None)
    """
    return next((base for base in type(value).__mro__ if base.__name__ == name and from_lightning(base)), None)
