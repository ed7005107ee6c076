"""Every algorithm, and small modules and clients that all of them can train."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from fl_lightning.algorithms import (
    AFL,
    APFL,
    Algorithm,
    BufferedHeteroFL,
    Ditto,
    FedAdagrad,
    FedAdam,
    FedAsync,
    FedAvg,
    FedAvgM,
    FedBuff,
    FedDyn,
    FedNova,
    FedPer,
    FedProx,
    FedRep,
    FedYogi,
    HeteroFL,
    MimeLite,
    QFedAvg,
    Scaffold,
)

ALGORITHMS: dict[str, Callable[[], Algorithm]] = {
    "AFL": partial(AFL, 0.2),
    "APFL": partial(APFL, 0.6),
    "APFL adaptive": partial(APFL, 0.6, True),
    "BufferedHeteroFL": partial(BufferedHeteroFL, 2),
    "Ditto": partial(Ditto, 0.3),
    "FedAdagrad": FedAdagrad,
    "FedAdam": FedAdam,
    "FedAdam of torch": partial(FedAvg, partial(torch.optim.Adam, lr=0.01)),
    "FedAsync": partial(FedAsync, 0.6),
    "FedAvg": FedAvg,
    "FedAvgM": partial(FedAvgM, 0.9, 0.5),
    "FedBuff": partial(FedBuff, 2),
    "FedDyn": partial(FedDyn, 0.5),
    "FedNova": FedNova,
    "FedNova proximal": partial(FedNova, 0.5),
    "FedPer": partial(FedPer, ["head.*"]),
    "FedProx": partial(FedProx, 0.3),
    "FedProx adaptive": partial(FedProx, 0.3, True),
    "FedRep": partial(FedRep, ["head.*"], 3),
    "FedYogi": FedYogi,
    "HeteroFL": HeteroFL,
    "MimeLite": partial(MimeLite, 0.7),
    "QFedAvg": partial(QFedAvg, 1.5),
    "Scaffold I": partial(Scaffold, "I"),
    "Scaffold II": partial(Scaffold, "II"),
}

WITH_OWN_MODELS = ("APFL", "APFL adaptive", "Ditto", "FedPer", "FedRep")


def drawn(name: str, clients_per_round: int) -> dict[str, int]:
    """Return the argument that draws a cohort; an asynchronous algorithm keeps clients at work instead."""
    return {} if name in ("BufferedHeteroFL", "FedAsync", "FedBuff") else {"clients_per_round": clients_per_round}


class Net(pl.LightningModule):
    """A small classifier trained by SGD; its validation loss is what checkpoints could watch."""

    def __init__(self, lr: float = 0.1, momentum: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        trainable = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trainable, lr=self.hparams.lr, momentum=self.hparams.momentum)


class Still(Net):
    """A loss without a slope: no client moves."""

    def loss(self, batch: Any) -> Tensor:
        return 1.0 + 0.0 * sum(p.sum() for p in self.parameters())


class Normalised(Net):
    """BatchNorm, a frozen layer and a buffer of its own."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lr)
        self.norm, self.frozen = nn.BatchNorm1d(8), nn.Linear(6, 6)
        self.frozen.requires_grad_(False)
        self.register_buffer("scale", torch.full((6,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.body(self.frozen(x) * self.scale))))


def clients(sizes: tuple[int, ...] = (12, 20, 7), batch_size: int = 4) -> dict[str, DataLoader[Any]]:
    """Return clients of unequal size whose labels follow unequal rules."""
    draw = torch.Generator().manual_seed(0)
    loaders = {}
    for index, size in enumerate(sizes):
        x = torch.randn(size, 6, generator=draw) + index / 2
        y = (x @ torch.randn(6, 3, generator=draw)).argmax(1)
        loaders[f"site-{index}"] = DataLoader(TensorDataset(x, y), batch_size=batch_size, shuffle=True)
    return loaders


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def identical(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Return whether two states agree to the bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def on_one_process_and_on_two(program: str, folder: Path) -> tuple[Any, Any]:
    """Start a program of this folder with torchrun on one process and then on two, and load what each saved.

    Args:
        program: its file name; its argument is where it saves.
        folder: for what it saves.
    """
    results = []
    for count in (1, 2):
        target = folder / f"{count}.pt"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        environment = {k: v for k, v in os.environ.items() if k not in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}}
        done = subprocess.run(
            [*command, str(Path(__file__).with_name(program)), str(target)], capture_output=True, text=True,
            timeout=580, env=environment, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(torch.load(target, weights_only=True))
    one, two = results
    return one, two


class Judged(Net):
    """Logs accuracy on clients' validation data."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lr)
        self.val_acc = MulticlassAccuracy(3, average="micro")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        self.val_acc(logits, batch[1])
        self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]))
        self.log("val_acc", self.val_acc)


class Sites(pl.LightningDataModule):
    """Clients that validate on what they train on, so that a test knows what must come out."""

    def __init__(self, shuffle: bool = False) -> None:
        super().__init__()
        self.loaders = {
            name: DataLoader(loader.dataset, batch_size=4, shuffle=shuffle) for name, loader in clients().items()
        }

    def client_ids(self) -> list[str]:
        return list(self.loaders)

    def client_dataloader(self, client_id: str) -> Any:
        return self.loaders[client_id]

    def client_val_dataloader(self, client_id: str) -> Any:
        return DataLoader(self.loaders[client_id].dataset, batch_size=50)
