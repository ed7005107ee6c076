"""What a round holds at its peak does not depend on how many clients take part."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from scale_federation import FEATURES, Clients, Linear, fit
from torch import Tensor

from fl_lightning.aggregation import PartialSum

WIDTH = 1237  # no other tensor of the process has so many rows


class Watching(Linear):
    """Counts the tensors of a weight's shape that are alive in each step, its own gradient to come not among them."""

    most = 0

    def __init__(self) -> None:
        super().__init__(outputs=WIDTH)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        Watching.most = max(Watching.most, live_weights())
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class AtTheEndOfClients(pl.Callback):
    def __init__(self) -> None:
        self.most_partial_sums = self.most_weights = 0

    def on_client_end(self, trainer: Any, client_id: Any, done: int, total: int, num_examples: int) -> None:
        partial_sums = [o for o in gc.get_objects() if type(o) is PartialSum and o.num_clients]
        self.most_partial_sums = max(self.most_partial_sums, len(partial_sums))
        self.most_weights = max(self.most_weights, live_weights())


def live_weights() -> int:
    """Return how many storages of a weight's size are alive."""
    shape = (WIDTH, FEATURES)
    tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor) and o.shape == shape]
    return len({tensor.untyped_storage().data_ptr() for tensor in tensors})


@pytest.mark.parametrize("state", ["reset", "keep"])
def test_rounds_leave_nothing_but_their_report(state: str, tmp_path: Path) -> None:
    class Counts(pl.Callback):
        def __init__(self) -> None:
            self.tensors: list[int] = []
            self.objects: list[int] = []

        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            gc.collect()
            objects = gc.get_objects()
            self.objects.append(len(objects))
            self.tensors.append(sum(issubclass(type(o), Tensor) for o in objects))

    counts = Counts()
    fit(
        Clients(range(4)),
        max_rounds=40,
        client_state=state,
        callbacks=[counts],
        logger=True,
        enable_checkpointing=True,
        default_root_dir=tmp_path,
    )
    assert counts.tensors[-1] == counts.tensors[10]
    per_round = (counts.objects[-1] - counts.objects[10]) / 29
    assert per_round < 20, f"{per_round} objects stay behind in each round"
