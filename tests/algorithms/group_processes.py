"""Trains every algorithm in groups of clients on the processes that ``torchrun`` started, and saves the weights."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from test_groups import LAWFUL, net, train

if __name__ == "__main__":
    torch.set_num_threads(1)
    processes = int(os.environ["WORLD_SIZE"])
    results = {name: train(name, net(), 4, devices=processes, strategy="ddp")[0] for name in LAWFUL}
    if int(os.environ["RANK"]) == 0:
        torch.save(results, sys.argv[1])
