"""Clients of unequal speed, and a short training on them, for the tests of asynchronous algorithms."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from algorithm_zoo import Net, clients
from quadratics import quiet_trainer
from torch.utils.data import DataLoader, TensorDataset

SECONDS = {"site-0": 1.0, "site-1": 2.503, "site-2": 7.01, "site-3": 2.017, "site-4": 0.753}  # never two at once
SIZES = (12, 20, 7, 9, 16)


class Fleet:
    """Clients of unequal speed, whatever they have to do."""

    def __init__(self, seconds: dict[str, float] | None = None) -> None:
        self.times = SECONDS if seconds is None else seconds

    def seconds(self, client_id: str, num_steps: int, num_bytes_down: int, num_bytes_up: int, at: float) -> float:
        return self.times[client_id]


def whole_batches(sizes: tuple[int, ...] = SIZES) -> dict[str, DataLoader[Any]]:
    """Return clients that see all of their data in every step, in one order."""
    return {
        name: DataLoader(TensorDataset(*loader.dataset.tensors), batch_size=len(loader.dataset))  # type: ignore[attr-defined, arg-type]
        for name, loader in clients(sizes).items()
    }


def train(algorithm: Any, rounds: int = 9, data: Any = None, module: Any = None, **arguments: Any) -> tuple[Any, Any]:
    pl.seed_everything(5, verbose=False)
    module = module if module is not None else Net()
    trainer = quiet_trainer(algorithm=algorithm, max_rounds=rounds, **arguments)
    trainer.fit(module, data if data is not None else whole_batches())
    return trainer, module
