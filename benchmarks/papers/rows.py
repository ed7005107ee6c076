"""Ours next to published: one row for each published number."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Row", "finished", "print_table", "write_rows"]


@dataclass(frozen=True)
class Row:
    """One comparison.

    Args:
        what: algorithm and setting.
        ours: as it is printed.
        published: as it is printed; ``"-"`` where the paper only shows a curve.
        gate: what ``ours`` must satisfy; empty where nothing is asked.
        passed: whether it does; ``None`` without a gate.
    """

    what: str
    ours: str
    published: str
    gate: str = ""
    passed: bool | None = None


def finished(rows: Sequence[Row]) -> bool:
    """Return whether no gate is missed."""
    return all(row.passed is not False for row in rows)


def print_table(title: str, rows: Sequence[Row]) -> None:
    """Print a Markdown table, ready for the documentation."""
    head = (title, "ours", "published", "gate", "met")
    cells = [(r.what, r.ours, r.published, r.gate, {None: "", True: "yes", False: "NO"}[r.passed]) for r in rows]
    widths = [max(len(line[i]) for line in [head, *cells]) for i in range(len(head))]
    for line in (head, tuple("-" * width for width in widths), *cells):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Keep the table as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
