"""A small federation whose cost is all the house's own, and ways to count that cost without a clock."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fl_lightning import FederatedTrainer

FEATURES = 7


class Linear(pl.LightningModule):
    def __init__(self, outputs: int = 3, logs: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, outputs)
        self.logs = logs

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.layer(batch[0]).square().mean()
        if self.logs:
            self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.layer(batch[0]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)


class Clients:
    """Any number of clients that all have the same examples; what is asked of it is counted."""

    def __init__(self, ids: Sequence[Any], batches: int = 2) -> None:
        self.ids = ids
        self.data = TensorDataset(torch.ones(2 * batches, FEATURES))
        self.calls = {"loader": 0, "size": 0, "val": 0}

    def client_ids(self) -> Sequence[Any]:
        return self.ids

    def client_size(self, client_id: Any) -> int:
        self.calls["size"] += 1
        return len(self.data)

    def client_dataloader(self, client_id: Any) -> DataLoader[Any]:
        self.calls["loader"] += 1
        return DataLoader(self.data, batch_size=2)


class EvaluatedClients(Clients):
    def client_eval_dataloader(self, client_id: Any) -> DataLoader[Any]:
        self.calls["val"] += 1
        return DataLoader(self.data, batch_size=2)


def fit(
    clients: Clients, module: pl.LightningModule | None = None, ckpt_path: Any = None, **arguments: Any
) -> FederatedTrainer:
    """Run a federation without logger, checkpoint or bar, unless the arguments say otherwise."""
    defaults: dict[str, Any] = {
        "max_rounds": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    trainer = FederatedTrainer(**{**defaults, **arguments})
    trainer.fit(module if module is not None else Linear(), datamodule=clients, ckpt_path=ckpt_path)
    return trainer


def num_calls(run: Callable[[], Any]) -> int:
    """Return how many functions, Python's and C's, are called: the interpreter's work, the same in every run."""
    count = 0

    def observe(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(observe)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count
