"""FedBuff's claim: time to an accuracy on a virtual clock, beside synchronous FedAvg that waits for stragglers.

Nguyen et al. 2022, section 5: as many clients at work for both, every local training lasts a time of its own from a
half-normal distribution. The paper's data sets need a download; here the clients hold the handwritten digits of
scikit-learn, cut by a Dirichlet distribution. Client and server learning rates are tuned for each algorithm on a small
grid with a seed that is not reported, as in the paper, which tuned both.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import EarlyStopping

from benchmarks.papers.rows import Row
from benchmarks.papers.training import federate
from fl_lightning import Dirichlet, FedAsync, FedAvg, FedAvgM, FedBuff, FederatedDataModule
from fl_lightning.algorithms import Algorithm
from fl_lightning.data import DigitsDataModule
from fl_lightning.models import DigitsClassifier
from fl_lightning.seeding import seed_for
from fl_lightning.types import ClientId

__all__ = ["CONTENDERS", "HalfNormal", "add_arguments", "run"]

CLIENTS, AT_WORK, BUFFER = 100, 20, 5
PUBLISHED = 3.3
Curve = list[tuple[float, float]]


class HalfNormal:
    """Every local training lasts the absolute value of a normal deviate of one second."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def seconds(self, client_id: ClientId, num_steps: int, num_bytes_down: int, num_bytes_up: int, at: float) -> float:
        return abs(random.Random(seed_for(self.seed, 0, client_id, f"duration {at!r}")).gauss(0.0, 1.0))


# algorithm by its server's rate, and its further arguments; a round of FedAvg sums as many updates as lie between two
# evaluations of the others, so that all curves have a point for every 20 updates
CONTENDERS: dict[str, tuple[Callable[[float], Algorithm], dict[str, Any]]] = {
    "FedAvg": (lambda rate: FedAvg() if rate == 1 else FedAvgM(0.0, rate), {"clients_per_round": AT_WORK}),
    "FedBuff": (
        lambda rate: FedBuff(BUFFER, AT_WORK, server_lr=rate),
        {"check_val_every_n_epoch": AT_WORK // BUFFER},
    ),
    "FedAsync": (lambda rate: FedAsync(rate, AT_WORK), {"check_val_every_n_epoch": AT_WORK}),
}
GRID = {"FedAvg": (1.0, 2.0), "FedBuff": (1.0, 2.0), "FedAsync": (0.3, 0.6)}
CLIENT_RATES = (0.1, 0.3)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", type=float, default=0.85, help="validation accuracy that is to be reached")
    parser.add_argument("--seconds", type=float, default=120.0, help="on the virtual clock, after which a run gives up")
    parser.add_argument("--seeds", type=int, default=3, help="runs of the table")


def run(options: argparse.Namespace) -> list[Row]:
    times: dict[str, list[float]] = {}
    curves: dict[str, Curve] = {}
    chosen: dict[str, tuple[float, float]] = {}
    for name in CONTENDERS:
        tried = {
            (lr, rate): _reached(_curve(options, name, lr, rate, 1000), options)
            for lr in CLIENT_RATES
            for rate in GRID[name]
        }
        chosen[name] = min(tried, key=lambda rates: tried[rates])
        print(f"{name}: client rate {chosen[name][0]}, server rate {chosen[name][1]}", flush=True)
        found = [_curve(options, name, *chosen[name], seed) for seed in range(options.seeds)]
        curves[name], times[name] = found[0], [_reached(curve, options) for curve in found]
    folder = options.output / "fedbuff"
    draw(folder / "fedbuff.png", curves, options.target)
    return [_row(name, times, chosen[name], options) for name in CONTENDERS]


def _curve(options: argparse.Namespace, name: str, lr: float, rate: float, seed: int) -> Curve:
    """Return (simulated seconds, accuracy) of every evaluation until the target is reached or the time is over."""
    make, arguments = CONTENDERS[name]
    data = FederatedDataModule(DigitsDataModule(batch_size=10), Dirichlet(CLIENTS, alpha=0.3, seed=seed))
    stop = EarlyStopping("val_acc", mode="max", patience=10**9, stopping_threshold=options.target, verbose=False)
    per_round = AT_WORK / arguments.get("check_val_every_n_epoch", 1)
    trainer = federate(
        DigitsClassifier(lr=lr), data, make(rate), options.output / "fedbuff",
        f"{name} rates {lr} {rate} seed {seed}", seed, fleet=HalfNormal(seed), callbacks=[stop],
        max_rounds=_rounds(name, per_round, options.seconds), local_loop=options.local_loop, num_lanes=1, **arguments,
    )  # fmt: skip
    reports = [report for report in trainer.round_history if "val_acc" in report.metrics]
    return [(report.metrics["simulated_seconds"], report.metrics["val_acc"]) for report in reports]


def _rounds(name: str, updates: float, seconds: float) -> int:
    # a half-normal deviate has mean .8, and the largest of twenty a mean of 2.2
    return int(seconds / 2.2) if name == "FedAvg" else int(seconds * AT_WORK / 0.8 / updates)


def _reached(curve: Curve, options: argparse.Namespace) -> float:
    return next((seconds for seconds, accuracy in curve if accuracy >= options.target), float("inf"))


def _row(
    name: str, times: Mapping[str, Sequence[float]], rates: tuple[float, float], options: argparse.Namespace
) -> Row:
    means = {each: statistics.mean(values) for each, values in times.items()}
    ratio = means["FedAvg"] / means[name]
    spread = statistics.stdev(times[name]) if len(times[name]) > 1 else 0.0
    ours = f"{means[name]:.1f} ± {spread:.1f} s" + ("" if name == "FedAvg" else f", {ratio:.1f} times faster")
    what = f"{name}, rates {rates[0]:g} and {rates[1]:g}: time to {options.target:.0%}"
    if name == "FedBuff":
        return Row(what, ours, f"up to {PUBLISHED} times faster", ">= 2 times faster", ratio >= 2)
    return Row(what, ours, "-")


def draw(path: Path, curves: Mapping[str, Curve], level: float) -> None:
    """Write accuracy over simulated seconds as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), label=label, linewidth=1.2)
    axes.axhline(level, color="black", linestyle=":", linewidth=1)
    axes.set(xlabel="simulated seconds", ylabel="validation accuracy", title="Digits, 20 of 100 clients at work")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
