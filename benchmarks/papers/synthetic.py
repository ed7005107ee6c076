"""FedProx's synthetic federations with stragglers.

Li et al. 2020, figures 1 and 2: 30 devices, 10 in a round, 20 local epochs, batches of 10, learning rate .01. A part
of each cohort is slow and gets only 1 to 19 epochs done. FedAvg drops the slow ones, FedProx takes what they have.
Cohorts, slow devices and their epochs are the same for all algorithms, as in the paper. The paper shows curves and says
that FedProx improves test accuracy by 22 points on average where 90% are slow. A seed draws the federation as well, in
the order of the program that the authors released; how much FedProx gains differs much from one to the next.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from benchmarks.papers.rows import Row
from benchmarks.papers.stragglers import PartialWork, Plan
from benchmarks.papers.training import WithoutTrainingMetrics, add_resume, draw, federate
from fl_lightning import FedAvg
from fl_lightning.algorithms import Algorithm
from fl_lightning.data.synthetic import SyntheticDataModule
from fl_lightning.models import LogisticRegression
from fl_lightning.schedules import FixedSampler

__all__ = ["DATA", "add_arguments", "run"]

_LAST = 20  # rounds that a number is the mean of: with 90% dropped, single rounds of FedAvg jump
_GAIN = 0.2
DATA: dict[str, dict[str, Any]] = {
    "iid": {"iid": True},
    "0,0": {"alpha": 0.0, "beta": 0.0},
    "0.5,0.5": {"alpha": 0.5, "beta": 0.5},
    "1,1": {"alpha": 1.0, "beta": 1.0},
}


class Module(WithoutTrainingMetrics, LogisticRegression):
    """60 features, 10 classes."""


class Data(SyntheticDataModule):
    """The curve is the devices' pooled test accuracy."""

    def val_dataloader(self) -> Any:
        return self.test_dataloader()


class TrainingLoss(pl.Callback):
    """Logs the objective: the loss of the global model on the training examples of all devices."""

    def __init__(self, data: SyntheticDataModule) -> None:
        splits: Any = data.train_dataloader().dataset
        self.inputs, self.labels = (torch.cat([part.tensors[i] for part in splits.datasets]) for i in (0, 1))

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        logits: Tensor = pl_module(self.inputs)
        pl_module.log("objective", torch.nn.functional.cross_entropy(logits, self.labels))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", nargs="+", choices=[*DATA], default=["1,1"])
    parser.add_argument("--stragglers", nargs="+", type=float, default=[0.0, 0.5, 0.9], help="slow part of a cohort")
    parser.add_argument("--mu", nargs="+", type=float, default=[0.0, 1.0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2, help="runs, each with a seed of data, cohorts and weights")
    parser.add_argument("--first_seed", type=int, default=0, help="the seeds count from here")
    add_resume(parser)


def run(options: argparse.Namespace) -> list[Row]:
    return [row for data in options.data for slow in options.stragglers for row in _setting(options, data, slow)]


def _setting(options: argparse.Namespace, name: str, slow: float) -> list[Row]:
    ends: dict[str, list[tuple[float, float]]] = {}
    curves: dict[str, list[float]] = {}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        data = Data(**DATA[name], seed=seed)
        plan = Plan.draw(data.client_ids(), options.rounds, 10, slow, 20, seed)
        for label, algorithm, cohorts in _contenders(options, plan):
            trainer = federate(
                Module(60, 10, lr=0.01), data, algorithm, options.output / "synthetic",
                f"({name}) {slow:.0%} {label} seed {seed}", seed, max_rounds=options.rounds, local_epochs=20,
                sampler=FixedSampler(cohorts), callbacks=[TrainingLoss(data)],
                local_loop=options.local_loop, resumes=options.resume,
            )  # fmt: skip
            accuracy, loss = ([r.metrics[key] for r in trainer.round_history] for key in ("val_acc", "objective"))
            curves[f"{label}, seed {seed}"] = accuracy
            ends.setdefault(label, []).append((statistics.mean(accuracy[-_LAST:]), statistics.mean(loss[-_LAST:])))
            print(f"({name}) {slow:.0%} {label} seed {seed}: {ends[label][-1]}", flush=True)
    title = f"synthetic({name}), {slow:.0%} stragglers"
    draw(options.output / "synthetic" / f"{name}-{slow:.0%}.png", curves, "test accuracy", title)
    # devices that differ less have less to gain: the gate is that of the data that differ most
    return _rows(title, ends, gated=slow == 0.9 and name == "1,1")


def _contenders(options: argparse.Namespace, plan: Plan) -> list[tuple[str, Algorithm, list[list[Any]]]]:
    fast: list[tuple[str, Algorithm, list[list[Any]]]] = [("FedAvg", FedAvg(), plan.fast())]
    # without slow devices mu = 0 is FedAvg, bit for bit
    pulls = [mu for mu in options.mu if mu > 0 or any(plan.epochs)]
    return fast + [(f"FedProx mu={mu:g}", PartialWork(mu, plan.epochs), plan.cohorts) for mu in pulls]


def _rows(title: str, ends: dict[str, list[tuple[float, float]]], gated: bool) -> list[Row]:
    means = {label: tuple(statistics.mean(values) for values in zip(*e, strict=True)) for label, e in ends.items()}
    rows = []
    for label, (accuracy, loss) in means.items():
        each = ", ".join(f"{value:.3f}" for value, _ in ends[label])
        gate, passed, published = "", None, "curve"
        if gated and label == "FedProx mu=1":
            gate = f"FedAvg + {_GAIN}, lower loss"
            passed = accuracy >= means["FedAvg"][0] + _GAIN and loss < means["FedAvg"][1]
            published = "+.22 on average"
        rows.append(Row(f"{title}: {label}", f"acc {accuracy:.3f} ({each}), loss {loss:.3f}", published, gate, passed))
    return rows
