"""What a module logs in the lean loop: scalars in plain lists, everything else in Lightning's own collection.

Both give the sums and the records of a client's curve that LightningLoop gives, bit for bit.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor

from fl_lightning.local.lean_trainer import NeedsResults
from fl_lightning.local.recorder import ClientLogger
from fl_lightning.metrics import Mean, MetricSums, Part, StepSums, capture

__all__ = ["Log", "Points", "ResultLog", "ScalarLog", "Series"]


class Log(Protocol):
    """Where ``self.log`` of one client goes."""

    def begin_batch(self, batch: Any, size: int | None = None) -> None:
        """A new batch, and how many examples it has when that is known without looking."""

    def observe(self) -> None:
        """After the batch's callbacks, before the module's ``on_train_batch_end``."""

    def end_batch(self, step: int | None) -> None:
        """After the batch; with a step its values become a point of the curve."""

    def end_batches(self) -> None:
        """After the last batch of an epoch, before the epoch's hooks."""

    def close_epoch(self, num_examples: int) -> None:
        """After the module's ``on_train_epoch_end``: take the sums."""

    def end_epoch(self, step: int) -> None:
        """Put the epoch's values on the curve and forget them."""

    def sums(self) -> MetricSums:
        """Return what merges over clients."""


@dataclass(slots=True, eq=False)
class Series:
    """One name that ``training_step`` logs, as numbers in the order they came."""

    name: str
    manner: tuple[Any, ...]
    on_step: bool
    on_epoch: bool
    logger: bool
    values: list[float] = field(default_factory=list)
    sizes: list[float] = field(default_factory=list)
    pending: float | None = None
    last: float | None = None

    def total(self) -> tuple[float, float]:
        """Return the sum of ``value * size`` and of the sizes, in float32 and in the order that Lightning adds them."""
        products = np.asarray(self.values, dtype=np.float32) * np.asarray(self.sizes, dtype=np.float32)
        return float(np.add.accumulate(products, dtype=np.float32)[-1]), float(sum(self.sizes))

    def part(self) -> Part | None:
        """Return the client's share of the federated value."""
        if not self.values:
            return None
        if self.on_epoch:
            return Mean(*self.total())
        # a value logged for steps only is a mean over the examples of all steps, in double (StepSums)
        values = torch.tensor(self.values, dtype=torch.float32).double()
        sizes = torch.tensor(self.sizes, dtype=torch.float64)
        return Mean(float(values @ sizes), float(sizes.sum()))


class ScalarLog:
    """Numbers and tensors of one element, logged in ``training_step`` and reduced by their mean.

    Args:
        logger: where the points of the curve go, or ``None``.
    """

    def __init__(self, logger: ClientLogger | None) -> None:
        self.series: dict[str, Series] = {}
        self._logger = logger
        self._parts: dict[str, Part] = {}
        self._batch: Any = None
        self._known: int | None = None
        self._size: int | None = None  # once a mean over examples has asked for it
        self._explicit: float | None = None

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
        """Stand for ``LightningModule.log`` in ``training_step``."""
        manner = (prog_bar, logger, on_step, on_epoch, reduce_fx, add_dataloader_idx)
        series = self.series.get(name)
        if series is None:
            series = self._new(name, manner, enable_graph)
        elif series.manner != manner or enable_graph:
            raise NeedsResults
        number = _number(value)
        series.last = number
        if series.on_epoch:
            series.values.append(number)
            series.sizes.append(self._size_of(batch_size))
        elif batch_size is not None and not isinstance(batch_size, int):
            raise NeedsResults
        else:
            series.pending = number

    def _new(self, name: str, manner: tuple[Any, ...], enable_graph: bool) -> Series:
        _, logger, on_step, on_epoch, reduce_fx, _ = manner
        on_step = True if on_step is None else on_step
        on_epoch = False if on_epoch is None else on_epoch
        mean = reduce_fx is torch.mean or (isinstance(reduce_fx, str) and reduce_fx == "mean")
        if not mean or enable_graph or not (on_step or on_epoch) or name == "step" or "/dataloader_idx_" in name:
            raise NeedsResults
        series = self.series[name] = Series(name, manner, on_step, on_epoch, logger is not False)
        return series

    def _size_of(self, batch_size: int | None) -> int:
        if batch_size is None:
            if self._size is None:
                self._size = extract_batch_size(self._batch) if self._known is None else self._known
            return self._size
        if not isinstance(batch_size, int) or self._explicit not in (None, batch_size):
            raise NeedsResults
        self._explicit = batch_size
        return batch_size

    def begin_batch(self, batch: Any, size: int | None = None) -> None:
        self._batch, self._known, self._size, self._explicit = batch, size, None, None

    def observe(self) -> None:
        for series in self.series.values():
            if series.pending is not None:
                size = self._size if self._size is not None else self._explicit
                if size is None:
                    size = _first_size(self._batch) if self._known is None else self._known
                series.values.append(series.pending)
                series.sizes.append(size)
                series.pending = None

    def end_batch(self, step: int | None) -> None:
        self._batch = None
        if step is None or self._logger is None:
            return
        point = {
            (f"{s.name}_step" if s.on_epoch else s.name): float(np.float32(s.last))
            for s in self.series.values()
            if s.last is not None and s.on_step and s.logger
        }
        self._logger.log_metrics(point, step)

    def end_batches(self) -> None:
        """Nothing follows from it for numbers of ``training_step``."""

    def close_epoch(self, num_examples: int) -> None:
        self._parts = {}  # a name that this epoch did not log has no value, as in Lightning
        for series in self.series.values():
            part = series.part() if series.on_epoch else None
            if part is not None:
                self._parts[series.name] = part
                if series.on_step:
                    self._parts[f"{series.name}_epoch"] = part

    def end_epoch(self, step: int) -> None:
        point = {}
        for series in self.series.values():
            series.last = None
            if series.on_epoch and series.values:
                if series.logger and self._logger is not None:
                    total, size = series.total()
                    name = f"{series.name}_epoch" if series.on_step else series.name
                    point[name] = float(np.float32(total) / np.float32(size))
                series.values, series.sizes = [], []
        if point and self._logger is not None:
            self._logger.log_metrics(point, step)

    def sums(self) -> MetricSums:
        parts: dict[str, Part] = {}
        for series in self.series.values():
            part = None if series.on_epoch else series.part()
            if part is not None:
                parts[series.name] = part
        return MetricSums({**parts, **self._parts})


