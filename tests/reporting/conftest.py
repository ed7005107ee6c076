"""Readers of event files that are not ours, and modules to log with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub import errors
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

Point = tuple[str, int, float]


def _records(path: Path) -> list[Any]:
    """Read every record with TensorBoard's reader, which raises at a broken or half-written one."""
    reader, events = PyRecordReader_New(str(path)), []
    while True:
        try:
            reader.GetNext()
        except errors.OutOfRangeError:
            return events
        events.append(Event.FromString(reader.record()))


@pytest.fixture
def raw_events() -> Callable[[Path], list[Any]]:
    """Return the events of all files of a folder, in the order of the files' names."""
    return lambda folder: [event for path in sorted(folder.glob("*tfevents*")) for event in _records(path)]


@pytest.fixture
def raw_points(raw_events: Callable[[Path], list[Any]]) -> Callable[[Path], list[Point]]:
    """Return ``(tag, step, value)`` of every scalar, in the order in which a reader meets them."""
    return lambda folder: [
        (value.tag, event.step, value.simple_value)
        for event in raw_events(folder)
        for value in event.summary.value
        if value.HasField("simple_value")
    ]


@pytest.fixture
def accumulated() -> Callable[[Path], dict[str, list[tuple[int, float]]]]:
    """Return the curves as TensorBoard itself reads them from a folder."""

    def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
        reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        reader.Reload()
        return {tag: [(p.step, p.value) for p in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}

    return read
