"""Trains everyone in groups of clients on the processes that ``torchrun`` started, and saves the weights."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from algorithm_zoo import Net, weights
from everyone import EVERYONE, LOOPS, train

if __name__ == "__main__":
    torch.set_num_threads(1)
    processes = int(os.environ["WORLD_SIZE"])
    results = {}
    for name in EVERYONE:
        torch.manual_seed(1)
        # two lanes of two and three clients, in one process or in one each
        train(name, module := Net(), devices=processes, strategy="ddp", **{**LOOPS["groups"], "num_lanes": 2})
        results[name] = weights(module)
    if int(os.environ["RANK"]) == 0:
        torch.save(results, sys.argv[1])
