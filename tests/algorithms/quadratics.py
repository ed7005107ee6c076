"""Problems with one float64 parameter, small enough that the papers' results are closed forms.

A client's loss is :math:`F(x) = \\frac{h}{2} x^2 - l x + c`, so its gradient is :math:`h x - l`; a batch holds one
example ``(h, l, c)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fl_lightning import FederatedTrainer

WEIGHTS = (0.5, 0.3, 0.2)
OPTIMA = (0.0, 1.0, 10.0)
STEPS = (1, 5, 20)


class Quadratic(pl.LightningModule):
    """One parameter, trained by SGD on what its batches say."""

    def __init__(self, start: float = 0.0, lr: float = 0.01, momentum: float = 0.0, decay: float = 1.0) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([start], dtype=torch.float64))
        self.lr, self.momentum, self.decay = lr, momentum, decay

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (example,) = batch
        h, linear, constant = example.unbind(-1)
        loss = (h / 2 * self.x**2 - linear * self.x + constant).mean()
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD([self.x], lr=self.lr, momentum=self.momentum)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, self.decay)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def parabola(h: float, optimum: float) -> tuple[float, float, float]:
    """Return :math:`\\frac{h}{2}(x - e)^2` as an example."""
    return h, h * optimum, h * optimum**2 / 2


def client(example: tuple[float, float, float], num_batches: int = 1) -> DataLoader[Any]:
    """Return a client's loader: the same example in each of its batches."""
    data = torch.tensor([example] * num_batches, dtype=torch.float64)
    return DataLoader(TensorDataset(data), batch_size=1)


def unequal(curvatures: Sequence[float] = (1.0, 1.0, 1.0)) -> dict[str, DataLoader[Any]]:
    """Return the three clients of the objective inconsistency, with as many batches as they take steps."""
    names = "abc"
    return {
        name: client(parabola(h, optimum), steps)
        for name, h, optimum, steps in zip(names, curvatures, OPTIMA, STEPS, strict=True)
    }


def shares(update: Any) -> float:
    """Weigh the three clients by p = (.5, .3, .2), whatever the size of their data."""
    return dict(zip("abc", WEIGHTS, strict=True))[update.client_id]


def trajectory(
    algorithm: Any, clients: Mapping[Any, Any], rounds: int, module: pl.LightningModule | None = None, **arguments: Any
) -> list[float]:
    """Train through ``FederatedTrainer`` and return the global parameter after each round, the start first."""
    values: list[float] = []

    class Record(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            values.append(pl_module.x.item())

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            values.append(pl_module.x.item())

    trainer = quiet_trainer(algorithm=algorithm, max_rounds=rounds, callbacks=[Record()], **arguments)
    trainer.fit(module if module is not None else Quadratic(), clients)
    return values


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


def fixed_point(values: Sequence[float]) -> float:
    """Return where a sequence with an affine rule :math:`x_{t+1} = a x_t + b` ends."""
    first, second, third = values[0], values[1], values[2]
    factor = (third - second) / (second - first)
    return second + (third - second) / (1 - factor)
