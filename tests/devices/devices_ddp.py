"""What the script runs that ``test_federation`` starts with one and with two ranks."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from spine_zoo import QUIET, Classifier, ServedSites, sites, weights

from fl_lightning import DeviceFleet, FederatedTrainer, FedProx
from fl_lightning.devices import AdaptiveEpochs, DeviceRounds, FairSampler, OortSampler


def phones() -> DeviceFleet:
    """Slow enough for a deadline, and small batteries that a round is felt in."""
    return DeviceFleet(
        profile="smartphones",
        speed="lognormal(0.5, 0.7)",
        battery_wh=0.2,
        quality=1.0,
        quality_spread=0.0,
        start_hour=4.0,
    )


def arguments(sampler: Any) -> dict[str, Any]:
    rounds = DeviceRounds(
        over_selection=1.5, deadline=40.0, stragglers="partial", policies=[AdaptiveEpochs()], pace_seconds=600.0,
        max_wait_hours=100.0,
    )  # fmt: skip
    return {
        "fleet": phones(), "schedule": rounds, "sampler": sampler, "clients_per_round": 3, "local_epochs": 4,
        "algorithm": FedProx(mu=0.1),
    }  # fmt: skip


SAMPLERS = {"uniform": lambda: None, "oort": OortSampler, "fair": FairSampler}


def main(devices: int, folder: str) -> None:
    """Train with several samplers one after the other; rank zero leaves weights and history in the folder."""
    found, history = {}, {}
    for name, sampler in SAMPLERS.items():
        pl.seed_everything(7, verbose=False)
        module = Classifier(hidden=6)
        trainer = FederatedTrainer(
            **QUIET, **arguments(sampler()), max_rounds=4, num_threads=1, devices=devices,
            strategy="ddp" if devices > 1 else "auto", default_root_dir=os.path.join(folder, name),
        )  # fmt: skip
        trainer.fit(module, ServedSites(sites(8)))
        found[name] = weights(module)
        history[name] = [asdict(report) | {"seconds": 0.0} for report in trainer.round_history]
    if trainer.is_global_zero:
        torch.save(found, os.path.join(folder, "weights.pt"))
        Path(folder, "history.json").write_text(json.dumps(history))
