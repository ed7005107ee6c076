"""What a module logs in a real Trainer on each client becomes the value over the pooled data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import reduce
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from lightning.pytorch.utilities.data import extract_batch_size
from pytorch_lightning.callbacks import Checkpoint as OtherCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, MeanSquaredError, Metric, MetricCollection
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy, MulticlassF1Score
from torchmetrics.wrappers import Running

from fl_lightning.metrics import LeftOut, Mean, MetricSums, StepSums, Total, capture, reset_metric_attributes

SIZES = (37, 12, 5)
BATCH = 8  # last batches of 5, 4 and 5


def _module(base: Any) -> Any:
    class Module(base):  # type: ignore[misc]
        """Logs its input's mean in every way there is; it does not learn, so that clients and pool are comparable."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 3)
            self.acc = MulticlassAccuracy(3, average="macro")
            self.scores = MetricCollection({"f1": MulticlassF1Score(3), "macro": MulticlassAccuracy(3)}, prefix="val_")
            self.auroc = BinaryAUROC()
            self.recent = Running(MeanMetric(), window=2)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            level = x.mean(1)
            self.log("step_only", level.mean())
            self.log("fork", level.mean(), on_step=True, on_epoch=True)
            self.log("epoch", level.mean(), on_step=False, on_epoch=True)
            self.log("declared", level[:2].mean(), on_step=False, on_epoch=True, batch_size=len(level[:2]))
            self.log("total", level.sum(), on_step=False, on_epoch=True, reduce_fx="sum")
            self.log("low", level.min(), on_step=False, on_epoch=True, reduce_fx="min")
            self.log("high", level.max(), on_step=False, on_epoch=True, reduce_fx="max")
            self.log("step_high", level.max(), on_step=True, on_epoch=False, reduce_fx="max")
            self.acc(self.layer(x), y)
            self.log("acc", self.acc, on_step=True, on_epoch=True)
            self.recent(level.mean())
            self.log("recent", self.recent, on_step=False, on_epoch=True)
            return self.layer(x).sum() * 0.0

        def on_train_epoch_start(self) -> None:
            self.seen: list[Tensor] = []

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.seen.append(batch[0].mean(1))
            self.log("after_batch", batch[0].mean(), on_step=False, on_epoch=True)

        def on_train_epoch_end(self) -> None:
            self.log("at_the_end", torch.cat(self.seen).mean())
            self.log("at_the_end_declared", torch.cat(self.seen)[:3].mean(), batch_size=3)
            self.log("clients", torch.tensor(1.0), reduce_fx="sum")

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            x, y = batch
            self.log("val_level", x.mean())
            self.scores.update(self.layer(x), y)
            self.log_dict(self.scores)
            self.auroc.update(self.layer(x).sigmoid()[:, 0], (y == 0).int())

        def on_validation_epoch_end(self) -> None:
            self.log("val_auroc", self.auroc)
            self.log("val_end", torch.tensor(2.0))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    return Module


def _captor(base: type) -> Any:
    class Captor(base):  # type: ignore[misc, valid-type]
        def __init__(self, num_examples: int) -> None:
            super().__init__()
            self.num_examples = num_examples
            self.steps = StepSums()
            self.training: MetricSums
            self.validation: MetricSums

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.steps.observe(trainer.fit_loop.epoch_loop._results)

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.training = capture(trainer.fit_loop.epoch_loop._results, self.steps, self.num_examples)

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            self.validation = capture(trainer._results, num_examples=self.num_examples)

    return Captor


KINDS = {"lightning": (pl, Checkpoint), "pytorch_lightning": (pytorch_lightning, OtherCheckpoint)}
Client = tuple[TensorDataset, MetricSums, MetricSums, dict[str, Tensor]]


def _quiet(package: Any, **arguments: Any) -> Any:
    return package.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **arguments,
    )


def _run(kind: str, epochs: int = 1) -> tuple[Any, list[Client]]:
    package, checkpoint = KINDS[kind]
    torch.manual_seed(1)
    server = _module(package.LightningModule)()
    clients = []
    for size in SIZES:
        data = TensorDataset(torch.randn(size, 3), torch.arange(size) % 3)  # AUROC needs both classes
        captor = _captor(checkpoint)(size)
        client = copy.deepcopy(server)
        reset_metric_attributes(client)
        trainer = _quiet(package, max_epochs=epochs, callbacks=[captor])
        loader = DataLoader(data, batch_size=BATCH)
        trainer.fit(client, loader, loader)
        clients.append((data, captor.training, captor.validation, dict(trainer.callback_metrics)))
    return server, clients


