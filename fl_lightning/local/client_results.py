"""Lightning's collection of logged values, without the walk over every attribute at each ``self.log``."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection, _ResultMetric

__all__ = ["ClientResults"]


class _StayingMetric(_ResultMetric):
    """A logged number that moves only when it is elsewhere."""

    def to(self, *args: Any, **kwargs: Any) -> _StayingMetric:
        if not self._is_at(args[0] if len(args) == 1 and not kwargs else kwargs.get("device")):
            super().to(*args, **kwargs)
        return self

    def _is_at(self, device: Any) -> bool:
        if not self.is_tensor or device is None:
            return False
        here = self.value.device
        if here != (device if isinstance(device, torch.device) else torch.device(device)):
            return False
        # what was logged on an accelerator is there as well as the sums, which start on the CPU
        size = getattr(self, "cumulated_batch_size", None)
        cache = self._forward_cache
        return (size is None or size.device == here) and (cache is None or cache.device == here)


class ClientResults(_ResultCollection):
    """What one loop of a client's Trainer logs, or the server's loop of rounds.

    Lightning calls ``to(device)`` on a value at every ``self.log``, and on all at the end of a fit, and that call
    copies and walks through everything that the value's metric holds, metadata included: a quarter of a small client's
    round. A value that is where it should be is left alone; nothing else changes.

    Example:
        >>> results = ClientResults(training=True)
        >>> for loss in (1.0, 3.0):
        ...     results.log("training_step", "loss", torch.tensor(loss), on_epoch=True, batch_size=2)
        >>> float(results["training_step.loss"].compute())
        2.0
    """

    def __setitem__(self, key: str, metric: _ResultMetric) -> None:
        # Lightning makes its own metric and puts it here; it has no other place to say of which class
        metric.__class__ = _StayingMetric
        super().__setitem__(key, metric)
