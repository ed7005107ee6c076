"""``rounds.jsonl``: one line of JSON a round, so that checkpoints hold an offset and a hash instead of a history."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from fl_lightning.errors import MisconfigurationException
from fl_lightning.types import RoundReport

__all__ = ["RoundsFile"]

_BY_CLIENT = ("dropped", "skipped")  # JSON turns the key 7 into "7", so these travel as lists of pairs


class RoundsFile:
    """The reports of all rounds in a file that only grows, and shrinks only to where a checkpoint was written.

    A line is written in one piece and handed to the operating system before :meth:`append` returns, so a killed
    process loses nothing that it reported and leaves at most one line half-written. Every line is strict JSON: NaN and
    the infinities are the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``.

    Args:
        path: the file; it and its folder are made by the first :meth:`append`.

    Example:
        >>> import tempfile
        >>> rounds = RoundsFile(Path(tempfile.mkdtemp()) / "rounds.jsonl")
        >>> rounds.append(RoundReport(round=0, cohort=[7, "site-a"], dropped={3: "late"}))
        >>> offset, sha256 = rounds.offset_and_hash()
        >>> rounds.append(RoundReport(round=1, cohort=[7]))
        >>> rounds.truncate_to(offset, sha256)
        >>> [(report.cohort, report.dropped) for report in rounds.read()]
        [([7, 'site-a'], {3: 'late'})]
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._offset: int | None = None  # unknown until the file was read once
        self._hash = hashlib.sha256()

    def append(self, report: RoundReport) -> None:
        """Write one report behind the others."""
        self._catch_up()
        line = _to_line(report)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            file.write(line)
        assert self._offset is not None
        self._offset += len(line)
        self._hash.update(line)

    def read(self) -> list[RoundReport]:
        """Return every report; a last line that a kill left half-written is not one.

        Raises:
            MisconfigurationException: when a whole line is no report.
        """
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")[:-1]  # what follows the last newline was not finished
        return [self._parsed(line, number) for number, line in enumerate(lines, start=1)]

    def offset_and_hash(self) -> tuple[int, str]:
        """Return the bytes written so far and their SHA-256 in hex: what a checkpoint keeps."""
        self._catch_up()
        assert self._offset is not None
        return self._offset, self._hash.hexdigest()

    def truncate_to(self, offset: int, sha256: str | None) -> None:
        """Go back to where a checkpoint was written: check what stands before ``offset``, cut what follows it.

        Args:
            offset: bytes, as :meth:`offset_and_hash` gave them; 0 empties the file.
            sha256: the hash of the bytes before ``offset``, in hex; ``None`` takes them as they are.

        Raises:
            MisconfigurationException: when the file is shorter, or differs from what the checkpoint saw. Nothing is
                cut then.
        """
        digest = _checked(self.path, offset, sha256)
        if self.path.exists() and self.path.stat().st_size > offset:
            os.truncate(self.path, offset)
        self._offset, self._hash = offset, digest

    def continue_from(self, source: str | os.PathLike[str], offset: int, sha256: str) -> None:
        """Go back to where a checkpoint was written, with the history of the run that wrote it.

        Args:
            source: the ``rounds.jsonl`` of that run, which may be this file; another one is left as it is.
            offset: bytes, as :meth:`offset_and_hash` gave them.
            sha256: the hash of the bytes before ``offset``, in hex.

        Raises:
            MisconfigurationException: as :meth:`truncate_to`; this file is then as it was.
        """
        other = Path(source)
        if other.resolve() == self.path.resolve():
            return self.truncate_to(offset, sha256)
        digest = _checked(other, offset, sha256)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "wb") as file:
            file.writelines(_chunks(other, offset))
        self._offset, self._hash = offset, digest
        return None

    def _catch_up(self) -> None:
        """Hash what an earlier process left, once; its half-written last line would swallow the next report."""
        if self._offset is not None:
            return
        whole = _end_of_last_line(self.path)
        if self.path.exists() and self.path.stat().st_size > whole:
            os.truncate(self.path, whole)
        self._offset, self._hash = whole, _hash_of(self.path, whole)

    def _parsed(self, line: bytes, number: int) -> RoundReport:
        try:
            return _from_line(line)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise MisconfigurationException(
                f"Expected a round report in line {number} of {self.path}, got {line[:60]!r} ({error}). Restore the "
                "file, or move it away to start a new history."
            ) from error


def _checked(path: Path, offset: int, sha256: str | None) -> Any:
    """Return the running hash of the bytes before ``offset`` if they are what a checkpoint saw."""
    size = path.stat().st_size if path.exists() else 0
    if size < offset:
        raise MisconfigurationException(
            f"Expected at least {offset} bytes of round history in {path}, got {size}. The checkpoint belongs to a "
            "longer history: restore the file, or resume from an older checkpoint."
        )
    digest = _hash_of(path, offset)
    if sha256 is not None and digest.hexdigest() != sha256:
        raise MisconfigurationException(
            f"The first {offset} bytes of {path} are not the history that the checkpoint was written with (expected "
            f"SHA-256 {sha256[:12]}…, got {digest.hexdigest()[:12]}…). Restore the file, or resume into another "
            "version folder."
        )
    return digest


def _to_line(report: RoundReport) -> bytes:
    values: dict[str, Any] = {field.name: getattr(report, field.name) for field in fields(report)}
    values["metrics"] = {name: _json_float(float(value)) for name, value in report.metrics.items()}
    for name in _BY_CLIENT:
        values[name] = [list(pair) for pair in values[name].items()]
    values["seconds"] = _json_float(report.seconds)
    return json.dumps(values, allow_nan=False, ensure_ascii=False, default=_plain).encode() + b"\n"


def _from_line(line: bytes) -> RoundReport:
    values: Mapping[str, Any] = json.loads(line)
    known = {field.name for field in fields(RoundReport)}
    # a later version may have added fields; an older one may lack some, which then have their defaults
    given = {name: value for name, value in values.items() if name in known}
    given["metrics"] = {name: float(value) for name, value in given.get("metrics", {}).items()}
    given["seconds"] = float(given.get("seconds", 0.0))
    for name in _BY_CLIENT:
        given[name] = dict(given.get(name, []))
    return RoundReport(**given)


def _json_float(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


def _plain(value: Any) -> Any:
    """NumPy's integers, which ``numpy.unique`` gives as client ids, are written as numbers."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no place in a round report")


def _chunks(path: Path, size: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while size > 0 and (chunk := file.read(min(size, 1 << 20))):
            size -= len(chunk)
            yield chunk


def _hash_of(path: Path, size: int) -> Any:
    digest = hashlib.sha256()
    if size:
        for chunk in _chunks(path, size):
            digest.update(chunk)
    return digest


def _end_of_last_line(path: Path) -> int:
    end = position = 0
    if path.exists():
        for chunk in _chunks(path, path.stat().st_size):
            if (newline := chunk.rfind(b"\n")) >= 0:
                end = position + newline + 1
            position += len(chunk)
    return end
