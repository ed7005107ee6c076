"""``python -m benchmarks processes``: seconds of a round in two processes over those in one.

Wall seconds need a machine with two cores to spare. CPU seconds do not: for fl_lightning they are those of the process
with the most to do, which is how long a round takes when each process has a core, but for waiting on messages. Those of
a peer are of its first process (pfl) or of everything that it runs (BlazeFL's threads, Flower's actors).

Each run is a program of its own, as a user starts it; ours is ``devices=2, strategy="ddp"``. Peers that can work in two
processes or threads are measured beside it with ``--peers``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks.contenders import Contender, Run
from benchmarks.peers.launch import last_run, peers
from benchmarks.program import sizes_of
from benchmarks.table import check
from benchmarks.workloads import WORKLOADS, Workload

__all__ = ["compare", "main", "ours_in"]


def ours_in(processes: int, loop: str = "auto") -> Contender:
    """Return fl_lightning in so many processes as a contender."""
    return partial(_ours, processes=processes, loop=loop)


def _ours(workload: Workload, rounds: int, processes: int, loop: str) -> Run:
    command = [sys.executable, "-m", "benchmarks.ours", *sizes_of(workload, rounds, processes), "--loop", loop]
    return last_run(command, f"fl_lightning in {processes} processes")


def compare(
    workload: Workload, contenders: Mapping[str, Contender], turns: int, rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Return each contender's wall and CPU seconds a round (medians of a run), turn by turn; the first round warms up.

    Raises:
        AssertionError: when a contender did other steps than the rest, or did not learn.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(turns):
        for name in names if turn % 2 == 0 else reversed(names):
            run = contenders[name](workload, rounds + 1)
            check(workload, name, run)
            found[name].append((median(run.wall[1:]), median(run.cpu[1:])))
    return found


def _print(workload: Workload, found: Mapping[str, list[tuple[float, float]]], base: str) -> None:
    print(f"\n{workload.name} {workload.title}; times as fast as {base} (quartiles)\n")
    print("| contender | wall s/round | times as fast | CPU s/round | times as fast |\n|---|---|---|---|---|")
    for name, seconds in found.items():
        cells = []
        for clock in (0, 1):
            ratios = sorted(one[clock] / own[clock] for one, own in zip(found[base], seconds, strict=True))
            quarter = (len(ratios) - 1) // 4
            spread = f"{median(ratios):.2f} ({ratios[quarter]:.2f}-{ratios[-1 - quarter]:.2f})"
            cells += [f"{median(turn[clock] for turn in seconds):.4g}", spread]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks processes", description=__doc__)
    parser.add_argument("--workloads", nargs="+", choices=sorted(WORKLOADS), default=["W1", "W2", "W3", "W4"])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds of a run; one more warms up")
    parser.add_argument("--loop", default="auto", help="local loop of fl_lightning, as in the table")
    parser.add_argument("--peers", type=Path, help="folder with one virtual environment a peer")
    parsed = parser.parse_args(arguments)
    one = "fl_lightning in one process"
    contenders = {one: ours_in(1, parsed.loop), "fl_lightning in two": ours_in(2, parsed.loop)}
    if parsed.peers is not None:
        contenders.update({f"{name} in two": contender for name, contender in peers(parsed.peers, 2)[0].items()})
    for name in parsed.workloads:
        _print(WORKLOADS[name], compare(WORKLOADS[name], contenders, parsed.turns, parsed.rounds), one)
