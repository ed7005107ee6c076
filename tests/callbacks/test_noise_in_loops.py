"""GradientNoise in every loop: one client draws the same in both, and each of a group draws its own."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fl_lightning import FedAvg, FederatedTrainer
from fl_lightning.callbacks import GradientNoise
from fl_lightning.types import ClientUpdate

SIZES = (8, 8, 8, 8, 12, 12, 12, 12)
STD = 0.1


class Still(pl.LightningModule):
    """A loss without a slope, so that an update is its noise."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(50, 20)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 0.0 * self.layer(batch[0]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Watch(pl.Callback):
    """Keeps whether clients trained in groups."""

    groups = False

    def on_train_end(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        loop = trainer.federated_fit.federation.engine.client_half.loop
        self.groups = getattr(loop, "groups", False)  # the loop of real Trainers has none


def updates(local_loop: Any, group_size: int) -> dict[Any, Tensor]:
    """Return the noise in each client's update of one round."""
    found: dict[Any, Tensor] = {}

    def remember(update: ClientUpdate) -> float:
        found[update.client_id] = torch.cat([value.flatten() for value in update.delta.values()])
        return 1.0

    data = {
        f"client-{k}": DataLoader(TensorDataset(torch.ones(size, 50)), batch_size=4) for k, size in enumerate(SIZES)
    }
    pl.seed_everything(1, verbose=False)
    watch = Watch()
    trainer = FederatedTrainer(
        algorithm=FedAvg(weights=remember), max_rounds=1, local_loop=local_loop, group_size=group_size, num_lanes=2,
        client_callbacks=[GradientNoise(STD)], callbacks=[watch], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Still(), data)
    assert watch.groups == (group_size > 1)
    return found


def test_both_loops_of_one_client_draw_the_same_numbers() -> None:
    by_lightning, lean = updates("lightning", 1), updates("lean", 1)
    assert all(torch.equal(by_lightning[name], lean[name]) for name in by_lightning)


@pytest.mark.parametrize("group_size", [1, 4])
def test_noise_is_each_clients_own_and_as_strong_as_it_says(group_size: int) -> None:
    found = updates("lean", group_size)
    again = updates("lean", group_size)
    assert len(found) == len(SIZES)
    noises = torch.stack([found[name] for name in sorted(found)])  # (clients, parameters)
    assert torch.equal(noises, torch.stack([again[name] for name in sorted(again)]))
    for noise, size in zip(noises, SIZES, strict=True):
        assert float(noise.std()) == pytest.approx(STD * (size / 4) ** 0.5, rel=0.1)
    # of a thousand independent numbers, a correlation beyond .15 is five deviations away
    assert float((torch.corrcoef(noises) - torch.eye(len(SIZES))).abs().max()) < 0.15
