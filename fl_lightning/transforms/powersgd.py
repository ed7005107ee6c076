"""Low-rank compression of matrices."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fl_lightning.transforms.base import Exchange, TreeTransform
from fl_lightning.transforms.draws import Draws
from fl_lightning.transforms.errors import PayloadError
from fl_lightning.transforms.vectors import as_tensor
from fl_lightning.types import Memory, Tree

__all__ = ["PowerSGD"]


class PowerSGD(TreeTransform):
    r"""Sends two thin matrices for each tensor of two or more dimensions, found by subspace iteration.

    .. math:: P = \operatorname{orth}(M Q_{t-1}), \qquad Q_t = M^\top P, \qquad C(M) = P Q_t^\top, \qquad
        \lVert M - C(M) \rVert^2 = \lVert M \rVert^2 - \lVert Q_t \rVert^2

    The first dimension makes the rows. :math:`Q_t` waits in the client's memory, so that over rounds the subspace turns
    to the leading singular vectors. Vectors, and matrices that would not shrink, stay as they are for what follows in
    the chain. It is biased; wrap it in :class:`~fl_lightning.transforms.ErrorFeedback`.

    Args:
        rank: columns of the thin matrices, >= 1.
        iterations: steps of subspace iteration in each encoding, >= 1. More of them come closer to the best matrix of
            that rank at no more bytes, which pays where clients are chosen seldom and their subspace is an old one.

    Raises:
        MisconfigurationException: for a rank or a number of iterations below 1.

    Example:
        >>> transform, exchange = PowerSGD(rank=1), Exchange(seed=0, round=0)
        >>> update = {"w": torch.outer(torch.arange(1.0, 5.0), torch.arange(1.0, 6.0))}
        >>> opened, sealed, _ = transform.encode_tree(update, exchange, {})
        >>> {name: tuple(tensor.shape) for name, tensor in opened.items()}
        {'w#p': (4, 1), 'w#q': (5, 1)}
        >>> torch.allclose(transform.decode_tree(opened, sealed, exchange, update)["w"], update["w"])
        True

    References:
        Vogels et al., *PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization*, 2019,
        algorithm 1. There :math:`P` is averaged between the two products; here each client finishes its own.
    """

    def __init__(self, rank: int = 2, iterations: int = 1) -> None:
        for name, value in (("rank", rank), ("iterations", iterations)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise MisconfigurationException(f"PowerSGD expected {name} to be an integer >= 1, got {value!r}.")
        self.rank, self.iterations = rank, iterations

    def output_tree(self, template: Tree) -> Tree:
        opened: dict[str, Tensor] = {}
        for name, like in template.items():
            if self._shrinks(like):
                rows, columns = like.shape[0], like.numel() // like.shape[0]
                opened[f"{name}#p"] = torch.empty(rows, self.rank, dtype=like.dtype, device="meta")
                opened[f"{name}#q"] = torch.empty(columns, self.rank, dtype=like.dtype, device="meta")
            else:
                opened[name] = like
        return opened

    def encode_tree(self, tree: Tree, exchange: Exchange, memory: Memory) -> tuple[Tree, Any, Memory | None]:
        opened: dict[str, Tensor] = {}
        kept: Memory = {}
        draws = exchange.draws()
        for name, tensor in tree.items():
            if not self._shrinks(tensor):
                opened[name] = tensor
                continue
            matrix = tensor.detach().reshape(tensor.shape[0], -1)
            start = memory.get(name)
            if start is None or not bool(start.any()):  # after an update of zero there is no subspace to go on with
                start = self._start(matrix.shape[1], draws)
            factor = start.to(matrix)
            for _ in range(self.iterations):
                # a thin matrix in front is what the library multiplies at the speed of memory, in every layout
                basis = torch.linalg.qr((factor.T.contiguous() @ matrix.T).T).Q
                factor = (basis.T.contiguous() @ matrix).T
            opened[f"{name}#p"], opened[f"{name}#q"] = basis, factor
            kept[name] = factor
        return opened, None, kept or None

    def decode_tree(self, opened: Tree, sealed: Any, exchange: Exchange, template: Tree) -> Tree:
        expected = self.output_tree(template)
        wrong = [n for n, like in expected.items() if n not in opened or opened[n].shape != like.shape]
        if wrong:
            raise PayloadError(f"expected {tuple(expected[wrong[0]].shape)} values of {wrong[0]!r}")
        return {
            name: (opened[f"{name}#p"] @ opened[f"{name}#q"].T).reshape(like.shape).to(like.dtype)
            if self._shrinks(like)
            else opened[name]
            for name, like in template.items()
        }

    def _shrinks(self, tensor: Tensor) -> bool:
        if tensor.ndim < 2 or not tensor.numel():
            return False
        rows = tensor.shape[0]
        return self.rank * (rows + tensor.numel() // rows) < tensor.numel()

    def _start(self, columns: int, draws: Draws) -> Tensor:
        return as_tensor(draws.uniform(columns * self.rank) * 2 - 1).reshape(columns, self.rank)
