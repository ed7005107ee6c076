"""The programs by name, and how they run: each in a process of its own, sizes taking turns."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from benchmarks.scale.costs import client, evaluation, outer, workers
from benchmarks.scale.growth import large, population, resume, rounds

__all__ = ["PROGRAMS", "measure", "turns_of"]

PROGRAMS: dict[str, tuple[Callable[[int], dict[str, float]], tuple[int, ...]]] = {
    "population": (population, (1_000, 1_000_000)),
    "rounds": (rounds, (50, 500)),
    "large": (large, (0, 8, 1000)),
    "resume": (resume, (5, 50)),
    "evaluation": (evaluation, (1000,)),
    "workers": (workers, (0, 2)),
    "round": (outer, (100,)),
    "client": (client, (20,)),
}
"""A measurement, and the sizes at which it is made."""


def _answer(name: str, size: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    pipe.send(PROGRAMS[name][0](size))


def measure(name: str, size: int) -> dict[str, float]:
    """Run a program in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(name, size, theirs))
    process.start()
    theirs.close()
    values: dict[str, float] = ours.recv()
    process.join()
    return values


def turns_of(name: str, sizes: Sequence[int], turns: int) -> dict[int, dict[str, float]]:
    """Return the medians of each size over alternating turns."""
    found: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    for turn in range(turns):
        for size in sizes if turn % 2 == 0 else reversed(sizes):
            found[size].append(measure(name, size))
    return {size: {key: median(run[key] for run in runs) for key in runs[0]} for size, runs in found.items()}
