"""Every program of ``python -m benchmarks.scale`` runs, on tiny sizes, and says what it promises."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial

import pytest

from benchmarks.scale import __main__ as command
from benchmarks.scale import programs
from benchmarks.scale.costs import client, evaluation, outer, workers
from benchmarks.scale.growth import large, population, resume, rounds

TINY: dict[str, tuple[Callable[[int], dict[str, float]], int]] = {
    "population": (population, 50),
    "rounds": (rounds, 6),
    "large": (partial(large, width=20), 3),
    "resume": (resume, 2),
    "evaluation": (evaluation, 20),
    "workers": (partial(workers, num_clients=2), 0),
    "round": (outer, 8),
    "client": (partial(client, turns=1, rounds=2, few=1, many=3), 2),
}


def test_every_program_has_a_tiny_run() -> None:
    assert TINY.keys() == programs.PROGRAMS.keys()


@pytest.mark.parametrize("name", TINY)
def test_a_program_measures(name: str) -> None:
    function, size = TINY[name]
    found = function(size)
    assert next(iter(found.values())) == size
    # a cost over another one may come out below zero on a busy machine; a time, a size and a count cannot
    costs = ("_us_a_client", "_us_a_step", "cpu_ms_a_client")
    assert all(value > 0 for key, value in list(found.items())[1:] if not key.endswith(costs))


def test_a_plain_training_is_measured_beside_the_large_rounds() -> None:
    assert large(0, width=20)["model_mib"] == pytest.approx((61 * 20 + 21 * 20 + 21 * 10) * 4 / 2**20)


def test_sizes_take_turns_and_medians_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def measured(name: str, size: int) -> dict[str, float]:
        asked.append(size)
        return {"size": size, "ms": float(len(asked))}

    monkeypatch.setattr(programs, "measure", measured)
    assert programs.turns_of("round", (1, 2), 3) == {1: {"size": 1, "ms": 4.0}, 2: {"size": 2, "ms": 3.0}}
    assert asked == [1, 2, 2, 1, 1, 2]


def test_the_command_prints_lines_and_the_ratio(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(programs, "measure", lambda name, size: {"size": size, "ms": 2.0 * size})
    monkeypatch.setattr(sys, "argv", ["scale", "population", "--sizes", "10", "40"])
    command.main()
    lines = [line.removeprefix("population: ") for line in capsys.readouterr().out.splitlines()]
    assert json.loads(lines[0]) == {"size": 10, "ms": 20.0}
    assert json.loads(lines[2].removeprefix("ratios of 40 to 10 ")) == {"size": 4.0, "ms": 4.0}
    monkeypatch.setattr(sys, "argv", ["scale", "nonsense"])
    with pytest.raises(SystemExit):
        command.main()
    assert "no program 'nonsense': choose from population" in capsys.readouterr().err


@pytest.mark.slow
def test_a_measurement_runs_in_a_process_of_its_own() -> None:
    assert programs.measure("resume", 2)["rounds"] == 2
