"""Federated averaging as most people write it: a DataLoader for each client, ``torch.optim``, a dictionary of sums."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.contenders import Run, Stopwatch
from benchmarks.workloads import Workload

__all__ = ["by_hand"]


def by_hand(workload: Workload, rounds: int) -> Run:
    """Train with the ordinary loop."""
    inputs, labels = workload.data()
    model, size = workload.model(), workload.examples
    weights = {name: p.detach().clone() for name, p in model.state_dict().items()}
    run = Run()
    clock = Stopwatch()
    for round in range(rounds):
        total = {name: torch.zeros_like(p) for name, p in weights.items()}
        examples = num_steps = 0
        loss_sum = correct_sum = 0.0
        for client in workload.cohort_of(round):
            part = slice(client * size, (client + 1) * size)
            loader = DataLoader(TensorDataset(inputs[part], labels[part]), workload.batch_size, shuffle=True)
            model.load_state_dict(weights)
            optimizer = torch.optim.SGD(model.parameters(), workload.lr)
            loss, correct, steps = train(model, optimizer, loader)
            for name, value in model.state_dict().items():
                total[name] += size * (value - weights[name])
            examples, num_steps = examples + size, num_steps + steps
            loss_sum, correct_sum = loss_sum + loss * size, correct_sum + correct
        weights = {name: p + total[name] / examples for name, p in weights.items()}
        clock.lap(run)
        run.steps.append(num_steps)
        run.losses.append(loss_sum / examples)
        run.accuracies.append(correct_sum / examples)
    return run


def train(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[tuple[torch.Tensor, ...]]
) -> tuple[float, float, int]:
    """Return the client's mean loss, its correct answers and its steps."""
    losses = correct = 0.0
    examples = steps = 0
    for inputs, labels in loader:
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = cross_entropy(outputs, labels)
        loss.backward()
        optimizer.step()
        losses += loss.item() * len(inputs)
        correct += (outputs.argmax(1) == labels).float().mean().item() * len(inputs)
        examples, steps = examples + len(inputs), steps + 1
    return losses / examples, correct, steps
