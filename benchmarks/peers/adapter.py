"""What adapters share: a loss that counts, for libraries whose own loop logs nothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.contenders import Run

__all__ = ["CountingLoss"]


class CountingLoss(nn.Module):
    """Cross-entropy that notes loss and accuracy of each batch: what a user who logs both would write.

    Libraries whose own loop logs neither take it as their criterion, so that their loop runs unchanged.
    """

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.accuracies: list[float] = []

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        loss = cross_entropy(outputs, labels)
        self.losses.append(loss.item())
        self.accuracies.append((outputs.argmax(1) == labels).float().mean().item())
        return loss

    def __deepcopy__(self, memo: dict[int, Any]) -> CountingLoss:
        return self  # fluke gives each client a copy; all of them count here

    def sums(self) -> tuple[int, float, float]:
        """Return the steps since the last call and their sums of losses and of accuracies."""
        found = len(self.losses), sum(self.losses), sum(self.accuracies)
        self.losses.clear()
        self.accuracies.clear()
        return found

    def report(self, run: Run) -> None:
        """Add a round to a run: all batches of a workload are equally long, so means over steps will do."""
        steps, losses, accuracies = self.sums()
        run.steps.append(steps)
        run.losses.append(losses / steps)
        run.accuracies.append(accuracies / steps)