@pytest.fixture(scope="module", params=list(KINDS))
def federation(request: pytest.FixtureRequest) -> tuple[Any, list[Client]]:
    return _run(request.param)


def _pooled(clients: list[Client]) -> tuple[Tensor, Tensor]:
    columns = zip(*(data.tensors for data, *_ in clients), strict=True)
    x, y = (torch.cat(column) for column in columns)
    return x, y


def test_training_values_equal_the_pooled_ones(federation: tuple[Any, list[Client]]) -> None:
    server, clients = federation
    values, left_out = reduce(MetricSums.merge, (training for _, training, _, _ in clients)).evaluate(server)
    x, y = _pooled(clients)
    level = x.mean(1)
    declared = torch.cat(
        [data.tensors[0].mean(1)[i : i + 2] for data, *_ in clients for i in range(0, len(data), BATCH)]
    )
    acc = MulticlassAccuracy(3, average="macro")
    acc.update(server.layer(x), y)
    mean = level.mean().item()
    expected = dict.fromkeys(("step_only", "fork", "fork_epoch", "epoch", "after_batch", "at_the_end"), mean)
    expected |= {
        "declared": declared.mean().item(),
        "total": level.sum().item(),
        "low": level.min().item(),
        "high": level.max().item(),
        "step_high": level.max().item(),
        "acc": acc.compute().item(),
        "acc_epoch": acc.compute().item(),
        "at_the_end_declared": torch.cat([data.tensors[0].mean(1)[:3] for data, *_ in clients]).mean().item(),
        "clients": len(SIZES),
    }
    assert values == pytest.approx(expected, abs=1e-6)
    assert left_out.keys() == {"recent"}
    assert "got Running" in left_out["recent"]


def test_validation_values_equal_the_pooled_ones(federation: tuple[Any, list[Client]]) -> None:
    server, clients = federation
    values = reduce(MetricSums.merge, (validation for _, _, validation, _ in clients)).compute(server)
    x, y = _pooled(clients)
    auroc, scores = BinaryAUROC(), MetricCollection({"f1": MulticlassF1Score(3), "macro": MulticlassAccuracy(3)})
    auroc.update(server.layer(x).sigmoid()[:, 0], (y == 0).int())
    scores.update(server.layer(x), y)
    expected = {
        "val_level": x.mean().item(),
        "val_auroc": auroc.compute().item(),
        "val_f1": scores["f1"].compute().item(),
        "val_macro": scores["macro"].compute().item(),
        "val_end": 2.0,
    }
    assert values == pytest.approx(expected, abs=1e-6)


def test_one_client_gives_what_lightning_gives(federation: tuple[Any, list[Client]]) -> None:
    server, clients = federation
    for _, training, validation, lightning in clients:
        own = {**training.compute(server), **validation.compute(server)}
        # a value for steps only is the last step's in Lightning, and _step names exist for steps only
        rest = lightning.keys() - {"step_only", "step_high", "fork_step", "acc_step", "recent"}
        assert own.keys() - {"step_only", "step_high"} == rest
        assert {name: own[name] for name in rest} == pytest.approx({n: lightning[n].item() for n in rest}, abs=1e-6)


def test_epoch_values_are_of_the_last_epoch_and_step_values_of_all() -> None:
    _, clients = _run("lightning", epochs=2)
    data, training, _, _ = clients[0]
    total, steps, step_only = training["total"], training["epoch"], training["step_only"]
    assert isinstance(total, Total)
    assert total.value == pytest.approx(data.tensors[0].mean(1).sum().item(), abs=1e-5)
    assert isinstance(steps, Mean)
    assert steps.weight == SIZES[0]
    assert isinstance(step_only, Mean)
    assert step_only.weight == 2 * SIZES[0]


