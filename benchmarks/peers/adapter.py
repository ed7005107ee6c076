"""The command line of every adapter: a workload and a number of rounds in, one line of JSON out."""

from __future__ import annotations

import argparse
import json
import sys

import torch

from benchmarks.contenders import Contender
from benchmarks.workloads import WORKLOADS

__all__ = ["main"]


def main(contender: Contender) -> None:
    """Run a contender as a program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=sorted(WORKLOADS))
    parser.add_argument("rounds", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run = contender(WORKLOADS[arguments.workload], arguments.rounds)
    sys.stdout.write("\n" + json.dumps(run.as_dict()) + "\n")
