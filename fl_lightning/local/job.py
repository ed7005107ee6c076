"""A client's work and its outcome, as the loops see them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from fl_lightning.local.recorder import Record
from fl_lightning.types import ClientTask, ClientUpdate, Memory

__all__ = ["ClientData", "Job", "Loop", "Outcome"]


@dataclass(slots=True)
class ClientData:
    """What one client brings: its loaders, or a data module of its own.

    Args:
        train: anything Lightning accepts as a train loader, or ``None`` when ``datamodule`` is given.
        val: a loader for local validation, or ``None``.
        datamodule: a ``LightningDataModule`` of this client.
        num_examples: size of the training data; ``None`` counts the examples of the first epoch.
    """

    train: Any = None
    val: Any = None
    datamodule: Any = None
    num_examples: int | None = None

    @property
    def validates(self) -> bool:
        return self.val is not None or self.datamodule is not None

    def as_arguments(self) -> dict[str, Any]:
        """Return the arguments of ``Trainer.fit``."""
        if self.datamodule is not None:
            return {"datamodule": self.datamodule}
        return {"train_dataloaders": self.train, "val_dataloaders": self.val}


@dataclass(slots=True)
class Job:
    """One task, with what opens its client's data and memory when the loop gets to it."""

    task: ClientTask
    data: Callable[[], ClientData]
    memory: Callable[[], Memory]
    logged: bool = False


@dataclass(slots=True)
class Outcome:
    """What became of a job: an update and the records of its curve, or the error it ended with."""

    job: Job
    update: ClientUpdate | None = None
    records: list[Record] = field(default_factory=list)
    error: Exception | None = None


class Loop(Protocol):
    """How local training is executed."""

    def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        """Yield the outcome of each job, in their order."""
