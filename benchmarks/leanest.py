"""The leanest loop that can be written by hand in torch for one client at a time: what is left is torch itself.

No DataLoader, no optimizer object, no ``.grad``: batches are indexed from tensors, gradients come from
``autograd.grad``, one ``torch._foreach_add_`` moves all parameters, and loss and accuracy of a client computed once,
behind its last step. It knows plain SGD and nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.contenders import Run, Stopwatch
from benchmarks.workloads import Workload

__all__ = ["leanest"]


def leanest(workload: Workload, rounds: int) -> Run:
    """Train with the leanest loop."""
    inputs, labels = workload.data()
    model, size = workload.model(), workload.examples
    params = list(model.parameters())
    weights = [p.detach().clone() for p in params]
    run = Run()
    clock = Stopwatch()
    for round in range(rounds):
        total = [torch.zeros_like(w) for w in weights]
        cohort = workload.cohort_of(round)
        num_steps = 0
        loss_sum = correct_sum = 0.0
        for client in cohort:
            with torch.no_grad():
                torch._foreach_copy_(params, weights)
            order = torch.randperm(size).add_(client * size)
            losses, outputs = train(model, params, inputs, labels, torch.split(order, workload.batch_size), workload.lr)
            with torch.no_grad():
                torch._foreach_add_(total, torch._foreach_sub(params, weights))
            num_steps += len(losses)
            loss_sum += sum(loss.item() * len(output) for loss, output in zip(losses, outputs, strict=True))
            correct_sum += (torch.cat(outputs).argmax(1) == labels[order]).float().mean().item() * size
        torch._foreach_add_(weights, total, alpha=1.0 / len(cohort))
        clock.lap(run)
        run.steps.append(num_steps)
        run.losses.append(loss_sum / len(cohort) / size)
        run.accuracies.append(correct_sum / len(cohort) / size)
    return run


def train(
    model: nn.Module, params: list[nn.Parameter], inputs: Tensor, labels: Tensor, chunks: tuple[Tensor, ...], lr: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Train one client and return the losses and outputs of its steps."""
    losses, outputs = [], []
    for chunk in chunks:
        y = labels.index_select(0, chunk)
        output = model(inputs.index_select(0, chunk))
        loss = cross_entropy(output, y)
        grads = torch.autograd.grad(loss, params)
        with torch.no_grad():
            torch._foreach_add_(params, grads, alpha=-lr)
        losses.append(loss.detach())
        outputs.append(output.detach())
    return losses, outputs
