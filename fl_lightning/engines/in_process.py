"""Clients in this process, or in this process group when Lightning's strategy has several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from fl_lightning.local.client import ClientHalf, ClientResult, Failure
from fl_lightning.metrics import MetricSums
from fl_lightning.types import ClientId, ClientTask, Contribution

__all__ = ["Engine", "InProcessEngine"]


class Engine:
    """Where clients run. A session is the conversation of one lane of one round."""

    def start(self, client_half: ClientHalf) -> None:
        """Take the client half of this federation."""
        self.client_half = client_half

    def session(self, tasks: Sequence[ClientTask]) -> Iterator[ClientResult]:
        """Run the tasks and yield a result for each, in their order."""
        raise NotImplementedError(f"{type(self).__name__} must define session(tasks).")

    def evaluate(self, tasks: Iterable[ClientTask]) -> Iterator[tuple[ClientId, MetricSums | Failure | None]]:
        """Evaluate the broadcast model on clients' own data."""
        return self.client_half.evaluate(tasks)

    def recalibrate(self, tasks: Iterable[ClientTask], names: Sequence[str]) -> Iterator[tuple[ClientId, Contribution]]:
        """Measure running statistics of the broadcast model on clients' training data."""
        return self.client_half.recalibrate(tasks, names)

    def start_losses(self, tasks: Iterable[ClientTask]) -> Iterator[tuple[ClientId, float | Failure]]:
        """Measure the loss of the broadcast model on clients' training data."""
        return self.client_half.start_losses(tasks)

    def close(self) -> None:
        """Release what the engine holds."""


class InProcessEngine(Engine):
    """Clients one after the other (or a vmapped group at a time) on this process's device."""

    def session(self, tasks: Sequence[ClientTask]) -> Iterator[ClientResult]:
        return self.client_half.run(tasks)
