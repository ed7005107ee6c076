"""Modules of every kind, their data, and one way to run a client of them in any loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from fl_lightning.algorithms.base import Algorithm
from fl_lightning.algorithms.fedavg import FedAvg
from fl_lightning.local.job import ClientData, Job, Outcome
from fl_lightning.local.lean_loop import LeanLoop
from fl_lightning.local.lightning_loop import LightningLoop
from fl_lightning.local.settings import LocalSettings
from fl_lightning.seeding import seed_for
from fl_lightning.traveling import Traveling
from fl_lightning.types import ClientTask, Memory, Work

FEATURES, CLASSES = 12, 4


def sgd(module: nn.Module) -> Any:
    return torch.optim.SGD(module.parameters(), lr=0.1)


def momentum(module: nn.Module) -> Any:
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, dampening=0.1, weight_decay=1e-2)


def nesterov(module: nn.Module) -> Any:
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.8, nesterov=True)


def adam(module: nn.Module) -> Any:
    return torch.optim.Adam(module.parameters(), lr=1e-2, weight_decay=1e-2)


def adamw(module: nn.Module) -> Any:
    return torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)


def rmsprop(module: nn.Module) -> Any:
    return torch.optim.RMSprop(module.parameters(), lr=1e-3)


def two_groups(module: nn.Module) -> Any:
    first, *rest = module.parameters()
    return torch.optim.SGD([{"params": [first], "lr": 0.2, "momentum": 0.5}, {"params": rest}], lr=0.05)


def by_step(module: nn.Module) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.2, momentum=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "frequency": 2}}


def by_epoch(module: nn.Module) -> Any:
    optimizer = torch.optim.Adam(module.parameters(), lr=2e-2)
    return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)]


def one_cycle(module: Any) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    total = module.trainer.estimated_stepping_batches
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=total)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Plain(pl.LightningModule):
    """Logs a loss for steps and epochs, an accuracy for epochs, and a number."""

    def __init__(self, net: nn.Module, optimizer: Callable[[nn.Module], Any] = sgd) -> None:
        super().__init__()
        self.net = net
        self.optimizer = optimizer

    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        x, y = batch
        logits = self.net(x)
        return F.cross_entropy(logits, y), logits

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss, logits = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("step_loss", loss)
        accuracy = (logits.argmax(-1) == batch[1]).float().mean()
        self.log_dict({"accuracy": accuracy, "index": batch_idx}, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return self.optimizer(self)


class Quiet(Plain):
    """Logs nothing and takes no index."""

    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        return {"loss": self.loss(batch)[0], "more": 1}


class WithMetrics(Plain):
    """Logs torchmetrics objects, by step and by epoch, and a maximum."""

    def __init__(self, net: nn.Module, optimizer: Callable[[nn.Module], Any] = sgd) -> None:
        super().__init__(net, optimizer)
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.f1 = MulticlassF1Score(CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss, logits = self.loss(batch)
        self.accuracy(logits, batch[1])
        self.f1.update(logits, batch[1])
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log("f1", self.f1, on_step=False, on_epoch=True)
        self.log("worst", loss, on_step=False, on_epoch=True, reduce_fx="max")
        self.log("loss", loss, batch_size=len(batch[1]))
        return loss


class Hooked(Plain):
    """Keeps state in its hooks, logs in them, and reads what a plain module may of its trainer."""

    def __init__(self, net: nn.Module, optimizer: Callable[[nn.Module], Any] = sgd) -> None:
        super().__init__(net, optimizer)
        self.seen: list[int] = []
        self.scale = 0.0

    def setup(self, stage: str) -> None:
        self.scale = 0.5 if stage == "fit" else 0.0

    def on_train_epoch_start(self) -> None:
        self.scale *= 1.5 + self.current_epoch

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch_idx)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss, _ = self.loss(batch)
        self.log("scale", self.scale + len(self.seen) + self.global_step)
        return self.scale * loss * (2.0 if self.trainer.is_last_batch else 1.0)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("output", outputs["loss"], on_step=True, on_epoch=True)

    def on_train_epoch_end(self) -> None:
        self.log("seen", float(len(self.seen)))


class Bag(Plain):
    """Words to classes: an embedding, an LSTM and attention over integers."""

    def __init__(self, optimizer: Callable[[nn.Module], Any] = sgd, sparse: bool = False) -> None:
        super().__init__(nn.Identity(), optimizer)
        self.embed = nn.Embedding(20, 8, sparse=sparse)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        words = (batch[0][:, :6].abs() * 9).long().clamp(max=19)
        hidden, _ = self.lstm(self.embed(words))
        attended, _ = self.attend(hidden, hidden, hidden)
        logits = self.head(attended.mean(1))
        return F.cross_entropy(logits, batch[1]), logits


def linear() -> nn.Module:
    return nn.Linear(FEATURES, CLASSES)


def mlp(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 16), *between, nn.ReLU(), nn.Linear(16, CLASSES))


def conv(norm: nn.Module) -> nn.Module:
    image = nn.Unflatten(1, (1, 3, 4))
    return nn.Sequential(image, nn.Conv2d(1, 4, 3, padding=1), norm, nn.ReLU(), nn.Flatten(), nn.Linear(48, CLASSES))


ZOO: dict[str, Callable[[], pl.LightningModule]] = {
    "sgd": lambda: Plain(mlp()),
    "momentum": lambda: Plain(mlp(), momentum),
    "nesterov": lambda: Plain(mlp(), nesterov),
    "adam": lambda: Plain(mlp(), adam),
    "adamw": lambda: Plain(mlp(), adamw),
    "rmsprop": lambda: Plain(mlp(), rmsprop),
    "two groups": lambda: Plain(mlp(), two_groups),
    "by step": lambda: Plain(mlp(), by_step),
    "by epoch": lambda: Plain(mlp(), by_epoch),
    "dropout": lambda: Plain(mlp(nn.Dropout(0.3)), momentum),
    "batch norm": lambda: Plain(mlp(nn.BatchNorm1d(16))),
    "group norm": lambda: Plain(conv(nn.GroupNorm(2, 4)), adam),
    "convolution": lambda: Plain(conv(nn.BatchNorm2d(4)), momentum),
    "sequence": lambda: Bag(adam),
    "sparse": lambda: Bag(sgd, sparse=True),
    "quiet": lambda: Quiet(mlp(), adamw),
    "torchmetrics": lambda: WithMetrics(mlp(), momentum),
    "hooks": lambda: Hooked(mlp()),
    "one cycle": lambda: Plain(mlp(), one_cycle),
    "logistic": lambda: Plain(linear()),
}


def data(num: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, FEATURES, generator=generator)
    teacher = torch.randn(FEATURES, CLASSES, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, (x @ teacher).argmax(1))


WHOLE = data(400, 1)


def loader(num: int = 23, start: int = 0, batch_size: int = 5, **arguments: Any) -> DataLoader[Any]:
    """Return a client that is a nest of subsets of one data set."""
    half = Subset(WHOLE, list(range(399, -1, -1)))
    part = Subset(half, list(range(start, start + num)))
    return DataLoader(part, batch_size=batch_size, **{"shuffle": True, **arguments})


def settings_for(
    module: pl.LightningModule, algorithm: Algorithm, batch_norm: Any = "average", **changes: Any
) -> LocalSettings:
    traveling = Traveling.of(module, algorithm, batch_norm)
    settings = LocalSettings(
        parameter_names=traveling.parameters,
        buffer_names=traveling.buffers,
        local_names=traveling.local,
        static={name: tensor.clone() for name, tensor in traveling.static(module).items()},
        has_loggers=True,
    )
    for name, value in changes.items():
        setattr(settings, name, value)
    return settings


def broadcast_of(module: pl.LightningModule, settings: LocalSettings, **trees: Any) -> dict[str, Any]:
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    model = {name: own[name].detach().clone() for name in settings.parameter_names}
    return {"model": model, "buffers": {name: own[name].detach().clone() for name in settings.buffer_names}, **trees}


def job(
    broadcast: dict[str, Any],
    open_loader: Callable[[], Any],
    client_id: Any = "a",
    memory: Memory | None = None,
    num_examples: int | None = None,
    round: int = 0,
    **work: Any,
) -> Job:
    seed = seed_for(3, round, client_id, "training")
    task = ClientTask(client_id, round, 0, broadcast, seed, Work(**{"epochs": 2, **work}))
    return Job(task, lambda: ClientData(open_loader(), num_examples=num_examples), lambda: memory or {}, logged=True)


def both(
    module: pl.LightningModule,
    jobs: Callable[[dict[str, Any]], list[Job]],
    algorithm: Algorithm | None = None,
    **changes: Any,
) -> tuple[list[Outcome], list[Outcome], LeanLoop]:
    """Run the same jobs in LightningLoop and, one client at a time, in LeanLoop."""
    algorithm = algorithm or FedAvg()
    settings = settings_for(module, algorithm, **{"group_size": 1, **changes})
    broadcast = broadcast_of(module, settings)
    oracle = LightningLoop(copy.deepcopy(module), algorithm, settings)
    lean = LeanLoop(copy.deepcopy(module), algorithm, settings)
    return list(oracle.run(jobs(broadcast))), list(lean.run(jobs(broadcast))), lean
