"""What must not grow, and what rounds and clients cost beside their training.

Every measurement runs in a process of its own, so that a peak of memory belongs to it alone. With ``--turns`` the sizes
of a program take turns and medians are printed, with the ratio of the last size to the first.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from benchmarks.scale.programs import PROGRAMS, turns_of


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("programs", nargs="*", default=[name for name in PROGRAMS if name != "large"])
    parser.add_argument("--sizes", type=int, nargs="+", help="instead of the program's own")
    parser.add_argument("--turns", type=int, default=1, help="alternating runs of each size")
    parsed = parser.parse_args(arguments)
    for name in parsed.programs:
        if name not in PROGRAMS:
            parser.error(f"no program {name!r}: choose from {', '.join(PROGRAMS)}")
        sizes = tuple(parsed.sizes or PROGRAMS[name][1])
        found = turns_of(name, sizes, parsed.turns)
        for values in found.values():
            sys.stdout.write(f"{name}: {json.dumps({key: round(value, 4) for key, value in values.items()})}\n")
        if len(sizes) > 1:
            first, last = found[sizes[0]], found[sizes[-1]]
            ratios = {key: round(last[key] / first[key], 3) for key in first if first[key]}
            sys.stdout.write(f"{name}: ratios of {sizes[-1]} to {sizes[0]} {json.dumps(ratios)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
