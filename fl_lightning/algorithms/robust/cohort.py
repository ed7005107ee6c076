"""Every contribution of a round side by side, a block of coordinates at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_lightning.types import ClientId, Contribution, Tree

__all__ = ["Block", "Cohort", "coordinate_median"]


@dataclass(frozen=True, slots=True)
class Block:
    """Some neighbouring coordinates of one tensor, of every client.

    Args:
        name: of the tensor.
        begin: position of the first coordinate in the flattened tensor.
        rows: one row for each client.

    Shape:
        rows ``(clients, coordinates)``
    """

    name: str
    begin: int
    rows: Tensor


class Cohort:
    """The contributions of a cohort, in an order that depends on the clients' ids only.

    Rules read blocks: no more than ``block_elements`` numbers are stacked (and, with several processes, exchanged) at
    a time, so that a rule needs little memory beside the updates themselves. Where blocks are cut depends on the
    number of clients and on the shapes only: float sums over blocks have the same bits on one process and on many.

    Args:
        client_ids: who contributed.
        contributions: of the same clients.
        root: the update of the server's own training, when the algorithm has ``root_data``.

    Example:
        >>> rows = [Contribution({"delta": {"w": torch.tensor([float(k), 2.0])}}, {"weight": 1.0}) for k in range(3)]
        >>> cohort = Cohort(["a", "b", "c"], rows)
        >>> cohort.coordinatewise("delta", coordinate_median)["w"].tolist()
        [1.0, 2.0]
        >>> cohort.mixture("delta", torch.tensor([0.5, 0.0, 0.5]))["w"].tolist()
        [1.0, 2.0]
    """

    block_elements = 2**22

    def __init__(
        self, client_ids: Sequence[ClientId], contributions: Sequence[Contribution], root: Tree | None = None
    ) -> None:
        self.client_ids = list(client_ids)
        self.scalars: list[Mapping[str, float]] = [contribution.scalars for contribution in contributions]
        self.root = root
        self._contributions = list(contributions)

    def __len__(self) -> int:
        return len(self.client_ids)

    def template(self, tree: str) -> Tree:
        """Return tensors of the names, shapes and types of a tree; their values are nobody's. Empty without it."""
        return self._contributions[0].trees.get(tree, {})

    def blocks(self, tree: str = "delta") -> Iterator[Block]:
        """Yield a tree of every client, block by block in the order of its names."""
        width = max(1, self.block_elements // len(self))
        for name, tensor in self.template(tree).items():
            for begin in range(0, tensor.numel(), width):
                yield Block(name, begin, self._rows(tree, name, begin, min(begin + width, tensor.numel())))

    def coordinatewise(self, tree: str, rule: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Apply a rule from ``(clients, coordinates)`` to ``(coordinates,)`` to each block."""
        template = self.template(tree)
        parts: dict[str, list[Tensor]] = {name: [] for name in template}
        for block in self.blocks(tree):
            parts[block.name].append(rule(block.rows))
        return {
            name: torch.cat(parts[name]).reshape(tensor.shape).to(tensor.dtype)
            if parts[name]
            else torch.zeros(tensor.shape, dtype=tensor.dtype)
            for name, tensor in template.items()
        }

    def mixture(self, tree: str, shares: Tensor) -> dict[str, Tensor]:
        """Return ``sum_k shares[k] * tree[k]``, summed in double precision; clients with a share of 0 do not count."""
        chosen = torch.nonzero(shares).reshape(-1).tolist()

        def summed(rows: Tensor) -> Tensor:
            total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
            for client in chosen:  # one after the other: a matrix product may sum in another order elsewhere
                total.add_(rows[client].double(), alpha=float(shares[client]))
            return total

        return self.coordinatewise(tree, summed)

    def median_of_buffers(self) -> dict[str, Tensor]:
        """Return the median of every running statistic over the clients.

        Contributions carry buffers times number of examples, which is a client's own claim: a mean would let one
        client set them.
        """
        weights = [float(scalars.get("buffers", 0.0)) for scalars in self.scalars]
        known = [position for position, weight in enumerate(weights) if weight > 0]
        if not known:
            return {}

        def rule(rows: Tensor) -> Tensor:
            values = torch.stack([rows[position].double() / weights[position] for position in known])
            return coordinate_median(values)

        return self.coordinatewise("buffers", rule)

    def _rows(self, tree: str, name: str, begin: int, end: int) -> Tensor:
        return torch.stack([c.trees[tree][name].reshape(-1)[begin:end] for c in self._contributions])


def coordinate_median(rows: Tensor) -> Tensor:
    """Return the median of each column: the middle value, or the mean of the two middle ones.

    Args:
        rows: one row for each client.

    Shape:
        ``(clients, coordinates)`` to ``(coordinates,)``

    Example:
        >>> coordinate_median(torch.tensor([[1.0], [9.0], [2.0], [4.0]])).tolist()
        [3.0]
    """
    count = len(rows)
    ordered = rows.sort(dim=0).values
    low, high = ordered[(count - 1) // 2], ordered[count // 2]
    return low if count % 2 else (low + high) / 2