class _TwoLoaders(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.own = torch.nn.ModuleList([MeanSquaredError(), MeanSquaredError()])
        self.mixed = MeanSquaredError()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        (x,) = batch
        self.log("level", x.mean())
        for name, metric in {"own": self.own[dataloader_idx], "mixed": self.mixed}.items():
            metric.update(x, torch.zeros_like(x))
            self.log(name, metric)


def test_several_dataloaders_keep_their_names() -> None:
    captor = _captor(Checkpoint)(6)
    module = _TwoLoaders()
    loaders = [DataLoader(TensorDataset(torch.full((6, 1), value)), batch_size=4) for value in (1.0, 2.0)]
    _quiet(pl, callbacks=[captor]).validate(module, loaders, verbose=False)
    values, left_out = captor.validation.evaluate(module)
    assert values == {
        "level/dataloader_idx_0": 1.0,
        "level/dataloader_idx_1": 2.0,
        "own/dataloader_idx_0": 1.0,
        "own/dataloader_idx_1": 4.0,
    }
    assert left_out.keys() == {"mixed/dataloader_idx_0", "mixed/dataloader_idx_1"}
    assert "several dataloaders" in left_out["mixed/dataloader_idx_0"]
    assert isinstance(captor.validation["mixed/dataloader_idx_0"], LeftOut)


def test_the_same_explicit_batch_size_of_another_value_counts_for_steps() -> None:
    results, sums = _ResultCollection(training=True), StepSums()
    for epoch in range(2):
        for value, size in ((1.0, 3), (5.0, 1)):
            results.batch, results.batch_size = ["text without a tensor"], None
            results.log("training_step", "loss", torch.tensor(value), on_step=True, on_epoch=False, batch_size=size)
            for _ in range(2):  # two calls in one step are still one batch
                results.log("training_step", "mean", torch.tensor(value), on_epoch=True, batch_size=size)
            sums.observe(results)
            sums.observe(results)  # nothing new
        results.reset()
        assert sums.parts() == {"loss": Mean(8.0 * (epoch + 1), 4.0 * (epoch + 1))}


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(7, 2),
        [torch.zeros(5), torch.zeros(5)],
        {"text": "words", "x": torch.zeros(4, 1)},
        (["a"], {"y": (torch.zeros(6),)}),
        torch.tensor(1.0),
    ],
)
def test_the_batch_size_is_lightnings(batch: Any) -> None:
    results, sums = _ResultCollection(training=True), StepSums()
    results.batch = batch
    results.log("training_step", "loss", torch.tensor(2.0), on_step=True, on_epoch=False)
    sums.observe(results)
    size = extract_batch_size(batch)
    assert sums.parts() == {"loss": Mean(2.0 * size, float(size))}


def test_a_batch_without_a_size_counts_once() -> None:
    results, sums = _ResultCollection(training=True), StepSums()
    results.batch = "text"
    results.log("training_step", "loss", torch.tensor(2.0), on_step=True, on_epoch=False)
    sums.observe(results)
    assert sums.parts() == {"loss": Mean(2.0, 1.0)}


def test_long_rounds_lose_no_step_and_keep_nothing_alive() -> None:
    results, sums = _ResultCollection(training=True), StepSums()
    results.batch = torch.zeros(2)
    for step in range(1000):
        results.log("training_step", "loss", torch.tensor(float(step)), on_step=True, on_epoch=False)
        if step % 3 == 0:  # logged but not observed twice, and a step that logs nothing
            sums.observe(results)
            sums.observe(results)
    assert sums.parts() == {"loss": Mean(2.0 * sum(range(0, 1000, 3)), 2.0 * 334)}
    assert not sums._waiting["loss"].values


def _copied_and_logging(forget: Callable[[torch.nn.Module], None]) -> MetricSums:
    server = _module(pl.LightningModule)()
    data = DataLoader(TensorDataset(torch.randn(9, 3), torch.arange(9) % 3), batch_size=4)
    # what the first self.log of a metric leaves on the module until its fit ends; a server is copied before that
    server._metric_attributes = {id(part): name for name, part in server.named_modules() if isinstance(part, Metric)}
    client = copy.deepcopy(server)
    forget(client)
    captor = _captor(Checkpoint)(9)
    _quiet(pl, max_epochs=1, callbacks=[captor]).fit(client, data, data)
    sums: MetricSums = captor.training
    return sums


def test_copies_of_a_module_that_has_logged_log_again() -> None:
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match="Could not find the `LightningModule`"):
        _copied_and_logging(lambda module: None)
    assert "acc" in _copied_and_logging(reset_metric_attributes)
