from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.tensorboard import SummaryWriter

from fl_lightning.reporting.event_files import cut_events, mend, read_events


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file by torch's own writer: its header and the steps 0 to 5."""
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(6):
            writer.add_scalar("a", float(step), step)
    (path,) = tmp_path.iterdir()
    return path


def test_records_of_torch_s_writer_are_read(file: Path, raw_events: Callable[..., Any]) -> None:
    assert [event for _, _, event in read_events(file)] == raw_events(file.parent)
    spans = [(start, end) for start, end, _ in read_events(file)]
    assert spans[0][0] == 0
    assert spans[-1][1] == file.stat().st_size
    assert all(left[1] == right[0] for left, right in itertools.pairwise(spans))


def test_the_end_is_cut_in_place(file: Path, raw_points: Callable[..., Any]) -> None:
    inode = file.stat().st_ino
    assert cut_events(file, lambda event: event.step < 4) == 2
    assert file.stat().st_ino == inode
    assert [step for _, step, _ in raw_points(file.parent)] == [0, 1, 2, 3]
    assert cut_events(file, lambda event: event.step < 4) == 0


def test_the_middle_is_cut_out(file: Path, raw_points: Callable[..., Any], raw_events: Callable[..., Any]) -> None:
    assert cut_events(file, lambda event: event.step not in (1, 4)) == 2
    assert [step for _, step, _ in raw_points(file.parent)] == [0, 2, 3, 5]
    assert raw_events(file.parent)[0].file_version == "brain.Event:2"
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_every_way_in_which_a_write_can_break_off(file: Path, raw_points: Callable[..., Any]) -> None:
    whole = file.read_bytes()
    start = [start for start, _, _ in read_events(file)][-1]
    for size in range(start + 1, len(whole)):
        file.write_bytes(whole[:size])
        assert mend(file) == size - start
        assert [step for _, step, _ in raw_points(file.parent)] == [0, 1, 2, 3, 4]
        file.write_bytes(whole[:size])
        assert cut_events(file, lambda event: event.step != 2) == 1
        assert [step for _, step, _ in raw_points(file.parent)] == [0, 1, 3, 4]
    file.write_bytes(whole[:-20] + bytes(20))  # the right size, but the blocks never reached the disk
    assert mend(file) == len(whole) - start
    file.write_bytes(whole[:7])
    assert cut_events(file, lambda event: True) == 0
    assert file.stat().st_size == 0


def test_a_length_out_of_nowhere_is_no_record(file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole + b"\xff" * 64)
    assert mend(file) == 64
    assert file.read_bytes() == whole
