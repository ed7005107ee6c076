"""The server's precision: full for weights, sums and optimizer, the user's for evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, Precision
from torch import nn

__all__ = ["ServerPrecision"]


class ServerPrecision(Precision):
    """Wraps the precision plugin of the user for the outer Trainer.

    A GradScaler on the server's step would shrink the update, and half-precision weights would swallow it; so the
    server's training part runs plain. Evaluation runs in the user's precision. Under ``bf16-true`` and ``16-true`` it
    runs in autocast of that type, so that the global weights keep their bits.

    Args:
        inner: the plugin that Lightning made from the user's ``precision``.
    """

    def __init__(self, inner: Precision) -> None:
        super().__init__()
        self.inner = inner
        self.precision = inner.precision

    def convert_module(self, module: nn.Module) -> nn.Module:
        return self.inner.convert_module(module) if isinstance(self.inner, DoublePrecision) else module

    def convert_input(self, data: Any) -> Any:
        return data if isinstance(self.inner, HalfPrecision) else self.inner.convert_input(data)

    def convert_output(self, data: Any) -> Any:
        return data if isinstance(self.inner, HalfPrecision) else self.inner.convert_output(data)

    def module_init_context(self) -> AbstractContextManager[Any]:
        return (
            self.inner.module_init_context()
            if isinstance(self.inner, DoublePrecision)
            else super().module_init_context()
        )

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return (
            self.inner.tensor_init_context()
            if isinstance(self.inner, DoublePrecision)
            else super().tensor_init_context()
        )

    @contextmanager
    def _evaluation(self, own: AbstractContextManager[Any]) -> Iterator[None]:
        if isinstance(self.inner, HalfPrecision):
            device = "cuda" if torch.cuda.is_available() else "cpu"
            with torch.autocast(device, dtype=self.inner._desired_input_dtype):
                yield
        else:
            with own:
                yield

    def val_step_context(self) -> Any:
        return self._evaluation(self.inner.val_step_context())

    def test_step_context(self) -> Any:
        return self._evaluation(self.inner.test_step_context())

    def predict_step_context(self) -> Any:
        return self._evaluation(self.inner.predict_step_context())
