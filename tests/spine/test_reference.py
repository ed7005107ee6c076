"""FedAvg and FedOpt against a plain-torch federation that shares no code with the package."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from spine_zoo import Classifier, assert_close, fit_federated, sites, val_loader, weights
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from fl_lightning.algorithms import FedAvg

Optimizer = Callable[[Any], torch.optim.Optimizer]


def reference(
    start: nn.Module,
    clients: dict[str, DataLoader[Any]],
    rounds: int,
    epochs: int,
    local: Optimizer,
    weight: Callable[[int], float],
    server: Optimizer = lambda params: torch.optim.SGD(params, lr=1.0),
) -> nn.Module:
    """McMahan's algorithm 1 with Reddi's server step, in double loops of plain torch."""
    net = copy.deepcopy(start)
    server_optimizer = server(net.parameters())
    for _ in range(rounds):
        total = [torch.zeros_like(p, dtype=torch.float64) for p in net.parameters()]
        sum_of_weights = 0.0
        for loader in clients.values():
            client = copy.deepcopy(net)
            optimizer = local(client.parameters())
            for _ in range(epochs):
                for x, y in loader:
                    optimizer.zero_grad()
                    F.cross_entropy(client(x), y).backward()
                    optimizer.step()
            share = weight(len(loader.dataset))  # type: ignore[arg-type]
            sum_of_weights += share
            for t, p, q in zip(total, client.parameters(), net.parameters(), strict=True):
                t += share * (p.detach().double() - q.detach().double())
        for p, t in zip(net.parameters(), total, strict=True):
            p.grad = (-t / sum_of_weights).to(p.dtype)
        server_optimizer.step()
    return net


class Local(Classifier):
    def __init__(self, name: str) -> None:
        super().__init__(hidden=5)
        self.name = name

    def configure_optimizers(self) -> Any:
        return LOCAL[self.name](self.parameters())


LOCAL: dict[str, Optimizer] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
}
WEIGHTS: dict[str, tuple[Any, Callable[[int], float]]] = {
    "examples": ("examples", float),
    "uniform": ("uniform", lambda n: 1.0),
    "callable": (lambda update: update.num_examples**0.5, lambda n: n**0.5),
}


@pytest.mark.parametrize("local_loop", ["lightning", "auto"])
@pytest.mark.parametrize("weighting", WEIGHTS)
@pytest.mark.parametrize("local", LOCAL)
def test_fedavg_is_the_papers_algorithm(local: str, weighting: str, local_loop: str) -> None:
    clients = sites(5, shuffle=False)
    module = Local(local)
    expected = reference(module.net, clients, 4, 2, LOCAL[local], WEIGHTS[weighting][1])
    start = weights(module.net)
    algorithm = FedAvg(weights=WEIGHTS[weighting][0])
    fit_federated(module, clients, max_rounds=4, local_epochs=2, algorithm=algorithm, local_loop=local_loop)

    assert_close(weights(module.net), weights(expected))
    moved = max(float((a - b).abs().max()) for a, b in zip(start.values(), weights(expected).values(), strict=True))
    assert moved > 0.05  # a test of nothing would pass at rest


def test_the_three_weightings_differ() -> None:
    ends = []
    for weighting, _ in WEIGHTS.values():
        torch.manual_seed(0)
        module = Local("sgd")
        fit_federated(module, sites(5, shuffle=False), max_rounds=3, algorithm=FedAvg(weights=weighting))
        ends.append(module.net[0].weight.detach().clone())
    assert (
        min(float((a - b).abs().max()) for a, b in [(ends[0], ends[1]), (ends[1], ends[2]), (ends[0], ends[2])]) > 1e-4
    )


@pytest.mark.parametrize(
    "server",
    [
        lambda p: torch.optim.Adam(p, lr=0.03, eps=1e-3),
        lambda p: torch.optim.SGD(p, lr=0.7, momentum=0.9),
        lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.01),
    ],
    ids=["adam", "momentum", "adagrad"],
)
def test_a_server_optimizer_is_torchs_on_the_pseudo_gradient(server: Optimizer) -> None:
    clients = sites(4, shuffle=False)
    module = Local("sgd")
    expected = reference(module.net, clients, 5, 1, LOCAL["sgd"], float, server)
    fit_federated(module, clients, max_rounds=5, algorithm=FedAvg(server_optimizer=server))
    assert_close(weights(module.net), weights(expected), atol=2e-6)


def test_the_server_schedule_steps_once_a_round() -> None:
    clients = sites(3, shuffle=False)

    def server(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=1.0)

    module = Local("sgd")
    net, expected = copy.deepcopy(module.net), module.net
    for round in range(4):  # a server rate of 2^-t is t fits of one round each
        rate = 0.5**round
        net = reference(net, clients, 1, 1, LOCAL["sgd"], float, lambda p, lr=rate: torch.optim.SGD(p, lr=lr))
    algorithm = FedAvg(server, server_lr_scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, gamma=0.5))
    fit_federated(module, clients, max_rounds=4, algorithm=algorithm)
    assert_close(weights(expected), weights(net))


def test_the_order_of_a_mapping_does_not_matter() -> None:
    ends: list[dict[str, Tensor]] = []
    for turned in (False, True):
        torch.manual_seed(0)
        module = Classifier()
        clients = sites(5)
        if turned:
            clients = dict(reversed(clients.items()))
        fit_federated(module, clients, val_loader(), max_rounds=2)
        ends.append(weights(module))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_seed_everything_decides_the_cohorts() -> None:
    cohorts = []
    for seed in (1, 1, 2):
        trainer = fit_federated(Classifier(), sites(5), seed=seed, max_rounds=4, clients_per_round=2)
        cohorts.append([report.cohort for report in trainer.round_history])
    assert cohorts[0] == cohorts[1] != cohorts[2]
    assert all(len(set(cohort)) == 2 for cohort in cohorts[0])


def test_clients_per_round_as_a_fraction_counts_clients() -> None:
    trainer = fit_federated(Classifier(), sites(5), max_rounds=2, clients_per_round=0.4)
    assert [len(report.cohort) for report in trainer.round_history] == [2, 2]
