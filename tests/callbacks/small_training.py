"""A small classifier, its data and its training by hand, for the callbacks of local training."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Net(pl.LightningModule):
    def __init__(self, optimizer: Any = None) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 3)
        self.optimizer = optimizer or (lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9))

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.head(torch.tanh(self.body(x))), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


def data(num_examples: int = 24, seed: int = 0, batch_size: int = 4) -> DataLoader[Any]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(num_examples, 6, generator=draw)
    return DataLoader(TensorDataset(x, torch.randint(3, (num_examples,), generator=draw)), batch_size=batch_size)


def plain_fit(
    module: pl.LightningModule,
    *callbacks: Callback,
    epochs: int = 2,
    loader: Any = None,
    resume: Any = None,
    **arguments: Any,
) -> pl.Trainer:
    trainer = pl.Trainer(max_epochs=epochs, callbacks=list(callbacks), **{**QUIET, **arguments})
    trainer.fit(module, loader if loader is not None else data(), ckpt_path=resume)
    return trainer


def by_hand(module: Net, change: Any, epochs: int = 2, batches: Any = None) -> Net:
    """Train with plain torch; ``change(module, start, loss)`` returns the loss to descend, or edits gradients."""
    module = copy.deepcopy(module)
    start = [p.detach().clone() for p in module.parameters()]
    optimizer = module.configure_optimizers()
    for _ in range(epochs):
        for batch in batches or data():
            optimizer.zero_grad()
            loss, edit = change(module, start, module.loss(batch))
            loss.backward()
            edit()
            optimizer.step()
    return module


def same(left: nn.Module, right: nn.Module, tolerance: float = 1e-6) -> bool:
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return all(torch.allclose(a, b, rtol=0, atol=tolerance) for a, b in pairs)
