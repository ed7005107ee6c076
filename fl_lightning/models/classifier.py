"""Classifiers that know nothing about federated learning."""

from __future__ import annotations

import lightning.pytorch as lightning
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from fl_lightning.errors import MisconfigurationException

__all__ = ["Classifier", "DigitsClassifier", "FedAvg2NN", "FedAvgCNN", "LogisticRegression"]


class Classifier(lightning.LightningModule):
    """Cross entropy, SGD and accuracy around a network; logs ``{train,val,test}_loss`` and ``_acc``.

    Args:
        net: from inputs to logits ``(batch, num_classes)``.
        num_classes: number of classes, at least 2.
        lr: learning rate of SGD, above 0.
        momentum: of SGD, in ``[0, 1)``.

    Raises:
        MisconfigurationException: for fewer than 2 classes.

    Example:
        >>> Classifier(nn.Linear(4, 3), num_classes=3, lr=0.1)(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(self, net: nn.Module, num_classes: int, lr: float = 0.1, momentum: float = 0.0) -> None:
        super().__init__()
        if num_classes < 2:
            raise MisconfigurationException(f"{type(self).__name__} expected num_classes >= 2, got {num_classes}.")
        self.net = net
        self.lr = lr
        self.momentum = momentum
        self.train_acc = MulticlassAccuracy(num_classes, average="micro")
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.net(inputs)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._step(batch, "train", self.train_acc)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._step(batch, "val", self.val_acc)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._step(batch, "test", self.test_acc)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(dim=1)  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)

    def _step(self, batch: tuple[Tensor, Tensor], stage: str, accuracy: MulticlassAccuracy) -> Tensor:
        inputs, labels = batch
        logits = self(inputs)
        loss = nn.functional.cross_entropy(logits, labels)
        accuracy(logits, labels)
        self.log(f"{stage}_loss", loss, batch_size=len(labels), prog_bar=stage == "val")
        self.log(
            f"{stage}_acc", accuracy, on_step=False, on_epoch=True, batch_size=len(labels), prog_bar=stage == "val"
        )
        return loss


class DigitsClassifier(Classifier):
    """One hidden layer for the 8x8 digits.

    Args:
        hidden: units of the hidden layer.
        lr: learning rate of SGD.
        momentum: of SGD.
        batch_norm: normalise the hidden layer over the batch.

    Shape:
        images ``(batch, 1, 8, 8)`` to logits ``(batch, 10)``

    Example:
        >>> DigitsClassifier(hidden=16)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, hidden: int = 64, lr: float = 0.1, momentum: float = 0.0, batch_norm: bool = False) -> None:
        norm = [nn.BatchNorm1d(hidden)] if batch_norm else []
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), *norm, nn.ReLU(), nn.Linear(hidden, 10))
        super().__init__(net, num_classes=10, lr=lr, momentum=momentum)
        self.save_hyperparameters()


class LogisticRegression(Classifier):
    """A linear classifier; with two classes it has one output, the log-odds of class 1, and its loss is the binary
    cross entropy.

    Args:
        in_features: number of features.
        num_classes: number of classes, at least 2.
        lr: learning rate of SGD.
        momentum: of SGD.

    Shape:
        features ``(batch, in_features)`` to logits ``(batch, num_classes)``

    Example:
        >>> sum(p.numel() for p in LogisticRegression(in_features=13).parameters())
        14
    """

    def __init__(self, in_features: int, num_classes: int = 2, lr: float = 0.1, momentum: float = 0.0) -> None:
        net: nn.Module = nn.Linear(in_features, num_classes)
        if num_classes == 2:
            net = nn.Sequential(nn.Linear(in_features, 1), _LogOdds())
        super().__init__(net, num_classes, lr, momentum)
        self.save_hyperparameters()


class FedAvg2NN(Classifier):
    """The FedAvg paper's "MNIST 2NN": two hidden layers of 200 ReLUs, 199,210 parameters.

    Args:
        lr: learning rate of SGD.
        momentum: of SGD.

    Shape:
        images ``(batch, 1, 28, 28)`` to logits ``(batch, 10)``

    Example:
        >>> sum(p.numel() for p in FedAvg2NN().parameters())
        199210

    References:
        McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017.
    """

    def __init__(self, lr: float = 0.1, momentum: float = 0.0) -> None:
        net = nn.Sequential(
            nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
        )
        super().__init__(net, num_classes=10, lr=lr, momentum=momentum)
        self.save_hyperparameters()


class FedAvgCNN(Classifier):
    """The FedAvg paper's MNIST CNN: two 5x5 convolutions (32 and 64 channels) with 2x2 max pooling, 512 ReLUs,
    1,663,370 parameters.

    Args:
        lr: learning rate of SGD.
        momentum: of SGD.

    Shape:
        images ``(batch, 1, 28, 28)`` to logits ``(batch, 10)``

    Example:
        >>> sum(p.numel() for p in FedAvgCNN().parameters())
        1663370

    References:
        McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017.
    """

    def __init__(self, lr: float = 0.1, momentum: float = 0.0) -> None:
        net = nn.Sequential(
            # the published number of parameters is that of "same" padding
            nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(7 * 7 * 64, 512), nn.ReLU(), nn.Linear(512, 10),
        )  # fmt: skip
        super().__init__(net, num_classes=10, lr=lr, momentum=momentum)
        self.save_hyperparameters()


class _LogOdds(nn.Module):
    """Two logits of which the first is 0: their softmax is the sigmoid of the second."""

    def forward(self, log_odds: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(log_odds), log_odds], dim=1)
