"""What two processes of one group run in ``test_isolation.py``: spawned processes import it by this name."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import _distributed_is_initialized
from torchmetrics import MeanMetric

from fl_lightning.metrics import MetricSums, TorchmetricPart, alone, metric_state


class Module(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.level = MeanMetric()


def run(rank: int, port: int, folder: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    module = Module()
    module.level.update(float(rank))
    with alone():
        own = module.level.compute().item()
        believed = _distributed_is_initialized()
    module.level._computed = None  # torchmetrics keeps what it computed last
    together = module.level.compute().item()
    with alone():
        sums = MetricSums({"level": TorchmetricPart("level", metric_state(module.level))})
    # a server that computes on one process only would wait for the other for ever if the loaded metric synchronised
    merged = sums.compute(module)["level"] if rank == 0 else float("nan")
    # one more client on rank 0 only: an uneven cohort
    if rank == 0:
        with alone():
            again = MeanMetric()
            again.update(5.0)
            assert again.compute().item() == 5.0
    results = {"own": own, "believed": believed, "together": together, "merged": merged}
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
