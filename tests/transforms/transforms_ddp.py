"""What the script runs that ``test_federation`` starts with one and with two ranks."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import lightning.pytorch as pl
import torch
from spine_zoo import QUIET, Classifier, ServedSites, sites, weights
from transforms_zoo import TRANSFORMS

from fl_lightning import FederatedTrainer

LONGER = ("top quantised", "feedback", "random shared", "broadcast and update", "eden 1")
"""Three rounds, and two of the others: enough for what a round leaves behind, and all share their processes."""


def main(devices: int, folder: str) -> None:
    """Train with several transforms one after the other; rank zero leaves weights and history in the folder."""
    found, history = {}, {}
    for name in TRANSFORMS:
        pl.seed_everything(7, verbose=False)
        module = Classifier(hidden=6)
        trainer = FederatedTrainer(
            **QUIET, max_rounds=3 if name in LONGER else 2, clients_per_round=3, transforms=[TRANSFORMS[name]()],
            num_threads=1, devices=devices, strategy="ddp" if devices > 1 else "auto",
            default_root_dir=os.path.join(folder, name),
        )  # fmt: skip
        trainer.fit(module, ServedSites(sites(5)))
        found[name] = weights(module)
        history[name] = [asdict(report) | {"seconds": 0.0} for report in trainer.round_history]
    if trainer.is_global_zero:
        torch.save(found, os.path.join(folder, "weights.pt"))
        Path(folder, "history.json").write_text(json.dumps(history))
