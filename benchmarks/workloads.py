"""The workloads: how many clients, how much data, which model. Only torch is needed here, so peers can read it too.

The data are synthetic, with the shapes of the originals and labels that can be learned from them, so that "it learned"
can be checked; what a step costs does not depend on what the numbers are.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.networks import CharTransformer, cnn, logistic, resnet18_groupnorm, two_nn

__all__ = ["WORKLOADS", "Workload"]


@dataclass(frozen=True)
class Workload:
    """One row of the table; every client has the same number of examples, so every cohort does the same steps."""

    name: str
    title: str
    num_clients: int
    examples: int
    cohort: int
    batch_size: int
    lr: float
    network: Callable[[], nn.Module]
    make: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]

    @property
    def steps(self) -> int:
        """Optimizer steps of one round: one local epoch of everyone in the cohort."""
        return self.cohort * -(-self.examples // self.batch_size)

    def data(self) -> tuple[Tensor, Tensor]:
        """Return all clients' examples, client after client: client k has [k * examples, (k + 1) * examples)."""
        return self.make(self.num_clients * self.examples, torch.Generator().manual_seed(0))

    def model(self) -> nn.Module:
        """Return the network with the same first weights for every contender."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.network()

    def cohort_of(self, round: int) -> list[int]:
        return random.Random(round).sample(range(self.num_clients), self.cohort)


def _classes(*shape: int, signal: float = 0.5) -> Callable[[int, torch.Generator], tuple[Tensor, Tensor]]:
    """Ten classes around ten random centres."""

    def make(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        centres = torch.randn(10, *shape, generator=generator)
        labels = torch.randint(10, (size,), generator=generator)
        examples = torch.randn(size, *shape, generator=generator)
        for begin in range(0, size, 10_000):  # a piece at a time: the sum of two large tensors would be a third
            examples[begin : begin + 10_000] += signal * centres[labels[begin : begin + 10_000]]
        return examples, labels

    return make


def _text(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences of characters in which nine of ten follow from the one before."""
    length, vocabulary = CharTransformer.length, CharTransformer.vocabulary
    follower = torch.randperm(vocabulary, generator=generator)
    text = torch.randint(vocabulary, (size, length + 1), generator=generator)
    for position in range(length):
        regular = torch.rand(size, generator=generator) < 0.9
        text[regular, position + 1] = follower[text[regular, position]]
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("W1", "2NN, 784-200-200-10", 1000, 60, 100, 10, 0.1, two_nn, _classes(784, signal=0.2)),
        Workload("W2", "CNN, 1,663,370 parameters", 100, 600, 10, 50, 0.05, cnn, _classes(1, 28, 28)),
        Workload("W3", "logistic 60-10, tiny and many", 10_000, 50, 1000, 10, 0.1, logistic, _classes(60)),
        Workload("W4", "transformer on characters", 100, 64, 10, 16, 0.5, CharTransformer, _text),
        Workload(
            "W5", "ResNet-18 with GroupNorm", 20, 40, 2, 20, 0.001, resnet18_groupnorm, _classes(3, 32, 32, signal=4.0)
        ),
    )
}
