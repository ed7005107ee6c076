"""A contender as a program of its own: a workload and a number of rounds in, one line of JSON out."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from benchmarks.contenders import Run
from benchmarks.workloads import WORKLOADS, Workload

__all__ = ["run_program", "sizes_of"]


def run_program(contender: Callable[[Workload, int, int], Run | None], arguments: Sequence[str] | None = None) -> None:
    """Run ``contender(workload, rounds, processes)`` with the arguments of the command line and print its run.

    Args:
        contender: returns its run, or ``None`` on a rank that has nothing to say.
        arguments: of the command line; ``None`` are this program's own.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=sorted(WORKLOADS))
    parser.add_argument("rounds", type=int)
    parser.add_argument("--processes", type=int, default=1, help="processes, or threads where a library has those")
    parser.add_argument("--clients", type=int, help="clients, if not as many as the workload has")
    parser.add_argument("--cohort", type=int, help="clients a round, likewise")
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sizes = {"num_clients": parsed.clients, "cohort": parsed.cohort}
    workload = replace(WORKLOADS[parsed.workload], **{name: size for name, size in sizes.items() if size is not None})
    run = contender(workload, parsed.rounds, parsed.processes)
    if run is not None:
        sys.stdout.write("\n" + json.dumps(run.as_dict()) + "\n")


def sizes_of(workload: Workload, rounds: int, processes: int) -> list[str]:
    """Return the command line that gives a program this workload."""
    sizes = ["--clients", str(workload.num_clients), "--cohort", str(workload.cohort)]
    return [workload.name, str(rounds), "--processes", str(processes), *sizes]
