"""A guard for speed that no busy machine can fool: how many functions are called for a step, a client and a round.

The bounds are a tenth above what was counted when they were written. If a change goes over one, look at what it added
to every step; if that is worth it, write the new number here.
"""

from __future__ import annotations

from typing import Any

import pytest
from scale_federation import Clients, Linear, fit, num_calls

# calls by (loop, whether the module logs): for a step, for a client
BOUNDS = {
    ("lean", False): (140, 1500),
    ("lean", True): (150, 1600),
    ("lightning", False): (2050, 5000),
    ("lightning", True): (2320, 5500),
}
ROUND = 9000


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """What a process does once (imports, caches) belongs to no step."""
    for loop in ("lean", "lightning"):
        fit(Clients(range(2)), local_loop=loop, group_size=1)


@pytest.mark.parametrize(("loop", "logs"), BOUNDS)
def test_calls_for_a_step_and_for_a_client(loop: str, logs: bool) -> None:
    def count(num_clients: int, batches: int) -> int:
        arguments: dict[str, Any] = {"local_loop": loop, "group_size": 1}
        return num_calls(lambda: fit(Clients(range(num_clients), batches), Linear(logs=logs), **arguments))

    base = count(8, 4)
    step = (count(8, 12) - base) / (8 * 8)
    client = (count(16, 4) - base) / 8 - 4 * step
    most_for_a_step, most_for_a_client = BOUNDS[loop, logs]
    assert 0 < step <= most_for_a_step
    assert 0 < client <= most_for_a_client


def test_calls_for_a_round() -> None:
    def count(rounds: int) -> int:
        arguments: dict[str, Any] = {"local_loop": "lean", "group_size": 1, "max_rounds": rounds}
        return num_calls(lambda: fit(Clients(range(1), 1), **arguments))

    fixed = (count(12) - count(2)) / 10
    step, client = BOUNDS["lean", True]
    assert 0 < fixed - step - client <= ROUND


def test_calls_for_a_round_do_not_depend_on_its_number() -> None:
    counts: list[int] = []
    for rounds in (5, 10, 15):
        arguments: dict[str, Any] = {"local_loop": "lean", "group_size": 1, "max_rounds": rounds}
        counts.append(num_calls(lambda arguments=arguments: fit(Clients(range(2), 1), **arguments)))
    early, late = counts[1] - counts[0], counts[2] - counts[1]
    assert abs(late - early) <= 0.02 * early
