"""The workloads in pfl-research (``pfl[pytorch]==0.6.0``): its simulated backend and its federated averaging.

The user's ``loss`` counts losses and correct answers, one pair of numbers a client; pfl's own evaluation, which would
pass over the data twice more, is off. Several processes are ranks of ``torchrun``; seconds are those of rank 0.
"""

from __future__ import annotations

from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import MinimizeReuseUserSampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.internal.ops.selector import get_framework_module
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

from benchmarks.contenders import Run, Stopwatch
from benchmarks.peers.adapter import CountingLoss
from benchmarks.program import run_program
from benchmarks.workloads import Workload


class Network(nn.Module):
    """What pfl calls a model: a network with ``loss`` and ``metrics``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.counted = CountingLoss()

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self.counted(self.network(inputs), labels)
        return loss

    def metrics(self, inputs: Tensor, labels: Tensor) -> dict[str, Any]:
        return {}


class Laps(TrainingProcessCallback):
    def __init__(self, run: Run, network: Network) -> None:
        self.run, self.network, self.clock = run, network, Stopwatch()
        self.distributed = get_framework_module().distributed

    def after_central_iteration(self, *_: Any, **__: Any) -> tuple[bool, Metrics]:
        self.clock.lap(self.run)
        (sums,) = self.distributed.all_reduce([torch.tensor(self.network.counted.sums(), dtype=torch.float64)])
        steps, losses, accuracies = sums.tolist()
        self.run.steps.append(int(steps))
        self.run.losses.append(losses / steps)
        self.run.accuracies.append(accuracies / steps)
        return False, Metrics()


def pfl(workload: Workload, rounds: int, processes: int) -> Run | None:
    inputs, labels = workload.data()
    size = workload.examples

    def client(k: int) -> Dataset:
        part = slice(k * size, (k + 1) * size)
        return Dataset([inputs[part], labels[part]], user_id=str(k))

    data = FederatedDataset(client, MinimizeReuseUserSampler(list(range(workload.num_clients))))
    network = Network(workload.model())
    model = PyTorchModel(network, torch.optim.SGD, torch.optim.SGD(network.parameters(), lr=1.0))
    run = Run()
    assert get_framework_module().distributed.world_size == processes
    FederatedAveraging().run(
        NNAlgorithmParams(rounds, rounds + 1, workload.cohort, None),
        SimulatedBackend(data, data),
        model,
        NNTrainHyperParams(workload.batch_size, 1, workload.lr),
        callbacks=[Laps(run, network)],
        send_metrics_to_platform=False,
    )
    return run if get_framework_module().distributed.global_rank == 0 else None


if __name__ == "__main__":
    run_program(pfl)
