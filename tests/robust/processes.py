"""Trains every robust rule on the processes that ``torchrun`` started, and saves the weights."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from robust_zoo import RULES, Net, clients, train, weights

from fl_lightning.algorithms.robust import Cohort

if __name__ == "__main__":
    torch.set_num_threads(1)
    Cohort.block_elements = 30  # several blocks a tensor
    results = {}
    for name, make in RULES.items():
        torch.manual_seed(0)
        module = Net(normalised=True)
        data = clients((12, 20, 7, 10, 16, 6, 8))
        # five of seven clients in lanes of unequal size: the processes train unequal numbers of them
        train(make(), module, data, clients_per_round=5, devices=int(os.environ["WORLD_SIZE"]), strategy="ddp")
        results[name] = weights(module)
    if int(os.environ["RANK"]) == 0:
        torch.save(results, sys.argv[1])
