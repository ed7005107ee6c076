"""The pass before training measures what torch measures, and leaves no trace."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import ManualOptimBoringModel
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from fl_lightning.callbacks.start_pass import StartPass

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Busy(pl.LightningModule):
    """Has everything that a second look at the data could disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.drop = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3)
        self.head, self.frozen = nn.Linear(8, 3), nn.Linear(2, 2)
        self.frozen.requires_grad_(False)
        self.accuracy = MulticlassAccuracy(3)
        self.steps, self.losses = 0, []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.head(self.drop(torch.relu(self.norm(self.body(x)))))
        loss = F.cross_entropy(logits, y)
        self.steps += 1
        self.losses.append(float(loss.detach()))
        self.accuracy(logits, y)
        self.log("train_acc", self.accuracy, on_step=False, on_epoch=True)
        self.log("train_loss", loss, on_epoch=True)
        assert self.trainer.max_epochs == 2
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def dataset(num_examples: int = 22) -> TensorDataset:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(num_examples, 6, generator=draw)
    return TensorDataset(x, torch.randint(3, (num_examples,), generator=draw))


def fit(module: pl.LightningModule, loader: Any, *callbacks: pl.Callback, **arguments: Any) -> pl.Trainer:
    pl.seed_everything(7, verbose=False)
    trainer = pl.Trainer(max_epochs=2, callbacks=list(callbacks), **{**QUIET, **arguments})
    trainer.fit(module, loader)
    return trainer


@pytest.mark.parametrize("generator", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_training_is_bit_for_bit_what_it_is_without_the_pass(generator: bool, workers: int) -> None:
    def loader() -> DataLoader[Any]:
        own = torch.Generator().manual_seed(5) if generator else None
        persistent = {"num_workers": 1, "persistent_workers": True} if workers else {}
        return DataLoader(dataset(), batch_size=4, shuffle=True, generator=own, **persistent)

    expected, module = Busy(), Busy()
    module.load_state_dict(expected.state_dict())
    without = fit(expected, loader())
    beside = fit(module, loader(), StartPass(gradient=True))
    for name, value in expected.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name
    assert module.losses == expected.losses
    assert module.steps == 12
    assert without.callback_metrics.keys() == beside.callback_metrics.keys()
    for name, metric in without.callback_metrics.items():
        assert torch.equal(metric, beside.callback_metrics[name]), name


class Smooth(Busy):
    """No dropout and no BatchNorm, so that loss and gradient do not depend on the batches."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.head(torch.relu(self.body(x))), y)


@pytest.mark.parametrize("batch_size", [4, 22])
def test_loss_and_gradient_are_those_of_the_pooled_data(batch_size: int) -> None:
    module, start = Smooth().double(), StartPass(gradient=True)
    data = dataset()
    data.tensors = (data.tensors[0].double(), data.tensors[1])
    before = copy.deepcopy(module)
    fit(module, DataLoader(data, batch_size=batch_size, shuffle=True), start)
    loss = before.training_step(data.tensors, 0)
    loss.backward()
    report = start.report()
    assert report["start_loss"] == pytest.approx(float(loss.detach()), rel=1e-12)
    trained = {name: p.grad for name, p in before.named_parameters() if p.requires_grad}
    assert report["start_grad"].keys() == trained.keys()
    for name, grad in trained.items():
        expected = torch.zeros_like(report["start_grad"][name]) if grad is None else grad
        assert torch.allclose(report["start_grad"][name], expected, rtol=1e-10, atol=1e-14), name


def test_it_sees_as_many_batches_as_training_does() -> None:
    module, start = Smooth(), StartPass()
    before, data = copy.deepcopy(module), dataset()
    fit(module, DataLoader(data, batch_size=4), start, limit_train_batches=2)
    first = [tensor[:8] for tensor in data.tensors]
    assert start.report() == {"start_loss": pytest.approx(float(before.training_step(first, 0).detach()))}


def test_iterables_without_length_start_anew() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(list(dataset()))

    expected, module, start = Smooth(), Smooth(), StartPass()
    module.load_state_dict(expected.state_dict())
    fit(expected, DataLoader(dataset(), batch_size=4), other := StartPass())
    fit(module, DataLoader(Stream(), batch_size=4), start)
    assert start.report() == other.report()
    assert torch.equal(expected.body.weight, module.body.weight)


def test_manual_optimization_has_no_start_loss() -> None:
    with pytest.raises(MisconfigurationException, match=r"ManualOptimBoringModel at the start.*option='II'"):
        pl.Trainer(max_epochs=1, callbacks=[StartPass()], **QUIET).fit(ManualOptimBoringModel())


def test_a_loader_that_can_be_read_once_is_refused() -> None:
    class Once:
        def __init__(self) -> None:
            self.batches = iter(DataLoader(dataset(), batch_size=4))

        def __iter__(self) -> Once:
            return self

        def __next__(self) -> Any:
            return next(self.batches)

    with pytest.raises(MisconfigurationException, match=r"Once can be read only once. Return a DataLoader"):
        fit(Smooth(), Once(), StartPass())
