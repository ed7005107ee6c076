"""The one sum of a round: lanes of clients, merged in a fixed binary tree over lanes and processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fl_lightning.algorithms.robust.cohort import Cohort
from fl_lightning.metrics import MetricSums
from fl_lightning.tree import add_, from_vector, to_vector
from fl_lightning.types import ClientId, Contribution, Tree

__all__ = ["PartialSum", "TreeSum", "gather_cohort", "gather_objects", "reduce_over_processes"]

_CHUNK = 2**22
"""Elements of one all-gather: bounds the memory of a reduction to a few chunks a process."""


@dataclass(slots=True)
class PartialSum:
    """The sum over some clients of what rides in contributions."""

    trees: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    scalars: dict[str, float] = field(default_factory=dict)
    metrics: MetricSums = field(default_factory=MetricSums)
    num_clients: int = 0

    def add(self, contribution: Contribution, metrics: MetricSums | None) -> None:
        """Add one client; its tensors may be taken over."""
        for name, tree in contribution.trees.items():
            if name in self.trees:
                add_(self.trees[name], tree)
            else:
                self.trees[name] = dict(tree)
        for name, value in contribution.scalars.items():
            self.scalars[name] = self.scalars.get(name, 0.0) + value
        if metrics is not None:
            self.metrics = self.metrics.merge(metrics)
        self.num_clients += 1

    def merged(self, right: PartialSum) -> PartialSum:
        """Return the sum of both, ``self`` first; a side without clients is neutral, to the bit."""
        if not right.num_clients:
            return self
        if not self.num_clients:
            return right
        for name, tree in right.trees.items():
            add_(self.trees.setdefault(name, {}), tree)
        for name, value in right.scalars.items():
            self.scalars[name] = self.scalars.get(name, 0.0) + value
        self.metrics = self.metrics.merge(right.metrics)
        self.num_clients += right.num_clients
        return self

    def as_contribution(self) -> Contribution:
        return Contribution(dict(self.trees), self.scalars)


class TreeSum:
    """Merges a power of two of partial sums depth first, so that no more than ``log2(n) + 1`` exist at a time."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, PartialSum]] = []

    def push(self, partial: PartialSum) -> None:
        level = 0
        while self._waiting and self._waiting[-1][0] == level:
            _, left = self._waiting.pop()
            partial, level = left.merged(partial), level + 1
        self._waiting.append((level, partial))

    def total(self) -> PartialSum:
        """Return the merged sum of all that was pushed."""
        total = PartialSum()
        for _, partial in reversed(self._waiting):
            total = partial.merged(total)
        return total


def gather_objects(value: Any) -> list[Any]:
    """Return every process's value, in the order of ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def reduce_over_processes(partial: PartialSum, device: torch.device) -> PartialSum:
    """Merge the processes' sums in the order of the lanes, to the same bits as one process would.

    Every process gets the total. An all-reduce would add in an order of its own; gathering chunks and adding them in
    the order of the tree costs about the same.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return partial
    small = {
        "count": partial.num_clients,
        "scalars": partial.scalars,
        "metrics": partial.metrics,
        "templates": {k: {n: (t.shape, t.dtype) for n, t in tree.items()} for k, tree in partial.trees.items()},
    }
    everyone = gather_objects(small)
    templates: dict[str, Any] = next((each["templates"] for each in everyone if each["count"]), {})
    sides = [PartialSum({}, each["scalars"], each["metrics"], each["count"]) for each in everyone]
    counts = [each["count"] for each in everyone]
    total = _tree(sides)
    total.trees = {}
    for key, names in templates.items():
        template = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in names.items()}
        total.trees[key] = _reduce_tree(partial.trees.get(key, {}), template, counts, device)
    return total


def _tree(sides: Iterable[PartialSum]) -> PartialSum:
    merged = TreeSum()
    for side in sides:
        merged.push(side)
    return merged.total()


def _reduce_tree(
    own: dict[str, Tensor], template: dict[str, Tensor], counts: list[int], device: torch.device
) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in template.values()):
        part = {name: tensor for name, tensor in template.items() if tensor.dtype == dtype}
        size = sum(tensor.numel() for tensor in part.values())
        vector = to_vector({n: own[n] for n in part}) if own else torch.zeros(size, dtype=dtype, device=device)
        for begin in range(0, size, _CHUNK):
            chunk = vector[begin : begin + _CHUNK].contiguous()
            chunks = [torch.empty_like(chunk) for _ in counts]
            dist.all_gather(chunks, chunk)
            vector[begin : begin + _CHUNK] = _add_in_order(chunks, counts)
        result.update(from_vector(vector, part))
    return {name: result[name] for name in template}


def _add_in_order(chunks: list[Tensor], counts: list[int]) -> Tensor:
    merged = TreeSum()
    for chunk, count in zip(chunks, counts, strict=True):
        merged.push(PartialSum({"": {"": chunk}} if count else {}, {}, MetricSums(), count))
    return merged.total().trees[""][""]


def gather_cohort(
    own: Mapping[ClientId, Contribution], client_ids: Sequence[ClientId], root: Tree | None, device: torch.device
) -> Cohort:
    """Return the contributions of every process, for rules that need each one.

    Only scalars and shapes travel at once; tensors follow a block at a time, when a rule asks for them.

    Args:
        own: contributions of the clients that trained in this process.
        client_ids: everyone who delivered, in the order that the rules see.
        root: the update of the server's own training, the same in every process.
        device: of this process.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Cohort(client_ids, [own[client_id] for client_id in client_ids], root)
    return _GatheredCohort(own, client_ids, root, device)


class _GatheredCohort(Cohort):
    """A cohort whose contributions stay where their clients trained."""

    def __init__(
        self,
        own: Mapping[ClientId, Contribution],
        client_ids: Sequence[ClientId],
        root: Tree | None,
        device: torch.device,
    ) -> None:
        self._own = [own[client_id] for client_id in client_ids if client_id in own]
        shapes = {
            tree: {name: (t.shape, t.dtype) for name, t in tensors.items()}
            for tree, tensors in (self._own[0].trees.items() if self._own else ())
        }
        mine = [client_id for client_id in client_ids if client_id in own]
        everyone = gather_objects((mine, [contribution.scalars for contribution in self._own], shapes))
        found = next(trees for ids, _, trees in everyone if ids)
        template: dict[str, Tree] = {
            tree: {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in names.items()}
            for tree, names in found.items()
        }
        scalars = {c: values for ids, each, _ in everyone for c, values in zip(ids, each, strict=True)}
        super().__init__(client_ids, [Contribution(template, scalars[client_id]) for client_id in client_ids], root)
        self._most = max(len(ids) for ids, _, _ in everyone)
        places = {c: rank * self._most + row for rank, (ids, _, _) in enumerate(everyone) for row, c in enumerate(ids)}
        self._order = torch.tensor([places[client_id] for client_id in client_ids], device=device)
        self._device = device

    def _rows(self, tree: str, name: str, begin: int, end: int) -> Tensor:
        dtype = self.template(tree)[name].dtype
        # processes may have trained unequal numbers of clients, and an all-gather wants equal shapes
        mine = torch.zeros(self._most, end - begin, dtype=dtype, device=self._device)
        for row, contribution in enumerate(self._own):
            mine[row] = contribution.trees[tree][name].reshape(-1)[begin:end]
        gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, mine)
        return torch.cat(gathered).index_select(0, self._order)
