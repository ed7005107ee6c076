"""Every robust rule, and a small module and clients for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fl_lightning import FederatedTrainer
from fl_lightning.algorithms import Algorithm, FedAvg
from fl_lightning.algorithms.fltrust import FLTrust
from fl_lightning.algorithms.robust import (
    ALittleIsEnough,
    Cohort,
    CoordinateMedian,
    GeometricMedian,
    Krum,
    MultiKrum,
    NormClipping,
    TrimmedMean,
)
from fl_lightning.types import Contribution


class Net(pl.LightningModule):
    """A small classifier trained by SGD."""

    def __init__(self, lr: float = 0.1, normalised: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(8) if normalised else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.body(x))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.hparams.lr)


def clients(sizes: Sequence[int] = (12, 20, 7, 10, 16), shuffle: bool = True) -> dict[str, DataLoader[Any]]:
    """Return clients of unequal size whose labels follow unequal rules."""
    draw = torch.Generator().manual_seed(0)
    loaders = {}
    for index, size in enumerate(sizes):
        x = torch.randn(size, 6, generator=draw) + index / 4
        y = (x @ torch.randn(6, 3, generator=draw)).argmax(1)
        loaders[f"site-{index}"] = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=shuffle)
    return loaders


def root() -> DataLoader[Any]:
    return clients((24,))["site-0"]


RULES: dict[str, Callable[[], Algorithm]] = {
    "CoordinateMedian": partial(CoordinateMedian, 1),
    "TrimmedMean fraction": partial(TrimmedMean, 0.25),
    "TrimmedMean f": partial(TrimmedMean, f=1),
    "GeometricMedian": partial(GeometricMedian, 1),
    "GeometricMedian examples": partial(GeometricMedian, weights="examples"),
    "Krum": partial(Krum, 1),
    "MultiKrum": partial(MultiKrum, 1),
    "NormClipping": partial(NormClipping, 0.05),
    "FLTrust": partial(FLTrust, root()),
    "ALittleIsEnough FedAvg": partial(ALittleIsEnough, FedAvg(), ["site-1", "site-2"], 1.5),
    "ALittleIsEnough Median": partial(ALittleIsEnough, CoordinateMedian(), ["site-1"]),
}


def quiet_trainer(**arguments: Any) -> FederatedTrainer:
    """Return a trainer that leaves nothing on disk and says nothing."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_clients": False,
    }
    return FederatedTrainer(**{**settings, **arguments})


def train(algorithm: Algorithm, module: pl.LightningModule, data: Any = None, **arguments: Any) -> FederatedTrainer:
    """Train a module and return the trainer."""
    pl.seed_everything(5, verbose=False)
    trainer = quiet_trainer(**{"algorithm": algorithm, "max_rounds": 3, "local_epochs": 2, **arguments})
    trainer.fit(module, data if data is not None else clients())
    return trainer


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def identical(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Return whether two states agree to the bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def cohort_of(rows: NDArray[Any], weighted: Sequence[float] | None = None, root: NDArray[Any] | None = None) -> Cohort:
    """Return the rows of a matrix as updates: a matrix of two rows, a scalar and a vector hold the numbers of a row."""
    each = [1.0] * len(rows) if weighted is None else weighted
    sent = [Contribution({"delta": split(row)}, {"weight": w}) for row, w in zip(rows, each, strict=True)]
    return Cohort([f"c{k:03d}" for k in range(len(rows))], sent, None if root is None else split(root))


def split(row: NDArray[Any]) -> dict[str, Tensor]:
    half = (len(row) - 1) // 2 // 2 * 2
    numbers = torch.tensor(row)
    return {"w": numbers[:half].reshape(2, -1), "s": numbers[half], "v": numbers[half + 1 :]}


def joined(tree: Mapping[str, Tensor]) -> NDArray[Any]:
    """Undo :func:`split`."""
    return np.concatenate([tree[name].reshape(-1).numpy() for name in ("w", "s", "v")])
