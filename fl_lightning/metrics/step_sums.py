"""Values that a module logs for steps only, of which Lightning keeps the last one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.utilities.data import _extract_batch_size
from torch import Tensor

from fl_lightning.metrics.parts import Max, Mean, Min, Part, Total, merge_parts

__all__ = ["StepSums", "logged_name"]

_FLUSH = 64  # values wait on their device, so that one transfer serves many steps


class StepSums:
    r"""Adds up, step by step, what ``self.log(..., on_step=True, on_epoch=False)`` was given.

    That is the default in ``training_step``. The federated value is the mean over all steps :math:`t` of the round,
    weighted by batch size: :math:`\sum_t b_t v_t / \sum_t b_t`; with ``reduce_fx="sum"``, ``"min"`` or ``"max"`` it is
    the sum, the smallest or the largest.

    Lightning does not keep the ``batch_size=`` of a value that is logged for steps only. The batch size is, in this
    order: what Lightning extracted for another value of the step; the ``batch_size=`` that another value of the step,
    logged with ``on_epoch=True``, was given; the length of the first tensor in the batch; 1.

    Example:
        >>> from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
        >>> results, sums = _ResultCollection(training=True), StepSums()
        >>> for loss, size in ((1.0, 30), (4.0, 10)):
        ...     results.batch = torch.zeros(size, 2)
        ...     results.log("training_step", "loss", torch.tensor(loss), on_step=True, on_epoch=False)
        ...     sums.observe(results)
        >>> sums.parts()
        {'loss': Mean(total=70.0, weight=40.0)}
    """

    def __init__(self) -> None:
        self._parts: dict[str, Part] = {}
        self._waiting: dict[str, _Waiting] = {}
        self._seen: dict[str, Tensor] = {}
        self._counted: dict[str, tuple[Tensor, int]] = {}

    def observe(self, results: Any) -> None:
        """Take what was logged in this training batch; call it in ``on_train_batch_end``.

        Args:
            results: Lightning's ``_ResultCollection`` of the training loop.
        """
        explicit = self._explicit_size(results) if results.batch_size is None else None
        size: float | Tensor | None = None
        for key, result in results.items():
            meta = result.meta
            if meta.on_epoch or not result.is_tensor or result.has_reset:
                continue
            value = result._forward_cache
            # a new tensor for each call of self.log; the old one is kept, so that its identity is not used again
            if value is None or value is self._seen.get(key):
                continue
            self._seen[key] = value
            if size is None:
                size = _batch_size(results, explicit)
            self._add(logged_name(meta), meta, value, size)

    def parts(self) -> dict[str, Part]:
        """Return the parts by logged name, of all steps so far."""
        for name, waiting in self._waiting.items():
            self._flush(name, waiting)
        return dict(self._parts)

    def _add(self, name: str, meta: Any, value: Tensor, size: float | Tensor) -> None:
        waiting = self._waiting.get(name)
        if waiting is None:
            waiting = self._waiting[name] = _Waiting(_kind(meta))
        waiting.values.append(value)
        waiting.sizes.append(size)
        if len(waiting.values) >= _FLUSH:
            self._flush(name, waiting)

    def _flush(self, name: str, waiting: _Waiting) -> None:
        if not waiting.values:
            return
        values = torch.stack([value.detach().reshape(()) for value in waiting.values]).cpu().double()
        sizes = torch.tensor([float(size) for size in waiting.sizes], dtype=torch.float64)
        part: Part
        if waiting.kind == "mean":
            part = Mean(float(values @ sizes), float(sizes.sum()))
        elif waiting.kind == "sum":
            part = Total(float(values.sum()))
        else:
            part = Max(float(values.max())) if waiting.kind == "max" else Min(float(values.min()))
        known = self._parts.get(name)
        merged = part if known is None else merge_parts(known, part)
        assert merged is not None  # Lightning refuses one name with two reductions
        self._parts[name] = merged
        waiting.values.clear()
        waiting.sizes.clear()

    def _explicit_size(self, results: Any) -> Tensor | None:
        """Return the batch size behind what an epoch mean grew by in this step: the user's own ``batch_size=``."""
        size = None
        for key, result in results.items():
            if not (result.is_tensor and result.meta.on_epoch and result.meta.is_mean_reduction) or result.has_reset:
                continue
            total, calls = result.cumulated_batch_size, result._update_count
            before, calls_before = self._counted.get(key, (torch.zeros_like(total), 0))
            if total is before:
                continue
            self._counted[key] = total, calls
            if calls <= calls_before:  # Lightning has reset it since: another epoch
                before, calls_before = torch.zeros_like(total), 0
            size = (total - before) / (calls - calls_before)
        return size


@dataclass(slots=True)
class _Waiting:
    kind: str
    values: list[Tensor] = field(default_factory=list)
    sizes: list[float | Tensor] = field(default_factory=list)


def logged_name(meta: Any) -> str:
    """Return the name of a logged value with Lightning's suffix for its dataloader."""
    with_loader = meta.add_dataloader_idx and meta.dataloader_idx is not None
    return f"{meta.name}/dataloader_idx_{meta.dataloader_idx}" if with_loader else str(meta.name)


def _kind(meta: Any) -> str:
    if meta.is_mean_reduction:
        return "mean"
    if meta.is_sum_reduction:
        return "sum"
    return "max" if meta.is_max_reduction else "min"


def _batch_size(results: Any, explicit: Tensor | None) -> float | Tensor:
    if results.batch_size is not None:
        return float(results.batch_size)
    if explicit is not None:
        return explicit
    # the first of the sizes that Lightning looks at is the one it takes; it looks at the others to warn, which would
    # tell a user to pass the batch_size that she did pass
    try:
        return float(next((size for size in _extract_batch_size(results.batch) if size is not None), 1))
    except (RecursionError, TypeError):
        return 1.0
