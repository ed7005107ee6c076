"""A million clients cost what a thousand cost, when the same number takes part."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from scale_federation import Clients, EvaluatedClients, fit, num_calls

from fl_lightning.schedules import PoissonSampler, RoundRobinSampler, UniformSampler

COHORT, ROUNDS = 8, 3


def arguments(folder: Path) -> dict[str, Any]:
    """Client memory on disk, curves of five clients, an evaluation on a few: everything that could be by client."""
    return {
        "max_rounds": ROUNDS,
        "clients_per_round": COHORT,
        "client_state": "keep",
        "log_clients": 5,
        "evaluate_clients": 4,
        "default_root_dir": folder,
        "logger": True,
        "enable_checkpointing": True,
    }


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Import and cache what the first fit of a process does once."""
    fit(EvaluatedClients(range(20)), **arguments(tmp_path_factory.mktemp("warm")))


def test_the_interpreter_works_no_more(tmp_path: Path) -> None:
    few = num_calls(lambda: fit(EvaluatedClients(range(10**3)), **arguments(tmp_path / "few")))
    many = num_calls(lambda: fit(EvaluatedClients(range(10**6)), **arguments(tmp_path / "many")))
    assert many < 1.05 * few, (few, many)


def test_memory_is_no_more(tmp_path: Path) -> None:
    def peak(population: int) -> int:
        tracemalloc.start()
        try:
            fit(EvaluatedClients(range(population)), **arguments(tmp_path / str(population)))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak(10**3), peak(10**6)
    # a set or a list of the ids would be thirty megabytes or more
    assert many < 1.1 * few, (few, many)


def test_only_the_cohort_is_asked(tmp_path: Path) -> None:
    clients = EvaluatedClients(range(10**6))
    fit(clients, **arguments(tmp_path))
    assert clients.calls["loader"] == ROUNDS * COHORT
    assert clients.calls["val"] == ROUNDS * 4
    assert clients.calls["size"] <= 2 * ROUNDS * COHORT


def test_files_are_of_participants_and_bounded_curves(tmp_path: Path) -> None:
    trainer = fit(EvaluatedClients(range(10**6)), **arguments(tmp_path))
    participants = {client_id for report in trainer.round_history for client_id in report.cohort}
    assert trainer.log_dir is not None
    folder = Path(trainer.log_dir)
    assert len(list(folder.rglob("*.memory"))) == len(participants)
    assert len(list(folder.glob("clients/*"))) <= 5


@pytest.mark.parametrize(
    "sampler",
    [UniformSampler(), PoissonSampler(8e-6), RoundRobinSampler(shuffle=False)],
    ids=lambda s: type(s).__name__,
)
def test_samplers_that_do_not_look_at_everyone(sampler: Any) -> None:
    """RoundRobinSampler(shuffle=True), SizeSampler and PowerOfChoiceSampler(by_size=True) have to."""

    def draw(population: int) -> int:
        clients = Clients(range(population))
        return num_calls(lambda: sampler.cohort(clients, COHORT, seed=0, round=1))

    small = draw(10**4)
    assert draw(10**6) <= small + 100
