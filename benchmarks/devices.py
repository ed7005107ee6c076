"""``python -m benchmarks.devices``: a day in the life of 100,000 devices, and what simulating it costs."""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from fl_lightning import DeviceFleet, FederatedTrainer
from fl_lightning.devices import AdaptiveEpochs, DeviceRounds, Eligibility
from fl_lightning.schedules import Occasion, Plan

DAY = 86_400.0
FEATURES, EXAMPLES, BATCH = 20, 20, 10


class Devices:
    """Any number of devices with the same few examples: training costs next to nothing, so what is left is overhead."""

    def __init__(self, num_clients: int) -> None:
        draw = torch.Generator().manual_seed(0)
        inputs = torch.randn(EXAMPLES, FEATURES, generator=draw)
        self.ids, self.data = range(num_clients), TensorDataset(inputs, (inputs[:, 0] > 0).long())

    def client_ids(self) -> Sequence[int]:
        return self.ids

    def client_size(self, client_id: int) -> int:
        return EXAMPLES

    def client_dataloader(self, client_id: int) -> DataLoader[Any]:
        return DataLoader(self.data, batch_size=BATCH)


class Smallest(pl.LightningModule):
    """A linear layer and no metric."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(FEATURES, 2)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Timed(DeviceRounds):
    """Remembers the seconds that planning took; a copy made for a fit shares the list."""

    seconds: list[float] = []  # noqa: RUF012 (shared by the copy of every fit, on purpose)

    def plan(self, occasion: Occasion) -> Plan:
        begin = time.process_time()  # of this process alone: a busy machine does not change it much
        plan = super().plan(occasion)
        self.seconds.append(time.process_time() - begin)
        return plan


class Midnight(pl.Callback):
    """Ends the run after a day on the virtual clock."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = float(trainer.callback_metrics["simulated_seconds"]) >= DAY


def run(devices: int, cohort: int, max_rounds: int, **more: Any) -> tuple[FederatedTrainer, float]:
    pl.seed_everything(1, verbose=False)
    trainer = FederatedTrainer(
        max_rounds=max_rounds, clients_per_round=cohort, local_epochs=4, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **more,
    )  # fmt: skip
    begin = time.perf_counter()
    trainer.fit(Smallest(), datamodule=Devices(devices))
    return trainer, time.perf_counter() - begin


def main() -> None:
    options = _parsed()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    schedule = Timed(
        over_selection=1.3, deadline=120.0, min_reports=0.5, stragglers="partial", pace_seconds=options.pace,
        policies=[AdaptiveEpochs()], eligibility=Eligibility(idle=True, charging=True, unmetered=True),
    )  # fmt: skip
    fleet = DeviceFleet(profile="smartphones", speed="lognormal(0.4, 0.7)")
    trainer, seconds = run(
        options.devices, options.cohort, 100_000, schedule=schedule, fleet=fleet, callbacks=Midnight()
    )
    history = trainer.round_history
    report(options, history, schedule.seconds, seconds)


def report(options: argparse.Namespace, history: Sequence[Any], planning: list[float], seconds: float) -> None:
    reasons: Counter[str] = Counter()
    for round_report in history:
        for name, value in round_report.metrics.items():
            if name.startswith("devices/dropped/"):
                reasons[name.removeprefix("devices/dropped/").replace("_", " ")] += int(value)
    last = history[-1].metrics
    shares = " / ".join(f"{last[f'devices/share/{name}']:.2f}" for name in ("slow", "medium", "fast"))
    slowest = f"{1e3 * sorted(planning)[len(planning) // 2]:.0f} / {1e3 * max(planning):.0f}"
    rows = [
        ("devices", f"{options.devices:,}"),
        ("virtual hours", f"{last['simulated_seconds'] / 3600:.1f}"),
        ("rounds", f"{len(history):,}"),
        ("reports", f"{sum(len(r.cohort) for r in history):,}"),
        ("of them partial", f"{sum(int(r.metrics['devices/partial']) for r in history):,}"),
        ("devices that took part", f"{int(last['devices/participants']):,}"),
        ("reports of slow / medium / fast", shares),
        ("energy, estimate", f"{sum(r.metrics['devices/energy_wh_estimate'] for r in history):.1f} Wh"),
        *((reason, f"{count:,}") for reason, count in reasons.most_common() if count),
        ("CPU seconds of the devices, in all", f"{sum(planning):.1f}"),
        ("CPU ms of the devices, a round: median / slowest", slowest),
        ("wall-clock seconds, training included", f"{seconds:.1f}"),
    ]
    print("| a day of devices | |\n|---|---|")
    for name, value in rows:
        print(f"| {name} | {value} |")


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.devices", description=__doc__)
    parser.add_argument("--devices", type=int, default=100_000)
    parser.add_argument("--cohort", type=int, default=100, help="reports wanted in a round")
    parser.add_argument("--pace", type=float, default=300.0, help="virtual seconds from one round to the next")
    return parser.parse_args()


if __name__ == "__main__":
    main()
