"""Devices from a CSV file: what was measured in place of what is assumed."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from fl_lightning.devices.fields import FIELDS
from fl_lightning.errors import MisconfigurationException

__all__ = ["SWITCHES", "Trace", "read_trace"]

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
SWITCHES = ("online", "charging", "idle")
"""Columns beside the properties of a device: what it was doing, 0 or 1."""
_KEYS = ("client_id", "seconds")


@dataclass
class Trace:
    """The rows of a trace, by device and then by time.

    Args:
        names: the devices.
        starts: for each device its first row, and the number of rows at the end.
        seconds: time of each row on the clock; all 0 in a trace without times.
        columns: values of each row.
        max_gap_seconds: how long a device's last row holds in a trace with times; infinite for ever.
    """

    names: list[str]
    starts: Indices
    seconds: Floats
    columns: dict[str, Floats]
    max_gap_seconds: float = math.inf
    _positions: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._positions = {name: position for position, name in enumerate(self.names)}
        # one sorted axis for all devices, so that a vector of lookups is one search
        self._span = float(self.seconds.max(initial=0.0)) + 1.0
        self._axis = np.repeat(np.arange(len(self.names)), np.diff(self.starts)) * self._span + self.seconds

    def position(self, name: str) -> int | None:
        """Return which device has a name."""
        return self._positions.get(name)

    def rows(self, devices: Indices, at: Floats) -> Indices:
        """Return the row that holds for each device at its time: the last one before, or the device's first.

        Shape:
            all ``(clients,)``
        """
        wanted = devices * self._span + np.clip(at, 0.0, self._span - 1.0)
        return np.maximum(np.searchsorted(self._axis, wanted, side="right") - 1, self.starts[devices])

    def values(self, name: str, devices: Indices, at: Floats) -> Floats:
        """Return a column at a time."""
        values: Floats = self.columns[name][self.rows(devices, at)]
        return values

    def ends(self, devices: Indices) -> Floats:
        """Return from when on nothing is known of each device, which then counts as offline.

        Shape:
            ``(clients,)``
        """
        ends: Floats = self.seconds[self.starts[devices + 1] - 1] + self.max_gap_seconds
        return ends

    def online(self, devices: Indices, at: Floats) -> NDArray[np.bool_]:
        """Return who is online as far as the trace knows: everyone until it ends, in one without such a column."""
        known: NDArray[np.bool_] = at <= self.ends(devices)
        return known & (self.values("online", devices, at) >= 0.5) if "online" in self.columns else known

    def next_offline(self, devices: Indices, at: Floats) -> Floats:
        """Return when each device is next offline, infinite for never; a device that is offline is so at once."""
        rows = self.rows(devices, at)
        found = np.maximum(at, self.ends(devices))
        online = self.columns.get("online")
        if online is None:
            return found
        for index, row in enumerate(rows):
            later = np.flatnonzero(online[row : self.starts[devices[index] + 1]] < 0.5)
            if len(later):
                found[index] = min(found[index], max(float(at[index]), float(self.seconds[row + later[0]])))
        return found

    def charged_between(self, devices: Indices, begin: Floats, end: Floats) -> NDArray[np.bool_]:
        """Return whose level rose from one row to the next in between."""
        level = self.columns["battery_level"]
        rises = np.concatenate([[0], np.cumsum(np.diff(level) > 0)])
        # a step up from one device's last row to the next one's first is outside of every device's own span
        charged: NDArray[np.bool_] = rises[self.rows(devices, end)] > rises[self.rows(devices, begin)]
        return charged


def read_trace(path: str | os.PathLike[str], max_gap_seconds: float) -> Trace:
    """Read a trace.

    The first line names the columns: ``client_id``, optionally ``seconds``, any property of a device and any of
    ``online``, ``charging`` and ``idle``. Without ``seconds`` every device has one row; with it a row holds until the
    device's next one; the first row holds from the clock's start, and the last one ``max_gap_seconds`` long, after
    which the device counts as offline.

    Args:
        path: a CSV file in UTF-8, with or without a byte order mark, which Excel writes.
        max_gap_seconds: longest time between two rows of a device, and from the clock's start, 0, to its first one;
            > 0, in seconds.

    Raises:
        MisconfigurationException: for ``max_gap_seconds`` that is no number above zero; names the line of an unknown
            column, a byte that is no UTF-8, an empty or impossible value, times that go backwards, a gap between two
            times or before the first one, a device whose rows are not together.
    """
    file_path = Path(path)
    number = isinstance(max_gap_seconds, int | float) and not isinstance(max_gap_seconds, bool)
    if not number or not max_gap_seconds > 0:  # NaN is not above zero either
        raise MisconfigurationException(
            f"DeviceFleet.from_trace expected max_gap_seconds > 0, or float('inf') for traces with gaps of any length, "
            f"got {max_gap_seconds!r}. A day is 86400.0."
        )
    if not file_path.is_file():
        raise MisconfigurationException(f"DeviceFleet.from_trace expected a CSV file, found none at {file_path}.")
    reader = csv.reader(io.StringIO(_text(file_path), newline=""))
    header = [name.strip() for name in next(reader, [])]
    _check_header(file_path, header)
    rows = [(reader.line_num, row) for row in reader if row]
    if not rows:
        raise MisconfigurationException(f"{file_path} has no device: line 2 is missing.")
    names: list[str] = []
    starts: list[int] = []
    table: list[dict[str, float]] = []
    for line, row in rows:
        name, values = _parsed(file_path, line, header, row)
        if not names or name != names[-1]:
            if name in names:
                _refuse(file_path, line, f"the rows of client {name!r} to stand together", "another client between")
            names.append(name)
            starts.append(len(table))
            _check_first(file_path, line, name, values, max_gap_seconds)
        else:
            _check_times(file_path, line, name, table[-1], values, max_gap_seconds)
        table.append(values)
    columns = {name: np.array([values[name] for values in table]) for name in header if name not in _KEYS}
    seconds = np.array([values.get("seconds", 0.0) for values in table])
    holds = max_gap_seconds if "seconds" in header else math.inf
    return Trace(names, np.array([*starts, len(table)]), seconds, columns, holds)


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        got = f"the byte 0x{data[error.start]:02x}"
        raise MisconfigurationException(
            f"{path}, line {line}: expected text in UTF-8, got {got}. Save the trace as UTF-8, or read it in its own "
            "encoding (latin-1, say) and write it again."
        ) from error


def _check_header(path: Path, header: Sequence[str]) -> None:
    known = [*_KEYS, *SWITCHES, *FIELDS]
    unknown = [name for name in header if name not in known]
    if unknown:
        _refuse(path, 1, f"columns among {', '.join(known)}", f"{unknown[0]!r}")
    if "client_id" not in header:
        _refuse(path, 1, "a column client_id", f"{', '.join(header) or 'nothing'}")
    if len(set(header)) != len(header):
        _refuse(path, 1, "every column once", f"{next(n for n in header if header.count(n) > 1)!r} twice")


def _parsed(path: Path, line: int, header: Sequence[str], row: Sequence[str]) -> tuple[str, dict[str, float]]:
    if len(row) != len(header):
        _refuse(path, line, f"{len(header)} values", str(len(row)))
    values: dict[str, float] = {}
    for name, text in zip(header, row, strict=True):
        if name != "client_id":
            values[name] = _number(path, line, name, text.strip())
    name = row[header.index("client_id")].strip()
    if not name:
        _refuse(path, line, "a client_id", "a gap")
    return name, values


def _number(path: Path, line: int, name: str, text: str) -> float:
    low, high = (FIELDS[name].low, FIELDS[name].high) if name in FIELDS else (0.0, math.inf)
    if not text:
        _refuse(path, line, f"a value of {name}", "a gap")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if name in SWITCHES and value not in (0.0, 1.0):
        _refuse(path, line, f"{name} to be 0 or 1", repr(text))
    if name == "seconds" and not (0 <= value < math.inf):
        _refuse(path, line, "seconds to be a finite number >= 0", repr(text))
    if not low <= value <= high:  # NaN is not within either
        _refuse(path, line, f"{name} to be a number in [{low:g}, {high:g}]", repr(text))
    return value


def _check_times(
    path: Path, line: int, name: str, before: Mapping[str, float], now: Mapping[str, float], max_gap_seconds: float
) -> None:
    if "seconds" not in now:
        _refuse(path, line, f"one row of client {name!r}, as there is no column seconds", "a second one")
    gap = now["seconds"] - before["seconds"]
    if gap <= 0:
        _refuse(path, line, f"the times of client {name!r} to go up", f"{now['seconds']:g} after {before['seconds']:g}")
    if gap > max_gap_seconds:
        _refuse(
            path, line, f"at most max_gap_seconds={max_gap_seconds:g} between two rows of client {name!r}",
            f"a gap of {gap:g} seconds",
        )  # fmt: skip


def _check_first(path: Path, line: int, name: str, first: Mapping[str, float], max_gap_seconds: float) -> None:
    begin = first.get("seconds", 0.0)
    if begin > max_gap_seconds:
        _refuse(
            path, line,
            f"the first row of client {name!r} within max_gap_seconds={max_gap_seconds:g} of the clock's start, 0",
            f"{begin:g} seconds",
        )  # fmt: skip


def _refuse(path: Path, line: int, expected: str, got: Any) -> NoReturn:
    raise MisconfigurationException(f"{path}, line {line}: expected {expected}, got {got}. Mend the trace.")
