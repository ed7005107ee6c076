"""A guard for speed that no busy machine can fool: how many functions are called for a step, a client and a round.

The bounds are a tenth above what was counted when they were written. If a change goes over one, look at what it added
to every step; if that is worth it, write the new number here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# calls by loop and whether the module logs: for a step, for a client
BOUNDS = {
    "lean False": (118, 1210),
    "lean True": (128, 1230),
    "lightning False": (1755, 4870),
    "lightning True": (2030, 5415),
    "groups True": (933, 367),  # a step of a whole group, and one client more in it
}
ROUND = 3225


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    program = Path(__file__).with_name("counting.py")
    run = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    counts: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return counts


@pytest.mark.parametrize("which", BOUNDS)
def test_calls_for_a_step_and_for_a_client(counted: dict[str, Any], which: str) -> None:
    step, client = counted["counts"][which]
    most_for_a_step, most_for_a_client = BOUNDS[which]
    assert 0 < step <= most_for_a_step
    assert 0 < client <= most_for_a_client


def test_calls_for_a_round_do_not_depend_on_its_number(counted: dict[str, Any]) -> None:
    first, middle, last = counted["rounds"]
    early, late = middle - first, last - middle
    step, client = counted["counts"]["lean True"]
    assert 0 < early / 10 - step - client <= ROUND
    assert abs(late - early) <= 0.02 * early
