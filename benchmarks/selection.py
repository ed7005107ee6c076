"""``python -m benchmarks.selection``: whom devices' rounds leave out, and what samplers do about it.

A hundred clients share the digits unevenly, and the more of the digits from 5 to 9 a client has, the slower its device
is. A round sends work to half again as many devices as it takes reports, so the slow ones are rarely among the first.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from fl_lightning import DeviceFleet, Dirichlet, FederatedDataModule, FederatedTrainer
from fl_lightning.data import DigitsDataModule
from fl_lightning.devices import DeviceRounds, FairSampler, OortSampler
from fl_lightning.models import DigitsClassifier
from fl_lightning.schedules import Sampler, UniformSampler

__all__ = ["SAMPLERS", "Outcome", "main", "run", "speeds"]

SAMPLERS: dict[str, Callable[[], Sampler]] = {
    "uniform": UniformSampler,
    "Oort-like": OortSampler,
    "fair": lambda: FairSampler(candidates=5),
}


@dataclass(frozen=True)
class Outcome:
    """What a sampler led to.

    Args:
        shares: of all reports that came from slow, medium and fast devices.
        reports: of every client, sorted.
        accuracy: of the global model on slow, medium and fast devices' data, and on the test set.
        seconds: on the virtual clock until the target, or ``None``.
        hours: on the virtual clock, of all rounds.
    """

    shares: tuple[float, ...]
    reports: Sequence[int]
    accuracy: tuple[float, ...]
    seconds: float | None
    hours: float


def speeds(data: FederatedDataModule) -> dict[int, float]:
    """Return steps a second by client: 8 without a digit above 4, a tenth of it with nothing else."""
    found = {}
    for client_id in data.client_ids():
        labels = torch.cat([batch[1] for batch in data.client_dataloader(client_id)])
        found[client_id] = 8.0 * 10.0 ** -float((labels >= 5).float().mean())
    return found


def run(sampler: Sampler, options: argparse.Namespace) -> Outcome:
    """Train with a sampler.

    Args:
        sampler: proposes devices.
        options: of the command line.
    """
    pl.seed_everything(options.seed, verbose=False)
    data = FederatedDataModule(DigitsDataModule(batch_size=10), Dirichlet(options.clients, 0.2, seed=options.seed))
    data.prepare_data()
    data.setup("fit")
    speed = speeds(data)
    trainer = FederatedTrainer(
        max_rounds=options.rounds, clients_per_round=10, local_epochs=3, sampler=sampler,
        fleet=DeviceFleet(speed=lambda client_id: speed[client_id]), schedule=DeviceRounds(over_selection=1.5),
        evaluate_clients=True, evaluate_every_n_rounds=options.rounds, accelerator="cpu", num_threads=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(DigitsClassifier(lr=0.1), data)
    return _outcome(trainer, data, options.target)


def _outcome(trainer: Any, data: Any, target: float) -> Outcome:
    history = trainer.round_history
    last = history[-1].metrics
    counts = Counter(client_id for report in history for client_id in report.cohort)
    reached = next((r.metrics["simulated_seconds"] for r in history if r.metrics.get("val_acc", 0) >= target), None)
    classes = ("slow", "medium", "fast")
    return Outcome(
        tuple(last[f"devices/share/{name}"] for name in classes),
        sorted(counts[client_id] for client_id in data.client_ids()),
        (*(last[f"clients/val_acc/{name}"] for name in classes), last["val_acc"]),
        reached,
        last["simulated_seconds"] / 3600,
    )


def table(outcomes: Mapping[str, Outcome], target: float) -> list[str]:
    """Return lines of Markdown."""
    thirds = "slow / medium / fast"
    lines = [
        (
            f"| sampler | reports of {thirds} | never / median / most reports | accuracy on {thirds} | on the test set "
            f"| virtual seconds to {target:g} | in all |"
        ),
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in outcomes.items():
        shares = " / ".join(f"{share:.2f}" for share in one.shares)
        reports = np.array(one.reports)
        spread = f"{int((reports == 0).sum())} / {int(np.median(reports))} / {reports.max()}"
        accuracy = " / ".join(f"{value:.3f}" for value in one.accuracy[:-1])
        seconds = "-" if one.seconds is None else f"{one.seconds:,.0f}"
        total = f"{one.hours * 3600:,.0f}"
        lines.append(f"| {name} | {shares} | {spread} | {accuracy} | {one.accuracy[-1]:.3f} | {seconds} | {total} |")
    return lines


def histogram(outcome: Outcome) -> list[str]:
    """Return how many clients delivered how often, as lines of text."""
    edges = np.unique(np.linspace(0, max(outcome.reports[-1], 1) + 1, 9).astype(int))
    counts, _ = np.histogram(outcome.reports, bins=edges)
    return [
        f"{low:4d} to {high - 1:4d} reports  {'#' * int(count)} {count}"
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selection", description=__doc__)
    parser.add_argument("--samplers", nargs="+", choices=[*SAMPLERS], default=[*SAMPLERS])
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--target", type=float, default=0.85, help="accuracy on the test set")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    outcomes = {name: run(SAMPLERS[name](), options) for name in options.samplers}
    print("\n".join(table(outcomes, options.target)))
    for name, outcome in outcomes.items():
        print(f"\nreports of a client, {name}:", *histogram(outcome), sep="\n")


if __name__ == "__main__":
    main()
