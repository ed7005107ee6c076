"""One command for each paper: prints ours next to published, writes curves, and fails when a gate is missed."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from benchmarks.papers import compression, fedbuff, heart, mnist, quadratics, synthetic, synthetic_by_hand
from benchmarks.papers.rows import Row, finished, print_table, write_rows
from benchmarks.papers.training import silence

EXPERIMENTS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "quadratics": quadratics.run,
    "synthetic": synthetic.run,
    "synthetic-by-hand": synthetic_by_hand.run,
    "fedbuff": fedbuff.run,
    "heart": heart.run,
    "mnist": mnist.run,
    "compression": compression.run,
}


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    silence()
    rows = EXPERIMENTS[options.experiment](options)
    print_table(options.experiment, rows)
    write_rows(options.output / options.experiment / f"{options.name or 'rows'}.json", rows)
    print(f"Table and curves: {options.output / options.experiment}, tensorboard --logdir {options.output}")
    return 0 if finished(rows) else 1


def parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--output", type=Path, default=Path("logs/papers"), help="folder of curves and tables")
    common.add_argument("--name", help="name of the table's file, to keep several")
    common.add_argument("--local_loop", choices=("auto", "lightning", "lean"), default="auto")
    found = argparse.ArgumentParser(prog="python -m benchmarks.papers", description=__doc__)
    commands = found.add_subparsers(dest="experiment", required=True)
    commands.add_parser("quadratics", parents=[common], help="closed forms, to 1e-8")
    synthetic.add_arguments(commands.add_parser("synthetic", parents=[common], help="FedProx with stragglers"))
    synthetic.add_arguments(
        commands.add_parser("synthetic-by-hand", parents=[common], help="the same in NumPy, without this library")
    )
    heart.add_arguments(commands.add_parser("heart", parents=[common], help="FLamby's Fed-Heart-Disease"))
    mnist.add_arguments(commands.add_parser("mnist", parents=[common], help="FedAvg's rounds to an accuracy"))
    fedbuff.add_arguments(commands.add_parser("fedbuff", parents=[common], help="FedBuff's time to an accuracy"))
    compression.add_arguments(
        commands.add_parser("compression", parents=[common], help="upload bytes to an accuracy, with and without")
    )
    return found


if __name__ == "__main__":
    raise SystemExit(main())
