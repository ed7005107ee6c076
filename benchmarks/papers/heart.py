"""Fed-Heart-Disease: six algorithms on four hospitals, against FLamby's stored benchmark runs.

Logistic regression from 13 features, batches of 4, 100 local steps, 15 rounds, every hospital in every round. The
number is the mean of the four hospitals' test accuracies. FLamby's runs are ``flamby/results`` of its repository, five
seeds at the revision of its paper; its FedProx there has mu = .01 and gives FedAvg's numbers in every seed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.papers.rows import Row
from benchmarks.papers.training import WithoutTrainingMetrics, draw, federate
from fl_lightning import FederatedTrainer
from fl_lightning.algorithms import Algorithm, FedAdagrad, FedAdam, FedAvg, FedProx, FedYogi, Scaffold
from fl_lightning.data import HeartDiseaseDataModule
from fl_lightning.models import LogisticRegression

__all__ = ["add_arguments", "hospitals", "run"]

_TOLERANCE = 0.03
# FLamby's servers: second moments start at zero, no bias correction
_ADAPTIVE: dict[str, Any] = {"beta1": 0.9, "tau": 1e-8, "initial_v": 0.0}

SETTINGS: dict[str, tuple[Callable[[], Algorithm], float, float]] = {
    "FedAvg": (FedAvg, 0.001, 0.6850),
    "FedProx (mu .01)": (partial(FedProx, 0.01), 0.001, 0.6850),
    "SCAFFOLD": (partial(Scaffold, "II"), 0.001, 0.6840),
    "FedAdam": (partial(FedAdam, lr=0.01, beta2=0.999, **_ADAPTIVE), 0.01, 0.7255),
    "FedYogi": (partial(FedYogi, lr=0.01, beta2=0.999, **_ADAPTIVE), 0.003162, 0.7314),
    "FedAdagrad": (partial(FedAdagrad, lr=0.316228, **_ADAPTIVE), 0.003162, 0.7314),
}
"""By name: the algorithm, the hospitals' learning rate, the published accuracy."""


class Module(WithoutTrainingMetrics, LogisticRegression):
    """13 features to one log-odds."""


class Data(HeartDiseaseDataModule):
    """The curve is the test accuracy after each round, as nothing is chosen by it."""

    def val_dataloader(self) -> Any:
        return self.test_dataloader()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=5, help="runs of each algorithm")
    parser.add_argument("--rounds", type=int, default=15)


def run(options: argparse.Namespace) -> list[Row]:
    rows, curves = [], {}
    for name, (make, lr, published) in SETTINGS.items():
        accuracies, histories = [], []
        for seed in range(options.seeds):
            trainer = federate(
                Module(in_features=13, lr=lr), Data(batch_size=4), make(), options.output / "heart",
                f"{name} seed {seed}", seed, max_rounds=options.rounds, local_steps=100, num_lanes=1,
                local_loop=options.local_loop,
            )  # fmt: skip
            histories.append([report.metrics["val_acc"] for report in trainer.round_history])
            accuracies.append(statistics.mean(hospitals(trainer).values()))
        ours = statistics.mean(accuracies)
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
        rows.append(
            Row(
                name,
                f"{ours:.4f} ± {spread:.4f} ({len(accuracies)} seeds)",
                f"{published:.4f}",
                f"± {_TOLERANCE:.2f}",
                abs(ours - published) <= _TOLERANCE,
            )
        )
        curves[name] = [statistics.mean(values) for values in zip(*histories, strict=True)]
    draw(options.output / "heart" / "heart.png", curves, "pooled test accuracy", "Fed-Heart-Disease")
    return rows


def hospitals(trainer: FederatedTrainer) -> dict[str, float]:
    """Return the test accuracy of the global model at each hospital."""
    data, module = Data(batch_size=4), trainer.lightning_module
    found = {}
    for name in data.client_ids():
        (result,) = trainer.test(module, data.client_test_dataloader(name), verbose=False)
        found[str(name)] = result["test_acc"]
    return found
