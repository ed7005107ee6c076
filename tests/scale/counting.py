"""A program that prints how many functions are called for a step, a client and a round, as JSON.

It runs in a process of its own: what other tests import, patch or log belongs to no count.
"""

from __future__ import annotations

import json
import logging
import warnings
from typing import Any

from scale_federation import Clients, Linear, fit, num_calls

LOOPS = ("lean", "lightning")


def of_a_fit(
    loop: str, num_clients: int, batches: int, logs: bool = True, max_rounds: int = 1, group_size: Any = 1
) -> int:
    arguments: dict[str, Any] = {"local_loop": loop, "group_size": group_size, "max_rounds": max_rounds}
    return num_calls(lambda: fit(Clients(range(num_clients), batches), Linear(logs=logs), **arguments))


def of_a_step_and_a_client(loop: str, logs: bool) -> tuple[float, float]:
    base = of_a_fit(loop, 8, 4, logs)
    step = (of_a_fit(loop, 8, 12, logs) - base) / (8 * 8)
    return step, (of_a_fit(loop, 16, 4, logs) - base) / 8 - 4 * step


def of_groups() -> tuple[float, float]:
    """Return the calls for a step of a group, whatever its size, and for one client more in it."""
    pairs = of_a_fit("lean", 16, 4, group_size=16)  # two clients in each of eight lanes
    step = (of_a_fit("lean", 16, 12, group_size=16) - pairs) / (8 * 8)
    return step, (of_a_fit("lean", 48, 4, group_size=16) - pairs) / 32


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    for loop in LOOPS:  # what a process does once (imports, caches) belongs to no step
        fit(Clients(range(2)), local_loop=loop, group_size=1)
    counts = {f"{loop} {logs}": of_a_step_and_a_client(loop, logs) for loop in LOOPS for logs in (False, True)}
    fit(Clients(range(16)), group_size=16)
    counts["groups True"] = of_groups()
    rounds = [of_a_fit("lean", 1, 1, max_rounds=n) for n in (2, 12, 22)]
    print(json.dumps({"counts": counts, "rounds": rounds}))


if __name__ == "__main__":
    main()
