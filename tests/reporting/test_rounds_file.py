from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest

from fl_lightning.errors import MisconfigurationException
from fl_lightning.reporting import RoundsFile
from fl_lightning.types import RoundReport


def report(round: int, **values: object) -> RoundReport:
    return RoundReport(round=round, cohort=[round, f"site-{round}"], num_examples=10, seconds=0.5, **values)  # type: ignore[arg-type]


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    rounds = RoundsFile(tmp_path / "new" / "rounds.jsonl")
    written = [
        report(0, metrics={"loss": 0.1}, dropped={1: "late", "1": "gone"}),
        report(1, metrics={"größe": 1e-300}, skipped={"a/b": "NaN in 'w'\nsecond line"}),
    ]
    for one in written:
        rounds.append(one)
    assert rounds.read() == written
    assert list(rounds.read()[0].dropped) == [1, "1"]
    assert [type(client) for client in rounds.read()[0].cohort] == [int, str]
    assert RoundsFile(rounds.path).read() == written


def test_no_file_is_no_history(tmp_path: Path) -> None:
    rounds = RoundsFile(tmp_path / "rounds.jsonl")
    assert rounds.read() == []
    assert rounds.offset_and_hash() == (0, hashlib.sha256().hexdigest())
    assert not rounds.path.exists()


def test_every_line_is_strict_json(tmp_path: Path) -> None:
    rounds = RoundsFile(tmp_path / "rounds.jsonl")
    rounds.append(report(0, metrics={"a": math.nan, "b": math.inf, "c": -math.inf, "d": np.float32(0.5)}))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads(rounds.path.read_text(), parse_constant=refuse)
    assert line["metrics"] == {"a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 0.5}
    metrics = rounds.read()[0].metrics
    assert math.isnan(metrics["a"])
    assert (metrics["b"], metrics["c"]) == (math.inf, -math.inf)


def test_numpy_ids_are_numbers(tmp_path: Path) -> None:
    rounds = RoundsFile(tmp_path / "rounds.jsonl")
    client = np.unique([7])[0]
    rounds.append(RoundReport(round=0, cohort=[client], dropped={client: "late"}))
    assert rounds.read() == [RoundReport(round=0, cohort=[7], dropped={7: "late"})]


def test_offset_and_hash_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    rounds = RoundsFile(path)
    for round in range(3):
        rounds.append(report(round))
        assert rounds.offset_and_hash() == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    # a later process finds the same numbers in the file
    assert RoundsFile(path).offset_and_hash() == rounds.offset_and_hash()


def test_resume_cuts_what_came_later_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    before = RoundsFile(path)
    before.append(report(0))
    offset, sha256 = before.offset_and_hash()
    before.append(report(1))
    after = RoundsFile(path)
    after.truncate_to(offset, sha256)
    assert after.offset_and_hash() == (offset, sha256)
    after.append(report(1, metrics={"again": 1.0}))
    assert [one.metrics for one in after.read()] == [{}, {"again": 1.0}]


def test_half_written_line_is_no_report_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    before = RoundsFile(path)
    before.append(report(0))
    offset, sha256 = before.offset_and_hash()
    with open(path, "ab") as file:
        file.write(b'{"round": 1, "coh')
    assert RoundsFile(path).read() == [report(0)]
    resumed = RoundsFile(path)
    resumed.truncate_to(offset, sha256)
    assert path.stat().st_size == offset
    with open(path, "ab") as file:
        file.write(b'{"round": 1, "coh')
    unresumed = RoundsFile(path)
    unresumed.append(report(1))
    assert unresumed.read() == [report(0), report(1)]


def test_changed_history_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    rounds = RoundsFile(path)
    rounds.append(report(0))
    offset, sha256 = rounds.offset_and_hash()
    rounds.append(report(1))
    changed = path.read_bytes().replace(b'"num_examples": 10', b'"num_examples": 11', 1)
    path.write_bytes(changed)
    with pytest.raises(MisconfigurationException, match="are not the history that the checkpoint was written with"):
        RoundsFile(path).truncate_to(offset, sha256)
    assert path.read_bytes() == changed
    with pytest.raises(MisconfigurationException, match=r"Expected at least \d+ bytes of round history"):
        RoundsFile(path).truncate_to(len(changed) + 1, sha256)
    assert path.read_bytes() == changed


def test_a_line_that_is_no_report_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    RoundsFile(path).append(report(0))
    with open(path, "ab") as file:
        file.write(b"[1, 2]\n")
    with pytest.raises(MisconfigurationException, match="Expected a round report in line 2"):
        RoundsFile(path).read()


def test_fields_of_later_and_earlier_versions(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    path.write_text('{"round": 3, "cohort": [1], "colour": "blue"}\n')
    assert RoundsFile(path).read() == [RoundReport(round=3, cohort=[1])]


def test_history_of_another_run_is_copied(tmp_path: Path) -> None:
    old, new = RoundsFile(tmp_path / "old.jsonl"), RoundsFile(tmp_path / "new" / "rounds.jsonl")
    old.append(report(0))
    offset, sha256 = old.offset_and_hash()
    old.append(report(1))
    new.continue_from(old.path, offset, sha256)
    assert new.read() == [report(0)]
    assert old.read() == [report(0), report(1)]
    new.append(report(1))
    assert new.offset_and_hash() == RoundsFile(new.path).offset_and_hash()
    old.continue_from(old.path, offset, sha256)
    assert old.read() == [report(0)]
    with pytest.raises(MisconfigurationException, match="are not the history"):
        new.continue_from(old.path, offset - 1, sha256)
    assert new.read() == [report(0), report(1)]


def test_a_new_run_empties_the_file(tmp_path: Path) -> None:
    rounds = RoundsFile(tmp_path / "rounds.jsonl")
    rounds.append(report(0))
    rounds.truncate_to(0, None)
    assert rounds.read() == []
    assert rounds.offset_and_hash()[0] == 0
