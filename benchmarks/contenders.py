"""What a contender does and what is read off it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Contender", "Run", "Stopwatch", "cpu_of_processes"]

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
    """Wall and CPU seconds from one call to the next; CPU seconds are of all threads of the process.

    Args:
        cpu: reads the CPU seconds so far; ``cpu_of_processes`` where a library works in several processes.
    """

    def __init__(self, cpu: Callable[[], float] = time.process_time) -> None:
        self._cpu_seconds = cpu
        self._wall, self._cpu = time.perf_counter(), cpu()

    def lap(self, run: Run) -> None:
        wall, cpu = time.perf_counter(), self._cpu_seconds()
        run.wall.append(wall - self._wall)
        run.cpu.append(cpu - self._cpu)
        self._wall, self._cpu = time.perf_counter(), self._cpu_seconds()


def cpu_of_processes(root: int | None = None) -> float:
    """Return the CPU seconds that a process (``None`` is this one) and all its descendants have used.

    Linux only, in clock ticks of 10 ms. A process that ended counts as soon as its parent has waited for it.
    """
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # the name in parentheses may hold spaces; behind it stand state, parent, ... of proc(5)
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it ended between the listing and the reading
            continue
        parents[int(entry.name)] = int(fields[1])
        ticks[int(entry.name)] = sum(int(value) for value in fields[11:15])
    own = {os.getpid() if root is None else root}
    while more := {child for child, parent in parents.items() if parent in own} - own:
        own |= more
    return sum(ticks.get(process, 0) for process in own) / os.sysconf("SC_CLK_TCK")
