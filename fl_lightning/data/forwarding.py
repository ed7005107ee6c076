"""A population that is no ``LightningDataModule`` of the package in use, as one."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningDataModule

from fl_lightning.data.datamodule import _HOOKS, _defines

__all__ = ["as_lightning_datamodule"]


class _Forwarding(LightningDataModule):
    """Calls the hooks of the wrapped object; hooks that it does not have count as not overridden."""

    def __init__(self, wrapped: Any) -> None:
        super().__init__()
        self.wrapped = wrapped
        for hook in _HOOKS:
            if _defines(wrapped, hook):
                setattr(self, hook, getattr(wrapped, hook))

    def setup(self, stage: str | None = None) -> None:
        self._call("setup", stage)

    def teardown(self, stage: str | None = None) -> None:
        self._call("teardown", stage)

    def _call(self, hook: str, stage: str | None) -> None:
        function = getattr(self.wrapped, hook, None)
        if callable(function):
            function(stage)


def as_lightning_datamodule(data: Any) -> LightningDataModule:
    """Return ``data`` if Lightning takes it as a data module, else a data module that forwards to it.

    Example:
        >>> class Sites:
        ...     def client_ids(self): return ["a"]
        ...     def client_dataloader(self, client_id): return [1]
        >>> isinstance(as_lightning_datamodule(Sites()), LightningDataModule)
        True
    """
    return data if isinstance(data, LightningDataModule) else _Forwarding(data)
