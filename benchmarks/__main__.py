"""``python -m benchmarks``: the table of docs/performance.md; ``--help`` lists what else is measured.

``python -m benchmarks processes`` compares two processes with one, ``kernels`` profiles a round, ``compression``
measures encoding and decoding, ``python -m benchmarks.scale`` what must not grow, and ``python -m benchmarks.papers``
reproduces papers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import compression, kernels, processes
from benchmarks.by_hand import by_hand
from benchmarks.contenders import Contender
from benchmarks.leanest import leanest
from benchmarks.ours import LOOPS, ours
from benchmarks.peers.launch import peers
from benchmarks.scale import __main__ as scale
from benchmarks.table import BASELINE, compare, print_table
from benchmarks.workloads import WORKLOADS


def main() -> None:
    arguments = _parsed()
    torch.set_num_threads(arguments.threads)
    contenders: dict[str, Contender] = {BASELINE: by_hand, "leanest loop by hand": leanest}
    contenders.update({f"fl_lightning {name}": ours(**LOOPS[name]) for name in arguments.loops})
    found, missing = peers(arguments.peers)
    contenders.update(found)
    for line in missing:
        print(line)
    for name in arguments.workloads:
        own = dict(contenders)
        if not any(parameter.ndim == 4 for parameter in WORKLOADS[name].model().parameters()):
            own.pop("fl_lightning channels_last", None)  # a layout of convolutions
        print_table(WORKLOADS[name], compare(WORKLOADS[name], own, arguments.turns, arguments.rounds))
    if arguments.beside:
        print("\nBeside the rounds, each in a process of its own:\n", flush=True)
        scale.main(list(_BESIDE))


_BESIDE = ("workers", "population", "resume", "rounds", "evaluation")


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workloads", nargs="+", choices=sorted(WORKLOADS), default=["W1", "W2", "W3", "W4"])
    parser.add_argument("--loops", nargs="*", choices=sorted(LOOPS), default=list(LOOPS))
    parser.add_argument("--turns", type=int, default=5, help="alternating runs of every contender")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds of a run; one more warms up")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--peers", type=Path, help="folder with one virtual environment a peer")
    parser.add_argument(
        "--no-beside", dest="beside", action="store_false",
        help="leave out loaders with workers, the time to the first round and to a resume, the size of checkpoints "
        "against rounds, and the evaluation of 1000 clients",
    )  # fmt: skip
    return parser.parse_args()


if __name__ == "__main__":
    if sys.argv[1:2] == ["compression"]:
        compression.main(sys.argv[2:])
    elif sys.argv[1:2] == ["kernels"]:
        kernels.main(sys.argv[2:])
    elif sys.argv[1:2] == ["processes"]:
        processes.main(sys.argv[2:])
    else:
        main()
