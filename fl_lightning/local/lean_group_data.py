"""The clients of a group and their examples in one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from fl_lightning.local.job import Job
from fl_lightning.local.lean_data import TensorBatches
from fl_lightning.local.lean_stack import Rows
from fl_lightning.types import Tree

__all__ = ["GroupData", "Member"]


@dataclass(slots=True)
class Member:
    """One client of a group: its job, its data, its own copies of the callbacks, and layers that stay with it."""

    job: Job
    batches: TensorBatches
    callbacks: list[Callback]
    num_examples: int
    local: Tree = field(default_factory=dict)

    def sizes(self, epoch: int) -> list[int]:
        """Return the sizes of the batches of an epoch that the client gets to."""
        work, sizes = self.job.task.work, self.batches.sizes()
        if work.steps is not None:
            return sizes[: max(0, work.steps - epoch * len(sizes))]
        return sizes if epoch < (work.epochs or 0) else []

    def num_steps(self) -> int:
        """Return how many steps the client makes, in all epochs."""
        work, steps = self.job.task.work, len(self.batches.sizes())
        return work.steps if work.steps is not None else steps * (work.epochs or 0)

    def num_bytes(self) -> int:
        """Return the size of the client's examples."""
        examples = len(self.batches.sampler)  # type: ignore[arg-type]
        return sum(t[:1].numel() * t.element_size() * examples for t in self.batches.tensors)

    def key(self) -> tuple[Any, ...]:
        """Return what clients of one group have in common."""
        task, batches = self.job.task, self.batches
        kinds = tuple((tensor.dtype, tensor.shape[1:]) for tensor in batches.tensors)
        return task.work.epochs, task.work.steps, batches.batch_size, kinds, id(task.broadcast["model"])


class GroupData:
    """The members' examples in one place, and where each one's batches are.

    Shape:
        ``order``: ``(clients, longest epoch)``, positions in ``tensors``.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members
        whole = members[0].batches.tensors
        self._shared = all(
            len(m.batches.tensors) == len(whole) and all(a is b for a, b in zip(m.batches.tensors, whole, strict=True))
            for m in members
        )
        self._offsets = [0] * len(members)
        self.tensors: Sequence[Tensor] = whole
        if not self._shared:
            parts = [m.batches.own() for m in members]
            self.tensors = [torch.cat(column) for column in zip(*parts, strict=True)]
            for row, part in enumerate(parts[:-1]):
                self._offsets[row + 1] = self._offsets[row] + len(part[0])
        self._orders = [_orders(member, mapped=self._shared) for member in members]
        self.order = torch.empty(0, dtype=torch.int64)
        self.begin_epoch(0, range(len(members)))

    def begin_epoch(self, epoch: int, active: Sequence[int]) -> None:
        orders = [self._orders[row][epoch] for row in active]
        sizes = [order.shape[0] for order in orders]
        longest = max(sizes)
        if len(active) == len(self.members) and min(sizes) == longest:
            self.order = torch.stack(orders).add_(torch.tensor(self._offsets).unsqueeze(1))
            return
        self.order = torch.zeros(len(self.members), longest, dtype=torch.int64)
        for row, size, order in zip(active, sizes, orders, strict=True):
            self.order[row, :size] = order + self._offsets[row]

    def batch(self, rows: Rows, index: int | Tensor, size: int) -> list[Tensor]:
        """Return batches of the rows, ``(rows, size, *example)``."""
        order = self.order[:rows] if isinstance(rows, int) else self.order.index_select(0, rows)
        full = self.members[0].batches.batch_size
        if isinstance(index, int):
            chosen = order[:, index * full : index * full + size]
        else:
            chosen = order.gather(1, (index * full).unsqueeze(1) + torch.arange(size))
        flat = chosen.reshape(-1)
        return [tensor.index_select(0, flat).reshape(*chosen.shape, *tensor.shape[1:]) for tensor in self.tensors]


def _orders(member: Member, mapped: bool) -> list[Tensor]:
    """Draw a client's orders of all epochs, as it draws them alone."""
    torch.default_generator.manual_seed(member.job.task.seed)
    orders: list[Tensor] = []
    while member.sizes(len(orders)):
        member.batches.skip_seed()
        orders.append(member.batches.positions() if mapped else member.batches.order())
    return orders
