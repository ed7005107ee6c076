"""Contenders side by side: alternating runs in one call, medians, and ratios to the ordinary loop of the same turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from benchmarks.contenders import Contender, Run
from benchmarks.workloads import Workload

__all__ = ["BASELINE", "Row", "check", "compare", "print_table"]

BASELINE = "DataLoader loop by hand"


@dataclass
class Row:
    """One contender on one workload: medians over turns, the ratio's quartiles beside it."""

    name: str
    seconds: float
    wall: float
    ratio: float
    low: float
    high: float
    steps: int
    first_loss: float
    last_loss: float
    last_accuracy: float


def compare(workload: Workload, contenders: Mapping[str, Contender], turns: int, rounds: int) -> list[Row]:
    """Let every contender train once a turn, one after the other, and compare it within the turn.

    A machine that is shared is faster at one time and slower at another, and the contenders of one turn see the same of
    it. The first round of a run warms up caches and is not counted.

    Raises:
        AssertionError: when a contender did other steps than the rest, or did not learn.
    """
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(turns):
        for name in names if turn % 2 == 0 else reversed(names):
            run = contenders[name](workload, rounds + 1)
            check(workload, name, run)
            runs[name].append(run)
    return [_row(name, some, runs[BASELINE]) for name, some in runs.items()]


def check(workload: Workload, name: str, run: Run) -> None:
    """Raise if a contender did other steps than the workload has, or did not learn."""
    assert set(run.steps) == {workload.steps}, f"{name} did {run.steps} steps on {workload.name}, not {workload.steps}"
    assert run.losses[-1] < run.losses[0], f"{name} did not learn {workload.name}: losses {run.losses}"


def _row(name: str, runs: list[Run], baseline: list[Run]) -> Row:
    ratios = sorted(_cpu(base) / _cpu(run) for base, run in zip(baseline, runs, strict=True))
    quarter = (len(ratios) - 1) // 4
    return Row(
        name,
        median(_cpu(run) for run in runs),
        median(median(run.wall[1:]) for run in runs),
        median(ratios),
        ratios[quarter],
        ratios[-1 - quarter],
        runs[0].steps[0],
        runs[0].losses[0],
        runs[0].losses[-1],
        runs[0].accuracies[-1],
    )


def _cpu(run: Run) -> float:
    return median(run.cpu[1:])


def print_table(workload: Workload, rows: list[Row]) -> None:
    """Print a Markdown table."""
    print(f"\n{workload.name} {workload.title}: {workload.cohort} of {workload.num_clients} clients a round, ", end="")
    print(f"{workload.examples} examples each, batch {workload.batch_size}, {workload.steps} steps a round\n")
    print("| contender | CPU s/round | wall s/round | times as fast (quartiles) | loss | accuracy |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        speed = f"{row.ratio:.2f} ({row.low:.2f}-{row.high:.2f})"
        loss = f"{row.first_loss:.3f} → {row.last_loss:.3f}"
        print(f"| {row.name} | {row.seconds:.4g} | {row.wall:.4g} | {speed} | {loss} | {row.last_accuracy:.3f} |")
