"""What a group of clients logs: every value is a vector with one number for each client."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fl_lightning.local.lean_log import Points, ScalarLog
from fl_lightning.local.lean_stack import CannotGroup, Rows
from fl_lightning.local.recorder import ClientLogger
from fl_lightning.metrics import Mean, MetricSums, Part

__all__ = ["GroupLog", "Tick"]


@dataclass(slots=True)
class Tick:
    """One call of ``training_step`` for some clients of a group.

    Args:
        rows: which clients.
        epoch: 0-based epoch of theirs.
        size: examples in each client's batch.
        values: what was logged, by name, one number for each of the clients.
        last: for each of the clients whether this was the last batch of its epoch.
        given: by name the ``batch_size`` that it was logged with.
    """

    rows: Rows
    epoch: int
    size: int
    values: dict[str, Tensor]
    last: list[bool]
    given: dict[str, int | None] = field(default_factory=dict)

    def position(self, row: int) -> int | None:
        """Return where a client stands among the rows, or ``None`` when it took no part."""
        if isinstance(self.rows, int):
            return row if row < self.rows else None
        found = (self.rows == row).nonzero()
        return int(found) if len(found) else None


@dataclass(slots=True, eq=False)
class _Column:
    """The sums of one name, one for each client."""

    arguments: dict[str, Any]
    on_step: bool
    on_epoch: bool
    total: Tensor
    weight: Tensor
    size: int | None = field(default=None)


class GroupLog:
    """Stands for ``LightningModule.log`` under ``torch.func.vmap``.

    Sums are kept as LightningLoop keeps them for a client alone: in float32 and in the order of the steps for a mean of
    the last epoch, in double for a value that is logged for steps only.

    Args:
        num_clients: of the group.
    """

    def __init__(self, num_clients: int) -> None:
        self._num_clients = num_clients
        self._columns: dict[str, _Column] = {}
        self._now: dict[str, Tensor | float] = {}
        self.ticks: list[Tick] = []
        self.keep_ticks = False

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str | Callable[[Any], Any] = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Take one value of every client of the group."""
        if name in self._now:
            raise CannotGroup(f"training_step logs {name!r} twice")
        column = self._columns.get(name)
        if column is None:
            if reduce_fx not in ("mean", torch.mean) or enable_graph:
                raise CannotGroup(f"training_step logs {name!r} with reduce_fx or enable_graph")
            arguments = {"prog_bar": prog_bar, "logger": logger, "on_step": on_step, "on_epoch": on_epoch}
            column = self._new(name, arguments)
        if isinstance(value, Tensor):
            if value.numel() != 1 or value.dtype is not torch.float32:
                raise CannotGroup(f"training_step logs {name!r} as {value.dtype} of shape {tuple(value.shape)}")
            self._now[name] = value.detach().reshape(())
        elif isinstance(value, numbers.Real):
            self._now[name] = float(value)
        else:
            raise CannotGroup(f"training_step logs {name!r} as a {type(value).__name__}, whose state is one for all")
        column.size = batch_size

    def _new(self, name: str, arguments: dict[str, Any]) -> _Column:
        on_step = arguments["on_step"] is not False
        on_epoch = arguments["on_epoch"] is True
        dtype = torch.float32 if on_epoch else torch.float64
        zero = torch.zeros(self._num_clients, dtype=dtype)
        column = self._columns[name] = _Column(arguments, on_step, on_epoch, zero, zero.clone())
        return column

    def begin(self) -> None:
        """Before ``training_step``."""
        self._now = {}

    def logged(self) -> dict[str, Tensor]:
        """Return the tensors that this call logged; vmap turns them into vectors."""
        return {name: value for name, value in self._now.items() if isinstance(value, Tensor)}

    def begin_epoch(self, rows: Tensor) -> None:
        """Forget the sums of the epoch before for the clients that begin another."""
        for column in self._columns.values():
            if column.on_epoch:
                column.total[rows] = 0
                column.weight[rows] = 0

    def absorb(self, tick: Tick) -> None:
        """Add what one call logged; ``tick.values`` holds the vectors."""
        where = slice(tick.rows) if isinstance(tick.rows, int) else tick.rows
        num = len(tick.last)
        for name, value in self._now.items():
            if not isinstance(value, Tensor):
                tick.values[name] = torch.full((num,), value)
        sizes = {self._columns[name].size for name in tick.values if self._columns[name].on_epoch}
        # LightningLoop weighs a value logged for steps only by the batch, or by the one size that others gave
        given = next(iter(sizes)) if len(sizes) == 1 else None
        for name, values in tick.values.items():
            column = self._columns[name]
            size = column.size if column.on_epoch else given
            size = tick.size if size is None else size
            column.total[where] += values.to(column.total.dtype) * size
            column.weight[where] += size
        if self.keep_ticks:
            tick.given = {name: self._columns[name].size for name in tick.values}
            self.ticks.append(tick)

    def sums(self) -> list[MetricSums]:
        """Return each client's sums."""
        columns = [
            ([name, f"{name}_epoch"] if c.on_step and c.on_epoch else [name], c.total.tolist(), c.weight.tolist())
            for name, c in self._columns.items()
        ]
        found = []
        for row in range(self._num_clients):
            parts: dict[str, Part] = {}
            for names, totals, weights in columns:
                if weights[row]:
                    part = Mean(totals[row], weights[row])
                    for name in names:
                        parts[name] = part
            found.append(MetricSums(parts))
        return found

    def replay(self, row: int, logger: ClientLogger, offset: int, log_every: int) -> None:
        """Write one client's curve, as if it had trained alone."""
        log, points, epoch = ScalarLog(logger), Points(offset, log_every), 0
        mine = [(tick, position) for tick in self.ticks if (position := tick.position(row)) is not None]
        for tick, position in mine:
            if tick.epoch != epoch:
                log.end_epoch(points.stepped - 1)
                epoch = tick.epoch
            log.begin_batch(None, tick.size)
            point = points.next(tick.last[position], accumulates=False)
            for name, values in tick.values.items():
                column = self._columns[name]
                log.log(name, values[position], batch_size=tick.given[name], **column.arguments)
            log.observe()
            log.end_batch(point)
            points.stepped += 1
        log.end_epoch(points.stepped - 1)
