"""The workloads in BlazeFL (``blazefl==3.0.0``): the loop of its README with the FedAvg of ``blazefl.contrib``.

One process is its single-threaded trainer, more are threads of its thread pool, which it recommends. Losses and
accuracies are noted by the criterion, so the library's own training loop runs unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from blazefl.contrib import fedavg
from blazefl.contrib.fedavg import FedAvgBaseClientTrainer, FedAvgBaseServerHandler, FedAvgThreadPoolClientTrainer
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks.contenders import Run, Stopwatch
from benchmarks.peers.adapter import CountingLoss
from benchmarks.program import run_program
from benchmarks.workloads import Workload


class Models:
    """What BlazeFL calls a model selector."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload

    def select_model(self, model_name: str) -> nn.Module:
        return self.workload.model()


class Partitions:
    """What BlazeFL calls a partitioned data set."""

    def __init__(self, workload: Workload) -> None:
        self.examples = workload.examples
        self.inputs, self.labels = workload.data()

    def get_dataset(self, type_: str, cid: int) -> Dataset[Any]:
        part = slice(cid * self.examples, (cid + 1) * self.examples)
        return TensorDataset(self.inputs[part], self.labels[part])

    def set_dataset(self, type_: str, cid: int, dataset: Dataset[Any]) -> None:
        raise NotImplementedError("clients keep their examples")

    def get_dataloader(self, type_: str, cid: int, batch_size: int, generator: torch.Generator) -> DataLoader[Any]:
        return DataLoader(self.get_dataset(type_, cid), batch_size, shuffle=True, generator=generator)


def blazefl(workload: Workload, rounds: int, processes: int) -> Run:
    models, data, loss, run = Models(workload), Partitions(workload), CountingLoss(), Run()
    fedavg.tqdm = lambda jobs, **_: jobs  # no bars in the table
    common: dict[str, Any] = {
        "model_selector": models, "model_name": workload.name, "dataset": data, "device": "cpu",
        "num_clients": workload.num_clients, "batch_size": workload.batch_size, "seed": 0,
    }  # fmt: skip
    share = workload.cohort / workload.num_clients
    server = FedAvgBaseServerHandler(global_round=rounds, sample_ratio=share, **common)
    if processes == 1:
        trainer = FedAvgBaseClientTrainer(epochs=1, lr=workload.lr, **common)
        trainer.criterion = loss
    else:
        nn.CrossEntropyLoss = lambda: loss  # type: ignore[assignment, misc]  # its threads make their own
        trainer = FedAvgThreadPoolClientTrainer(epochs=1, lr=workload.lr, num_parallels=processes, **common)
    clock = Stopwatch()
    while not server.is_stopped():
        sampled = server.sample_clients()
        broadcast = server.downlink_package()
        trainer.local_process(broadcast, sampled)
        for package in trainer.uplink_package():
            server.load(package)
        clock.lap(run)
        loss.report(run)
    return run


if __name__ == "__main__":
    run_program(blazefl)
