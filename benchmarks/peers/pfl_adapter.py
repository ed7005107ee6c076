"""The workloads in pfl-research (``pfl[pytorch]==0.6.0``): its simulated backend and its federated averaging.

The user's ``loss`` counts losses and correct answers, one pair of numbers a client; pfl's own evaluation, which would
pass over the data twice more, is off.
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
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.contenders import Run, Stopwatch
from benchmarks.peers.adapter import main
from benchmarks.workloads import Workload


class Network(nn.Module):
    """What pfl calls a model: a network with ``loss`` and ``metrics``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.losses: list[float] = []
        self.correct: list[float] = []

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        outputs = self.network(inputs)
        loss = cross_entropy(outputs, labels)
        self.losses.append(loss.item())
        self.correct.append((outputs.argmax(1) == labels).float().mean().item())
        return loss

    def metrics(self, inputs: Tensor, labels: Tensor) -> dict[str, Any]:
        return {}


class Laps(TrainingProcessCallback):
    def __init__(self, run: Run, network: Network) -> None:
        self.run, self.network, self.clock = run, network, Stopwatch()

    def after_central_iteration(self, *_: Any, **__: Any) -> tuple[bool, Metrics]:
        self.clock.lap(self.run)
        losses, correct = self.network.losses, self.network.correct
        self.run.steps.append(len(losses))
        self.run.losses.append(sum(losses) / len(losses))
        self.run.accuracies.append(sum(correct) / len(correct))
        losses.clear()
        correct.clear()
        return False, Metrics()


def pfl(workload: Workload, rounds: int) -> Run:
    inputs, labels = workload.data()
    size = workload.examples

    def client(k: int) -> Dataset:
        part = slice(k * size, (k + 1) * size)
        return Dataset([inputs[part], labels[part]], user_id=str(k))

    data = FederatedDataset(client, MinimizeReuseUserSampler(list(range(workload.num_clients))))
    network = Network(workload.model())
    model = PyTorchModel(network, torch.optim.SGD, torch.optim.SGD(network.parameters(), lr=1.0))
    run = Run()
    FederatedAveraging().run(
        NNAlgorithmParams(rounds, rounds + 1, workload.cohort, None),
        SimulatedBackend(data, data),
        model,
        NNTrainHyperParams(workload.batch_size, 1, workload.lr),
        callbacks=[Laps(run, network)],
        send_metrics_to_platform=False,
    )
    return run


if __name__ == "__main__":
    main(pfl)
