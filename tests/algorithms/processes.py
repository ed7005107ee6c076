"""Trains every algorithm for three rounds on the processes that ``torchrun`` started, and saves the weights."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch

sys.path.insert(0, str(Path(__file__).parent))

from algorithm_zoo import ALGORITHMS, Net, clients, drawn, weights
from quadratics import quiet_trainer

if __name__ == "__main__":
    torch.set_num_threads(1)
    processes = int(os.environ["WORLD_SIZE"])
    results = {}
    for name, make in ALGORITHMS.items():
        pl.seed_everything(5, verbose=False)
        trainer = quiet_trainer(
            algorithm=make(), max_rounds=3, devices=processes, strategy="ddp", local_epochs=2, **drawn(name, 4)
        )
        module = Net()
        trainer.fit(module, clients((12, 20, 7, 9, 16)))
        results[name] = weights(module)
    if int(os.environ["RANK"]) == 0:
        torch.save(results, sys.argv[1])
