"""``Embedding(sparse=True)`` trains as a dense one does, whatever corrects its gradients."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from small_training import QUIET
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fl_lightning import FederatedTrainer
from fl_lightning.algorithms import FedAvg, FedDyn, FedProx, MimeLite, Scaffold
from fl_lightning.callbacks import GradientClip, ProximalTerm


class Words(pl.LightningModule):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(8, 4, sparse=sparse), nn.Linear(4, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.table(batch[0]).mean(1)), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def clients() -> dict[str, DataLoader[Any]]:
    draw = torch.Generator().manual_seed(0)
    return {
        name: DataLoader(
            TensorDataset(torch.randint(6, (9, 5), generator=draw), torch.randint(3, (9,), generator=draw)),
            batch_size=3,
        )
        for name in "abc"
    }


def trained(sparse: bool, algorithm: Any, loop: str, callbacks: Any) -> Words:
    torch.manual_seed(0)
    module = Words(sparse)
    trainer = FederatedTrainer(
        algorithm=algorithm, max_rounds=2, local_epochs=2, local_loop=loop, client_callbacks=callbacks, **QUIET
    )
    trainer.fit(module, clients())
    return module


@pytest.mark.parametrize("loop", ["lightning", "auto"])
@pytest.mark.parametrize(
    ("make", "callbacks"),
    [
        (lambda: FedProx(0.5), []),
        (lambda: Scaffold("I"), []),
        (lambda: Scaffold("II"), []),
        (lambda: MimeLite(0.9), []),
        (lambda: FedDyn(0.1), []),
        (FedAvg, [GradientClip(max_norm=0.1)]),
        (FedAvg, [GradientClip(value=0.02)]),
        (FedAvg, [ProximalTerm(0.5), GradientClip(max_norm=0.1)]),
    ],
)
def test_a_sparse_table_learns_as_a_dense_one(make: Any, callbacks: Any, loop: str) -> None:
    dense, sparse = (trained(kind, make(), loop, callbacks) for kind in (False, True))
    free = trained(False, FedAvg(), loop, [])
    assert torch.allclose(sparse.table.weight, dense.table.weight, atol=1e-6)
    assert torch.allclose(sparse.head.weight, dense.head.weight, atol=1e-6)
    assert not torch.allclose(sparse.table.weight, free.table.weight, atol=1e-4)