def _number(value: Any) -> float:
    if isinstance(value, Tensor):
        # reading the number is cheaper than a copy on the CPU; on an accelerator it would wait for the device
        if value.numel() != 1 or value.dtype is not torch.float32 or value.device.type != "cpu":
            raise NeedsResults
        return value.item()
    if isinstance(value, numbers.Real):
        return float(value)
    raise NeedsResults


def _first_size(batch: Any) -> float:
    if isinstance(batch, list | tuple) and batch and isinstance(batch[0], Tensor) and batch[0].ndim:
        return batch[0].size(0)
    raise NeedsResults


class Points:
    """Which steps are points on a client's curve: every ``log_every``, at least one a round, as in LightningLoop.

    Args:
        offset: steps of the client's earlier rounds.
        log_every: ``log_every_n_steps``.

    Example:
        >>> points = Points(offset=10, log_every=50)
        >>> points.next(is_last_batch=False, accumulates=False), points.next(is_last_batch=True, accumulates=False)
        (None, 10)
    """

    def __init__(self, offset: int, log_every: int) -> None:
        self.stepped = offset
        """Optimizer steps of all rounds: the curve's own count."""
        self._log_every = log_every
        self._logged_a_point = False

    def next(self, is_last_batch: bool, accumulates: bool) -> int | None:
        """Return the step at which the batch that begins now goes on the curve, or ``None``."""
        if (self.stepped + 1) % self._log_every == 0:
            self._logged_a_point = True
        elif is_last_batch and not self._logged_a_point:
            self._logged_a_point = True
            return None if accumulates else self.stepped
        return self.stepped if not accumulates and (self.stepped + 1) % self._log_every == 0 else None


class ResultLog:
    """Lightning's own result collection, for torchmetrics and every other value that ``self.log`` takes.

    It is the trainer's ``_results`` and ``_logger_connector``, which is where ``LightningModule.log`` looks.

    Args:
        logger: where the points of the curve go, or ``None``.
    """

    def __init__(self, logger: ClientLogger | None) -> None:
        self.results = _ResultCollection(training=True)
        self._logger = logger
        self._step_sums = StepSums()
        self._sums = MetricSums()
        self._current_fx: str | None = None
        self._first_loop_iter: bool | None = None

    def should_reset_tensors(self, fx: str) -> bool:
        """Stand for the question that ``LightningModule.log`` asks."""
        return self._current_fx != fx and self._first_loop_iter in (None, True)

    def begin_batch(self, batch: Any, size: int | None = None) -> None:
        self._first_loop_iter = self._first_loop_iter is None
        self.results.batch, self.results.batch_size, self.results.dataloader_idx = batch, None, None

    def observe(self) -> None:
        self._step_sums.observe(self.results)

    def end_batch(self, step: int | None) -> None:
        self.results.batch = self.results.batch_size = None
        if step is not None and self._logger is not None:
            self._write(self.results.metrics(on_step=True)["log"], step)

    def end_batches(self) -> None:
        self._first_loop_iter = None

    def close_epoch(self, num_examples: int) -> None:
        self._sums = capture(self.results, self._step_sums, num_examples)

    def end_epoch(self, step: int) -> None:
        if self._logger is not None:
            self._write(self.results.metrics(on_step=False)["log"], step)
        self.results.reset()
        self._first_loop_iter = self._current_fx = None

    def sums(self) -> MetricSums:
        return self._sums

    def _write(self, metrics: dict[str, Tensor], step: int) -> None:
        assert self._logger is not None
        scalars = convert_tensors_to_scalars(metrics)
        own_step = scalars.pop("step", None)  # Lightning takes a value of that name for the step
        self._logger.log_metrics(scalars, step if own_step is None else int(own_step))
