"""What a contender does and what is read off it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Contender", "Run", "Stopwatch"]

Contender = Callable[[Any, int], "Run"]
"""``contender(workload, rounds)`` trains from the first weights and reports every round."""


@dataclass
class Run:
    """A few rounds of one contender, entry by entry: seconds, optimizer steps and mean training loss and accuracy."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Stopwatch:
    """Wall and CPU seconds from one call to the next; CPU seconds are of all threads of the process."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def lap(self, run: Run) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        run.wall.append(wall - self._wall)
        run.cpu.append(cpu - self._cpu)
        self._wall, self._cpu = time.perf_counter(), time.process_time()
