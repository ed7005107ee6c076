"""The benchmark programs run to their tables at small sizes; what they measure is not judged here."""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import compression, devices, selection
from benchmarks.compression import RECIPES, measure, mlp


@pytest.fixture(autouse=True)
def as_it_was_before() -> Iterator[None]:
    """The programs have a process to themselves, and set what belongs to it."""
    log = logging.getLogger("lightning.pytorch")
    threads, level = torch.get_num_threads(), log.level
    yield
    torch.set_num_threads(threads)
    log.setLevel(level)


@pytest.mark.parametrize("name", RECIPES)
def test_every_transform_is_measured_in_batches(name: str) -> None:
    cost = measure(RECIPES[name](), mlp(10_000), batch_size=4, turns=2)
    assert 0 < cost.num_bytes <= 4.2 * 10_000 + 1000
    assert cost.encode >= 0
    assert cost.decode >= 0
    assert cost.batch > 0
    assert cost.ratio >= 0


def test_the_size_of_the_model_is_what_was_asked_for() -> None:
    for size in (10_000, 50_000):
        assert abs(sum(p.numel() for p in mlp(size).parameters()) / size - 1) < 0.1


def test_the_table_of_compression(capsys: pytest.CaptureFixture[str]) -> None:
    compression.main(["--parameters", "10000", "--turns", "1", "--batch_size", "2", "--transforms", "Sign()"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "10,000 parameters, batches of 2, 1 turns, CPU time"
    assert lines[-1].startswith("| `Sign()` | ")
    assert len(lines[-1].split("|")) == len(lines[2].split("|")) == 8


def test_what_is_meant_for_smaller_models_is_measured_at_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "chain(Eigenbasis(), DeadZone(step=4.0))"
    monkeypatch.setitem(compression.SIZES, name, 9000)
    arguments = ["--parameters", "10000", "--turns", "1", "--batch_size", "2", "--transforms", name]
    for more, start in (([], f"| `{name}` at 9,000 | "), (["--whole"], f"| `{name}` | ")):
        compression.main([*arguments, *more])
        assert capsys.readouterr().out.splitlines()[-1].startswith(start)


def test_a_day_of_devices(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["devices", "--devices", "300", "--cohort", "5", "--pace", "7200"])
    monkeypatch.setattr(devices.Timed, "seconds", [])
    devices.main()
    table = dict(
        [cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()[2:]
    )
    assert table["devices"] == "300"
    assert float(table["virtual hours"]) >= 24
    assert int(table["rounds"]) >= 3
    assert sum(int(table[reason].replace(",", "")) for reason in ("offline", "in use", "not charging")) > 100


def test_selection_counts_every_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = argparse.Namespace(clients=12, rounds=2, seed=0, target=0.0)
    outcome = selection.run(selection.SAMPLERS["uniform"](), options)
    assert len(outcome.reports) == 12
    assert sum(outcome.reports) == 20
    assert sum(outcome.shares) == pytest.approx(1.0)
    assert outcome.seconds is not None
    assert 0 < outcome.seconds <= outcome.hours * 3600
    assert all(0 <= value <= 1 for value in outcome.accuracy)
    lines = selection.table({"uniform": outcome}, 0.0)
    assert len({line.count("|") for line in lines}) == 1
    bars = Counter(int(line.rsplit(" ", 1)[1]) for line in selection.histogram(outcome))
    assert sum(count * lines for count, lines in bars.items()) == 12
