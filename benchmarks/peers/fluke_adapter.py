"""The workloads in fluke (``fluke-fl==0.8.1``): its ``FedAVG`` with its own clients, server and data loaders.

The criterion notes loss and accuracy of each batch; evaluation, which would pass over data again, is off.
"""

from __future__ import annotations

from typing import Any

from fluke import DDict, FlukeENV
from fluke.algorithms.fedavg import FedAVG
from fluke.data import DataSplitter, DummyDataContainer, FastDataLoader
from fluke.utils import FederationObserver

from benchmarks.contenders import Run, Stopwatch
from benchmarks.peers.adapter import CountingLoss
from benchmarks.program import run_program
from benchmarks.workloads import Workload


class Laps(FederationObserver):
    def __init__(self, run: Run, loss: CountingLoss) -> None:
        self.run, self.loss, self.clock = run, loss, Stopwatch()

    def end_round(self, round: int) -> None:
        self.clock.lap(self.run)
        self.loss.report(self.run)


def _splitter(workload: Workload) -> DataSplitter:
    inputs, labels = workload.data()
    parts = [slice(k * workload.examples, (k + 1) * workload.examples) for k in range(workload.num_clients)]
    loaders = [
        FastDataLoader(inputs[part], labels[part], num_labels=10, batch_size=workload.batch_size, shuffle=True)
        for part in parts
    ]
    container = DummyDataContainer(loaders, [None] * len(loaders), None, num_classes=10)
    return DataSplitter(container, distribution="iid")


def fluke(workload: Workload, rounds: int, processes: int) -> Run:
    assert processes == 1, "fluke is parallel over GPUs only"
    environment = FlukeENV()
    environment.set_seed(0)
    environment.set_device("cpu")
    environment.set_eval_cfg(pre_fit=False, post_fit=False, locals=False, server=False)
    run, loss = Run(), CountingLoss()
    client: dict[str, Any] = {
        "batch_size": workload.batch_size, "local_epochs": 1, "loss": lambda: loss,
        "optimizer": DDict(name="SGD", lr=workload.lr), "scheduler": DDict(step_size=1, gamma=1),
    }  # fmt: skip
    algorithm = FedAVG(
        workload.num_clients,
        _splitter(workload),
        DDict(client=DDict(**client), server=DDict(weighted=True), model=workload.model()),
    )
    algorithm.set_callbacks(Laps(run, loss))
    # int(share * clients) of them take part: a share that rounding made too small would lose one
    algorithm.run(rounds, (workload.cohort + 0.5) / workload.num_clients)
    return run


if __name__ == "__main__":
    run_program(fluke)
