"""Which loop runs, and what is said about it."""

from __future__ import annotations

import copy
import logging
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.demos.boring_classes import BoringModel, ManualOptimBoringModel
from zoo import ZOO, Plain, broadcast_of, job, linear, loader, settings_for

from fl_lightning.algorithms.fedavg import FedAvg
from fl_lightning.errors import MisconfigurationException
from fl_lightning.local.choice import choose_loop
from fl_lightning.local.lean_loop import LeanLoop
from fl_lightning.local.lightning_loop import LightningLoop
from fl_lightning.local.settings import LocalSettings
from fl_lightning.trainer import FederatedTrainer


class OwnBackward(Plain):
    def backward(self, loss: Any) -> None:
        (2 * loss).backward()


class OwnStep(Plain):
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)


class OwnTransfer(Plain):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] * 2, batch[1]]


class ByIterator(Plain):
    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        return self.loss(next(dataloader_iter)[0])[0]


class AfterBackward(pl.Callback):
    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Does something that the lean loop does not call."""


def test_plain_modules_take_the_lean_loop() -> None:
    for kind, make in ZOO.items():
        assert type(choose_loop(make(), FedAvg(), LocalSettings())) is LeanLoop, kind


@pytest.mark.parametrize(
    ("make", "changes", "reason"),
    [
        (ManualOptimBoringModel, {}, "manual optimization"),
        (lambda: OwnBackward(linear()), {}, "OwnBackward overrides backward"),
        (lambda: OwnStep(linear()), {}, "overrides optimizer_step"),
        (lambda: OwnTransfer(linear()), {}, "overrides on_after_batch_transfer"),
        (lambda: ByIterator(linear()), {}, "takes the loader's iterator"),
        (BoringModel, {"trainer_arguments": {"overfit_batches": 2}}, "overfit_batches=2 needs a real Trainer"),
        (BoringModel, {"trainer_arguments": {"detect_anomaly": True}}, "detect_anomaly=True"),
        (BoringModel, {"trainer_arguments": {"precision": "bf16-true"}}, "precision 'bf16-true'"),
        (BoringModel, {"callbacks": [StochasticWeightAveraging(0.1)]}, "StochasticWeightAveraging"),
        (BoringModel, {"callbacks": [AfterBackward()]}, "AfterBackward uses on_after_backward"),
    ],
)
def test_what_is_in_the_way_is_named(make: Any, changes: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        assert type(choose_loop(make(), FedAvg(), LocalSettings(**changes))) is LightningLoop
    assert [reason in record.message for record in caplog.records] == [True], "one line says why"
    with pytest.raises(MisconfigurationException, match=f"Expected a plain module for local_loop='lean'.*{reason}"):
        choose_loop(make(), FedAvg(), LocalSettings(**changes, local_loop="lean"))


def test_lightning_is_taken_when_asked_for() -> None:
    assert type(choose_loop(BoringModel(), FedAvg(), LocalSettings(local_loop="lightning"))) is LightningLoop


def test_a_later_takeover_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    class Asks(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.trainer.callback_metrics  # noqa: B018
            return super().training_step(batch, batch_idx)

    module = Asks(linear())
    settings = settings_for(module, FedAvg())
    broadcast = broadcast_of(module, settings)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        loop = LeanLoop(copy.deepcopy(module), FedAvg(), settings)
        outcomes = list(loop.run([job(broadcast, loader, name) for name in "abc"]))
    assert [outcome.error for outcome in outcomes] == [None] * 3
    (record,) = caplog.records
    says = "LightningLoop takes over the local training from LeanLoop: it uses self.trainer.callback_metrics."
    assert record.message == says


def test_a_pytorch_lightning_module_is_plain_in_a_federation(caplog: pytest.LogCaptureFixture) -> None:
    pytorch_lightning = pytest.importorskip("pytorch_lightning")
    losses = []
    for package in (pl, pytorch_lightning):

        class Other(package.LightningModule):  # type: ignore[name-defined, misc]
            def __init__(self) -> None:
                super().__init__()
                self.net = linear()

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
                self.log("loss", loss, on_epoch=True)
                return loss

            def validation_step(self, batch: Any, batch_idx: int) -> None:
                self.log("val_loss", torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=0.1)

        caplog.set_level(logging.INFO)
        pl.seed_everything(0, verbose=False)
        module = Other()
        trainer = FederatedTrainer(
            max_rounds=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, accelerator="cpu",
        )  # fmt: skip
        trainer.fit(module, {"a": loader(), "b": loader()})
        losses.append(trainer.round_history[0].metrics)
    said = [record.message for record in caplog.records if record.message.startswith("Clients train")]
    groups = "Groups of at most 256 of a lane train at once, if they can."
    assert said == [f"Clients train in LeanLoop: Other is plain. {groups}"] * 2
    assert losses[0] == losses[1]


def test_the_clients_of_a_pytorch_lightning_module() -> None:
    pytorch_lightning = pytest.importorskip("pytorch_lightning")

    class Other(pytorch_lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = linear()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss, on_epoch=True)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Other()
    settings = settings_for(module, FedAvg())
    ours = Plain(linear())
    ours.load_state_dict(module.state_dict())
    loop = choose_loop(module, FedAvg(), settings)
    assert type(loop) is LeanLoop
    (outcome,) = loop.run([job(broadcast_of(module, settings), loader)])
    (other,) = LightningLoop(ours, FedAvg(), settings).run([job(broadcast_of(ours, settings), loader)])
    assert outcome.update is not None
    assert other.update is not None
    assert loop.reason is None
    assert all(torch.equal(delta, other.update.delta[name]) for name, delta in outcome.update.delta.items())
