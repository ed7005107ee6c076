"""Modules that use as much of Lightning as real ones do, each in its own way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel, ManualOptimBoringModel
from lightning.pytorch.demos.lstm import LightningLSTM, SimpleLSTM
from lightning.pytorch.demos.transformer import LightningTransformer, Transformer
from spine_zoo import Classifier, examples
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

SEEN: list[Any] = []
"""What modules wrote down while they trained, whichever copy of them it was."""


class OneCycle(Classifier):
    """A schedule for each step, that asks the Trainer how many there will be."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=total)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Plateau(Classifier):
    """A schedule that watches the validation loss, and writes its rate down."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=10.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}

    def on_train_epoch_start(self) -> None:
        SEEN.append(self.optimizers().param_groups[0]["lr"])


class GAN(pl.LightningModule):
    """Manual optimization with two optimizers, two schedules and toggled parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))
        self.discriminator = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real, _ = batch
        optimizer_g, optimizer_d = self.optimizers()
        noise = torch.randn(len(real), 4, device=self.device)
        ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)
        self.toggle_optimizer(optimizer_g)
        loss_g = F.binary_cross_entropy_with_logits(self.discriminator(self.generator(noise)), ones)
        optimizer_g.zero_grad()
        self.manual_backward(loss_g)
        self.clip_gradients(optimizer_g, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        optimizer_g.step()
        self.untoggle_optimizer(optimizer_g)
        self.toggle_optimizer(optimizer_d)
        fake = self.discriminator(self.generator(noise).detach())
        loss_d = F.binary_cross_entropy_with_logits(fake, zeros)
        loss_d = loss_d + F.binary_cross_entropy_with_logits(self.discriminator(real), ones)
        optimizer_d.zero_grad()
        self.manual_backward(loss_d)
        optimizer_d.step()
        self.untoggle_optimizer(optimizer_d)
        for scheduler in self.lr_schedulers():
            scheduler.step()
        self.log_dict({"g": loss_g, "d": loss_d})

    def configure_optimizers(self) -> Any:
        optimizers = [
            torch.optim.Adam(self.generator.parameters(), lr=0.01),
            torch.optim.RMSprop(self.discriminator.parameters(), lr=0.005),
        ]
        return optimizers, [torch.optim.lr_scheduler.StepLR(o, step_size=2, gamma=0.5) for o in optimizers]


@dataclass
class Pair:
    x: Tensor
    y: Tensor


def as_dict(items: list[Any]) -> dict[str, Any]:
    x, y = torch.stack([i[0] for i in items]), torch.stack([i[1] for i in items])
    return {"in": {"x": x}, "out": [y, {"again": (y,)}], "name": "batch", "none": None}


def as_pair(items: list[Any]) -> Pair:
    return Pair(torch.stack([i[0] for i in items]), torch.stack([i[1] for i in items]))


class NestedBatch(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert torch.equal(batch["out"][0], batch["out"][1]["again"][0])
        return super().training_step((batch["in"]["x"], batch["out"][0]), batch_idx)


class PairBatch(Classifier):
    def training_step(self, batch: Pair, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch.x), batch.y)
        self.log("train_loss", loss, batch_size=len(batch.x))
        return loss


class Stream(IterableDataset[Any]):
    """Examples one after the other; nobody knows how many."""

    def __init__(self, num: int) -> None:
        self.data = examples(num, seed=3)

    def __iter__(self) -> Iterator[Any]:
        for index in range(len(self.data)):
            yield self.data[index]


class Batches(Dataset[Any]):
    """Whole batches, for ``batch_size=None``."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return examples(6 + index, seed=index).tensors


class PlainIterable:
    """No DataLoader, no data set, no length: batches that come."""

    def __iter__(self) -> Iterator[Any]:
        yield from (examples(5, 1).tensors, examples(3, 2).tensors)


class LongestFirst(torch.utils.data.Sampler[list[int]]):
    """A batch sampler of uneven batches."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[list[int]]:
        yield from ([0, 1, 2, 3, 4], [7, 6, 5], [9])


class LateLayers(Classifier):
    """``setup`` builds the last layer, as modules do that read the number of classes from their data."""

    def setup(self, stage: str) -> None:
        self.late = nn.Linear(3, 3)
        nn.init.eye_(self.late.weight)
        nn.init.zeros_(self.late.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.late(self.net(x).tanh())


class ConfiguredModel(Classifier):
    """``configure_model`` builds a layer once."""

    def configure_model(self) -> None:
        if not hasattr(self, "late"):
            self.late = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.late(self.net(x).tanh())


class OwnCallbacks(Classifier):
    """``configure_callbacks`` that stop early on the validation loss and keep checkpoints."""

    def configure_callbacks(self) -> list[Callback]:
        stop = EarlyStopping("val_loss", patience=0, min_delta=10.0)
        return [stop, ModelCheckpoint(monitor="val_loss", dirpath="own-checkpoints")]

    def on_train_epoch_end(self) -> None:
        SEEN.append(self.trainer.current_epoch)


class Metrics(Classifier):
    """torchmetrics in the module: one logged as an object, one computed by hand, a collection."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(3, average="micro")
        self.mean_loss = MeanMetric()
        self.many = MetricCollection({"cm": MulticlassConfusionMatrix(3), "macro": MulticlassAccuracy(3)})

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.mean_loss.update(loss.detach(), len(x))
        self.many.update(logits, y)
        return loss * (1.0 + 0.1 * self.mean_loss.compute())  # a state that leaked would change the weights

    def on_train_epoch_end(self) -> None:
        SEEN.append(self.many.compute()["cm"].sum().item())
        self.many.reset()
        self.mean_loss.reset()


class Experiment(Classifier):
    """Writes to the logger's experiment, as in Lightning's documentation."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.logger.experiment.add_scalar("raw", loss.detach(), global_step=self.global_step)
        self.logger.experiment.add_histogram("weights", self.net[0].weight, self.global_step)
        return loss


class WatchesTrainer(Classifier):
    """Writes down what it reads from its Trainer, and trains with it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        t = self.trainer
        SEEN.append(
            (t.current_epoch, t.global_step, t.max_epochs, t.num_training_batches, t.is_last_batch, t.training,
             t.sanity_checking, t.world_size, t.global_rank, t.is_global_zero, self.current_epoch, self.global_step,
             t.estimated_stepping_batches, t.state.fn, t.state.stage, t.max_steps, t.num_devices, t.precision,
             type(t.train_dataloader).__name__, t.datamodule is None)
        )  # fmt: skip
        return super().training_step(batch, batch_idx) * (1 + self.global_step + t.current_epoch)


class Dropout(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(F.dropout(x, 0.4, self.training))


class Norm(Classifier):
    """BatchNorm in front of the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.norm(x))


class LBFGS(Classifier):
    """An optimizer that needs its closure several times a step."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class SkipsSteps(Classifier):
    """``training_step`` may return ``None``, and ``optimizer_step`` may be overridden."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 1 else loss

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (batch_idx + 1)
        optimizer.step(closure)


class SmallTransformer(LightningTransformer):
    """Lightning's demo with a small model and no download."""

    def __init__(self) -> None:
        super().__init__(vocab_size=20)
        self.model = Transformer(vocab_size=20, ninp=8, nhead=2, nhid=8, nlayers=1)

    def prepare_data(self) -> None:
        pass


class SmallLSTM(LightningLSTM):
    """Lightning's demo, which carries its hidden state from batch to batch in an attribute."""

    def __init__(self) -> None:
        super().__init__(vocab_size=20)
        self.model = SimpleLSTM(vocab_size=20, ninp=6, nhid=6, nlayers=2)

    def prepare_data(self) -> None:
        pass


class Words(Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        words = torch.randint(20, (6,), generator=torch.Generator().manual_seed(index))
        return words[:-1], words[1:]


def boring_loader(num: int = 12) -> DataLoader[Any]:
    return DataLoader(torch.randn(num, 32, generator=torch.Generator().manual_seed(5)), batch_size=3, shuffle=True)


class Monitored(Classifier):
    def configure_callbacks(self) -> Callback:
        return LearningRateMonitor()


__all__ = ["BoringModel", "ManualOptimBoringModel"]
