"""What the scripts run that ``test_engines`` launches with one and two ranks, and modules for spawned processes."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from spine_modules import Metrics
from spine_zoo import QUIET, Classifier, ServedSites, sites, weights
from torch.nn import functional as F
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassAccuracy

from fl_lightning.errors import MisconfigurationException
from fl_lightning.trainer import FederatedTrainer


class Crashes(Classifier):
    """The process of the client with 18 examples ends without a word."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if len(self.trainer.train_dataloader.dataset) == 18:
            os._exit(9)  # as the kernel does when memory is short
        return super().training_step(batch, batch_idx)


class Raises(Classifier):
    """Every client raises."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise ZeroDivisionError("a broken sensor")


class RaisesOnTheOtherRank(Classifier):
    """One client fails, and writes down on which rank."""

    error: type[Exception] = ZeroDivisionError

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if len(self.trainer.train_dataloader.dataset) == 18:
            Path("failed-on.txt").write_text(f"rank {os.environ.get('LOCAL_RANK', '0')}")
            raise self.error("a broken sensor" if self.error is ZeroDivisionError else "wrong for everyone")
        return super().training_step(batch, batch_idx)


class EvaluatesMetrics(Metrics):
    """Logs in validation what a synchronisation over ranks would double, and what a shard would halve."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = SumMetric()
        self.val_accuracy = MulticlassAccuracy(3, average="macro")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.seen.update(len(x))
        self.val_accuracy.update(logits, y)
        self.log("val_seen", self.seen)
        self.log("val_accuracy", self.val_accuracy)
        self.log("val_count", float(len(x)), reduce_fx="sum", sync_dist=True, on_epoch=True)
        self.log("val_loss", F.cross_entropy(logits, y), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        self.log("val_by_hand", self.val_accuracy.compute(), sync_dist=True)


class Misconfigured(RaisesOnTheOtherRank):
    error = MisconfigurationException


def leave(pipe: Any) -> None:
    """Stand for a process that cannot even start."""
    pipe.close()
    sys.exit(3)


def main(scenarios: str, devices: int, folder: str) -> None:
    """Fit scenarios one after the other (a launch costs more than a fit)."""
    for scenario in scenarios.split(","):
        fit(scenario, devices, os.path.join(folder, scenario))


def fit(scenario: str, devices: int, folder: str) -> None:
    """Fit a scenario and leave weights, history and logs in the folder."""
    os.makedirs(folder, exist_ok=True)
    pl.seed_everything(7, verbose=False)
    arguments: dict[str, Any] = {"max_rounds": 3, "client_state": "keep", "num_threads": 1}
    module: Any = EvaluatesMetrics()
    if scenario == "uneven":
        arguments |= {"clients_per_round": 3, "local_epochs": 2, "evaluate_clients": False}
    elif scenario in ("raises", "skips"):
        module = RaisesOnTheOtherRank()
    elif scenario == "raises-misconfiguration":
        module = Misconfigured()
    if scenario == "skips":
        arguments["on_bad_update"] = "skip"
    logger = TensorBoardLogger(os.path.join(folder, "logs"), name="run")
    strategy = "ddp" if devices > 1 else "auto"
    trainer = FederatedTrainer(**{**QUIET, "logger": logger, "devices": devices, "strategy": strategy, **arguments})
    trainer.fit(module, ServedSites(sites(5)))
    if trainer.is_global_zero:
        torch.save(weights(module), os.path.join(folder, "weights.pt"))
        history = [asdict(report) | {"seconds": 0.0} for report in trainer.round_history]
        Path(folder, "history.json").write_text(json.dumps(history))
