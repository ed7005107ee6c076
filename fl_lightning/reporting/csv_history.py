"""Lightning's CSV log when a run goes on: its writer deletes what an earlier process wrote, this one does not."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

__all__ = ["continue_csv", "cut_csv"]


class _ContinuingWriter(ExperimentWriter):
    """Lightning's writer, which knows the columns of the file that it finds."""

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.is_file():
            header, rows = _read(path)
            # Lightning appends rows in the sorted order of its columns, whatever the header says
            self.metrics_keys = sorted(header)
            _write(path, self.metrics_keys, rows)


def continue_csv(logger: Logger) -> None:
    """Let a ``CSVLogger`` that has not opened its file yet go on in it, in place of deleting it."""
    given: Any = logger
    if given._experiment is None and (Path(given.log_dir) / ExperimentWriter.NAME_METRICS_FILE).is_file():
        given._experiment = _ContinuingWriter(log_dir=given.log_dir)


def cut_csv(logger: Logger, keep: Callable[[dict[str, str]], bool]) -> int:
    """Remove the rows that ``keep`` refuses, and a half-written last row; return how many rows were removed.

    Args:
        logger: a ``CSVLogger``; what it has not yet written is written first.
        keep: says of a row, by column, whether it stays.
    """
    given: Any = logger
    if given._experiment is not None:
        given._experiment.save()
    path = Path(given.log_dir) / ExperimentWriter.NAME_METRICS_FILE
    if not path.is_file():
        return 0
    header, rows = _read(path)
    kept = [row for row in rows if keep(row)]
    _write(path, header, kept)
    return len(rows) - len(kept)


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]  # what follows the last newline was not finished
    reader = csv.DictReader(whole.splitlines(keepends=True))
    return list(reader.fieldnames or []), list(reader)


def _write(path: Path, header: Sequence[str], rows: Sequence[dict[str, str]]) -> None:
    if not header:
        path.unlink()
        return
    scratch = path.with_name(f".{path.name}.cut")
    with open(scratch, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=header)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(scratch, path)
