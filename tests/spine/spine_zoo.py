"""Small modules, seeded data and the ways to train them that the tests of the spine compare."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fl_lightning.seeding import seed_everywhere, seed_for
from fl_lightning.trainer import FederatedTrainer

ROOT_SEED = 7
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
TEACHER = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))


def examples(num: int, seed: int) -> TensorDataset:
    """Return points labelled by a fixed linear teacher."""
    x = torch.randn(num, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x @ TEACHER).argmax(1))


def loader(num: int = 20, seed: int = 1, batch_size: int = 8, shuffle: bool = True, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(examples(num, seed), batch_size=batch_size, shuffle=shuffle, **kwargs)


def sites(num_clients: int = 5, **kwargs: Any) -> dict[str, DataLoader[Any]]:
    """Return clients of 11, 18, 25, … examples: unequal, with unequal last batches."""
    return {f"s{k}": loader(11 + 7 * k, seed=k + 1, **kwargs) for k in range(num_clients)}


def val_loader(num: int = 60) -> DataLoader[Any]:
    return loader(num, seed=99, batch_size=25, shuffle=False)


class Classifier(pl.LightningModule):
    """A plain module with hyperparameters."""

    def __init__(self, lr: float = 0.1, hidden: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        parts = [nn.Linear(8, hidden), nn.Tanh(), nn.Linear(hidden, 3)] if hidden else [nn.Linear(8, 3)]
        self.net = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.log("val_loss", F.cross_entropy(logits, y))
        self.log("val_acc", (logits.argmax(-1) == y).float().mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("test_loss", F.cross_entropy(self(x), y))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(-1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])


class Sites(pl.LightningDataModule):
    """A data module that knows its clients, and has nothing for the server; clients may bring validation data."""

    def __init__(self, loaders: Mapping[Any, Any], client_val: Mapping[Any, Any] | None = None) -> None:
        super().__init__()
        self.loaders, self.client_val = loaders, client_val or {}

    def client_ids(self) -> list[Any]:
        return list(self.loaders)

    def client_dataloader(self, client_id: Any) -> Any:
        return self.loaders[client_id]

    def client_val_dataloader(self, client_id: Any) -> Any:
        return self.client_val.get(client_id)


class ServedSites(Sites):
    """The same, with the server's own evaluation data."""

    def val_dataloader(self) -> Any:
        return val_loader()

    def test_dataloader(self) -> Any:
        return loader(40, seed=77, batch_size=10, shuffle=False)

    def predict_dataloader(self) -> Any:
        return loader(12, seed=78, batch_size=5, shuffle=False)


def fit_federated(module: Any, data: Any, val: Any = None, seed: int = ROOT_SEED, **arguments: Any) -> FederatedTrainer:
    """Fit federated from a root seed and return the trainer."""
    pl.seed_everything(seed, verbose=False)
    trainer = FederatedTrainer(**{"max_rounds": 1, **QUIET, **arguments})
    trainer.fit(module, data, val)
    return trainer


def fit_plain(
    module: Any, train: Any, val: Any = None, epochs: int = 1, round: int = 0, client: Any = "a", **arguments: Any
) -> pl.Trainer:
    """Fit in a plain ``lightning.Trainer`` with the random numbers of one client's round."""
    trainer = pl.Trainer(**{"max_epochs": epochs, "num_sanity_val_steps": 0, **QUIET, **arguments})
    seed_everywhere(seed_for(ROOT_SEED, round, client, "training"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*no `val_dataloader`")
        warnings.filterwarnings("ignore", ".*batch_size` from an ambiguous collection")
        trainer.fit(module, train, val)
    return trainer


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_same_bits(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, f"differ in bits: {different}"


def assert_close(left: Mapping[str, Tensor], right: Mapping[str, Tensor], atol: float = 1e-6) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], atol=atol, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def assert_one_ulp(federated: Mapping[str, Tensor], plain: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> None:
    """Check that ``start + (local - start)`` is ``local`` to one unit in the last place of the largest."""
    assert federated.keys() == plain.keys()
    for name, expected in plain.items():
        if not expected.is_floating_point():
            assert torch.equal(federated[name], expected), name
            continue
        largest = torch.stack([expected, start[name], expected - start[name]]).abs().amax(0)
        ulp = torch.nextafter(largest, torch.full_like(largest, float("inf"))) - largest
        distance = (federated[name] - expected).abs()
        assert bool((distance <= ulp).all()), f"{name}: {(distance / ulp).max()} ulp"
