"""The same bits from spawned processes and from two ranks, and an end when one of them fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import spine_ddp
import torch
from spine_ddp import Crashes, Raises
from spine_modules import Metrics
from spine_zoo import Classifier, ServedSites, assert_same_bits, fit_federated, sites, weights

from fl_lightning.algorithms import FedAvg
from fl_lightning.engines import SpawnedEngine
from fl_lightning.errors import ClientError

HERE = Path(__file__).parent


def comparable(trainer: Any) -> list[Any]:
    for report in trainer.round_history:
        report.seconds = 0.0
    return list(trainer.round_history)


@pytest.mark.slow
def test_a_process_for_each_client_gives_the_same_bits() -> None:
    ends = []
    start = weights(Metrics())
    for engine in (None, SpawnedEngine()):
        module = Metrics()
        module.load_state_dict(start)
        trainer = fit_federated(
            module, ServedSites(sites(3)), engine=engine, max_rounds=2, clients_per_round=2, client_state="keep",
            local_loop="lightning", num_threads=1,
        )  # fmt: skip
        ends.append((weights(module), comparable(trainer)))
    assert_same_bits(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


@pytest.mark.slow
def test_a_process_that_dies_is_a_failed_client() -> None:
    with pytest.warns(UserWarning, match="Client 's1' is skipped in round 0: its process ended with exit code 9"):
        trainer = fit_federated(
            Crashes(), sites(2), engine=SpawnedEngine(), on_bad_update="skip", local_loop="lightning"
        )
    assert trainer.round_history[0].cohort == ["s0"]


PROGRAM = """
import json, os, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {here!r})
import lightning.pytorch as pl
import spine_ddp
if __name__ == "__main__":
    spine_ddp.main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
"""


def launch(folder: Path, scenario: str, devices: int, timeout: float = 120.0) -> tuple[int, str]:
    """Run a scenario of ``spine_ddp`` as a user runs a script; Lightning launches the other ranks itself."""
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "script.py"
    script.write_text(PROGRAM.format(here=str(HERE)))
    environment = {
        key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR")
    }
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, str(script), scenario, str(devices), str(folder)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)
    return done.returncode, done.stdout + done.stderr


def results(folder: Path) -> tuple[dict[str, torch.Tensor], Any]:
    return torch.load(folder / "weights.pt", weights_only=True), json.loads((folder / "history.json").read_text())


def curves(folder: Path) -> dict[str, list[tuple[str, int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for client in sorted((folder / "logs").rglob("clients/*")):
        events = EventAccumulator(str(client))
        events.Reload()
        found[client.name] = [(tag, e.step, e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)]
    return found


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two-ranks")
    code, output = launch(folder, "metrics,uneven,skips", 2)
    assert code == 0, output
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["metrics", "uneven"])
def test_two_ranks_give_the_same_bits_as_one(scenario: str, two_ranks: Path, tmp_path: Path) -> None:
    spine_ddp.fit(scenario, 1, str(tmp_path))
    (one, history), (two, other) = results(tmp_path), results(two_ranks / scenario)
    assert_same_bits(one, two)
    assert history == other
    assert len(history) == 3
    assert [round["metrics"]["val_seen"] for round in history] == [60.0] * 3
    assert [round["metrics"]["val_count"] for round in history] == [60.0] * 3
    assert all(round["metrics"]["val_by_hand"] == round["metrics"]["val_accuracy"] for round in history)
    assert curves(tmp_path) == curves(two_ranks / scenario)
    assert len(curves(tmp_path)) == 5


@pytest.mark.slow
def test_a_skipped_client_of_the_other_rank_is_reported(two_ranks: Path) -> None:
    _, history = results(two_ranks / "skips")
    assert all(len(round["cohort"]) == 4 for round in history)
    assert all("a broken sensor" in round["skipped"]["s1"] for round in history)
    assert (two_ranks / "failed-on.txt").read_text() == "rank 1"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "expected"),
    [("raises", "Client 's1' failed in round 0: ZeroDivisionError"), ("raises-misconfiguration", "wrong for everyone")],
)
def test_a_client_that_raises_on_one_rank_ends_both(scenario: str, expected: str, tmp_path: Path) -> None:
    code, output = launch(tmp_path, scenario, 2)  # a rank that hangs runs into the timeout
    assert code != 0
    assert expected in output
    assert (tmp_path / "failed-on.txt").read_text() == "rank 1"


@pytest.mark.slow
def test_a_spawned_client_that_raises_is_named() -> None:
    with pytest.raises(ClientError, match="Client 's0' failed in round 0: ZeroDivisionError"):
        fit_federated(Raises(), sites(1), engine=SpawnedEngine(), algorithm=FedAvg(), local_loop="lightning")


@pytest.mark.slow
def test_a_process_that_dies_before_it_listens_is_a_failed_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the client's environment lacks a package: the pipe breaks under the message."""
    monkeypatch.setattr("fl_lightning.engines.spawned._serve", spine_ddp.leave)
    with pytest.raises(ClientError, match="Client 's0' failed in round 0: its process ended with exit code 3"):
        fit_federated(Classifier(), sites(1), engine=SpawnedEngine(), local_loop="lightning")
