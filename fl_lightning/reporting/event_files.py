"""TensorBoard event files as sequences of records: append to one, cut one, say where it is whole.

An event file is a TFRecord file: length (uint64), masked CRC-32C of the length, payload, masked CRC-32C of the payload.
This is the one module that knows TensorBoard's file format; it is imported when the first record is written or read.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.writer import FileWriter

__all__ = ["AppendingSummaryWriter", "cut_events", "mend", "read_events"]

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")


def read_events(path: Path) -> Iterator[tuple[int, int, Any]]:
    """Yield ``(start, end, event)`` of every whole record; stop at the first that is broken or half-written.

    Args:
        path: an event file.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = 0
        while start < size and (payload := _next_record(file, size)) is not None:
            end = file.tell()
            yield start, end, Event.FromString(payload)
            start = end


def mend(path: Path) -> int:
    """Cut a last record that a killed process left half-written, and return the bytes that were cut.

    A reader stops at a broken record, so whatever were appended behind it would never be seen.
    """
    size, whole = path.stat().st_size, 0
    with open(path, "rb") as file:
        while whole < size and _next_record(file, size) is not None:
            whole = file.tell()
    if whole < size:
        os.truncate(path, whole)
    return size - whole


def cut_events(path: Path, keep: Callable[[Any], bool]) -> int:
    """Remove the events that ``keep`` refuses, and a half-written last record; return how many events were removed.

    Events at the end are cut off in place; only when some in the middle must go is the file written anew.
    """
    kept: list[tuple[int, int]] = []
    removed = 0
    for start, end, event in read_events(path):
        if not keep(event):
            removed += 1
        elif kept and kept[-1][1] == start:
            kept[-1] = (kept[-1][0], end)
        else:
            kept.append((start, end))
    if len(kept) == 1 and kept[0][0] == 0:
        if kept[0][1] < path.stat().st_size:
            os.truncate(path, kept[0][1])
    elif kept or removed:
        _rewrite(path, kept)
    else:
        os.truncate(path, 0)  # not one whole record
    return removed


def _next_record(file: Any, size: int) -> bytes | None:
    head = file.read(_HEADER.size)
    if len(head) < _HEADER.size:
        return None
    length, crc = _HEADER.unpack(head)
    left = size - file.tell() - _FOOTER.size
    # a wrong length must be noticed before so many bytes are read
    if masked_crc32c(head[:8]) != crc or length > left:
        return None
    payload: bytes = file.read(length)
    foot = file.read(_FOOTER.size)
    # the payload's CRC is computed in Python, byte by byte; only the last record can have been torn by a kill
    if file.tell() == size and masked_crc32c(payload) != _FOOTER.unpack(foot)[0]:
        return None
    return payload


def _rewrite(path: Path, spans: list[tuple[int, int]]) -> None:
    scratch = path.with_name(f".{path.name}.cut")  # no event file's name for a reader that looks just now
    with open(path, "rb") as source, open(scratch, "wb") as target:
        for start, end in spans:
            source.seek(start)
            left = end - start
            while left > 0:
                chunk = source.read(min(left, 1 << 20))
                target.write(chunk)
                left -= len(chunk)
        target.flush()
        os.fsync(target.fileno())
    os.replace(scratch, path)


class _AppendingEvents:
    """TensorBoard's ``EventFileWriter`` without thread or open file: one append for each flush."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pending = bytearray()

    def get_logdir(self) -> str:
        return str(self.path.parent)

    def add_event(self, event: Any) -> None:
        RecordWriter(self).write(event.SerializeToString())

    def write(self, data: bytes) -> None:
        self._pending += data

    def flush(self) -> None:
        if self._pending:
            with open(self.path, "ab") as file:
                file.write(self._pending)
            self._pending = bytearray()

    def close(self) -> None:
        self.flush()

    def reopen(self) -> None:
        """Nothing was closed."""


class _AppendingFileWriter(FileWriter):
    def __init__(self, path: Path) -> None:
        self.event_writer = _AppendingEvents(path)


class AppendingSummaryWriter(SummaryWriter):
    """A ``SummaryWriter`` that goes on in a file of a fixed name, one file after another.

    The stock writer opens a file with the second in its name, a thread and a handle for every folder; two of them
    opened within one second sort wrongly. Here a thousand folders have one file each for ever and no handle is open
    between two flushes, each of which is one write: a killed process leaves at most its tail half-written, which is
    cut when a later process opens the file.
    """

    def __init__(self) -> None:
        self._writer: _AppendingFileWriter | None = None
        self._whole: set[Path] = set()
        self._projectors: dict[Path, Any] = {}
        super().__init__(log_dir=os.devnull)

    def open(self, path: Path) -> None:
        """Write to the end of ``path`` from now on, with the file's header if it is new."""
        self.close()
        self._writer = _AppendingFileWriter(path)
        self.log_dir = str(path.parent)
        if path in self._projectors:
            self._projector_config = self._projectors[path]
        if path not in self._whole:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                mend(path)
            self._whole.add(path)
        if not path.exists() or path.stat().st_size == 0:
            self._writer.event_writer.add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def _get_file_writer(self) -> _AppendingFileWriter | None:
        return self._writer

    def add_scalars(
        self,
        main_tag: str,
        tag_scalar_dict: dict[str, float],
        global_step: int | None = None,
        walltime: float | None = None,
    ) -> None:
        """Write ``<main_tag>/<name>`` curves; the stock writer makes a folder and a file of each."""
        for name, value in tag_scalar_dict.items():
            self.add_scalar(f"{main_tag}/{name}", value, global_step, walltime)

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        self.flush()
        if self._writer is not None and hasattr(self, "_projector_config"):
            # the stock writer lists a folder's embeddings on itself, which here would give them to the next folder
            self._projectors[self._writer.event_writer.path] = self.__dict__.pop("_projector_config")
        self._writer = None
