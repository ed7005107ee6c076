"""Lightning's ``validate``, ``test`` and ``predict`` for a trainer that knows the data of its last fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from fl_lightning.data.forwarding import as_lightning_datamodule
from fl_lightning.inputs import is_datamodule, plain_module
from fl_lightning.local.quiet import without_hints
from fl_lightning.resuming import best_to_evaluate, last_to_evaluate
from fl_lightning.server import as_lightning

__all__ = ["EvaluatingTrainer"]


class EvaluatingTrainer(pl.Trainer):
    """Evaluates the global model on the server's data, by default those of the last fit."""

    _last_data: tuple[Any, Any] | None = None

    def validate(
        self,
        model: pl.LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: Any = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Validate the global model on the server's data; without data, on the last fit's.

        Args:
            model: the module; without one, that of the last fit.
            dataloaders: validation loaders, or a data module.
            ckpt_path: a checkpoint to load first: a path, "best" or "last".
            verbose: print the results.
            datamodule: a data module with ``val_dataloader``.
            weights_only: as in Lightning.
        """
        with self._evaluating("val", model, dataloaders, datamodule, ckpt_path) as (path, data):
            return super().validate(model, ckpt_path=path, verbose=verbose, weights_only=weights_only, **data)

    def test(
        self,
        model: pl.LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: Any = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Test the global model on the server's data; without data, on the last fit's.

        Args:
            model: the module; without one, that of the last fit.
            dataloaders: test loaders, or a data module.
            ckpt_path: a checkpoint to load first: a path, "best" or "last".
            verbose: print the results.
            datamodule: a data module with ``test_dataloader``.
            weights_only: as in Lightning.
        """
        with self._evaluating("test", model, dataloaders, datamodule, ckpt_path) as (path, data):
            return super().test(model, ckpt_path=path, verbose=verbose, weights_only=weights_only, **data)

    def predict(
        self,
        model: pl.LightningModule | None = None,
        dataloaders: Any = None,
        datamodule: Any = None,
        return_predictions: bool | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Predict with the global model on the server's data; without data, on the last fit's.

        Args:
            model: the module; without one, that of the last fit.
            dataloaders: loaders, or a data module.
            datamodule: a data module with ``predict_dataloader``.
            return_predictions: as in Lightning.
            ckpt_path: a checkpoint to load first: a path, "best" or "last".
            weights_only: as in Lightning.
        """
        with self._evaluating("predict", model, dataloaders, datamodule, ckpt_path) as (path, data):
            return super().predict(
                model, return_predictions=return_predictions, ckpt_path=path, weights_only=weights_only, **data
            )

    @contextmanager
    def _evaluating(
        self, stage: str, model: Any, dataloaders: Any, datamodule: Any, ckpt_path: str | Path | None
    ) -> Iterator[tuple[str | Path | None, dict[str, Any]]]:
        """Let Lightning accept the module inside the block; give the checkpoint and the data that it is called with."""
        data = self._evaluation_data(stage, dataloaders, datamodule)
        if ckpt_path == "last" and self._last_data is None:
            ckpt_path = last_to_evaluate(self.loggers, self.checkpoint_callbacks)
        elif ckpt_path == "best" and not any(getattr(c, "best_model_path", "") for c in self.checkpoint_callbacks):
            ckpt_path = best_to_evaluate(self.loggers, self.checkpoint_callbacks)
        module = model if model is not None else self.lightning_module
        with ExitStack() as stack:
            stack.enter_context(without_hints())
            if module is not None:
                stack.enter_context(as_lightning(plain_module(module)))
            yield ckpt_path, data

    def _evaluation_data(self, stage: str, dataloaders: Any, datamodule: Any) -> dict[str, Any]:
        if datamodule is None and is_datamodule(dataloaders):
            dataloaders, datamodule = None, dataloaders
        if dataloaders is None and datamodule is None and self._last_data is not None:
            data, val = self._last_data
            if isinstance(data, Mapping):
                dataloaders = val if stage == "val" else None
            else:
                datamodule = data
        if datamodule is not None:
            return {"dataloaders": dataloaders, "datamodule": as_lightning_datamodule(datamodule)}
        return {"dataloaders": dataloaders}
