"""Random rotations of blocks of elements: signs, then the Hadamard matrix as two products with small ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fl_lightning.transforms.bits import CHUNK, Array
from fl_lightning.transforms.draws import Draws

__all__ = ["Rotation"]

_LEFT, _RIGHT = 32, 32
_BLOCK = _LEFT * _RIGHT
_PIECE = 2 * CHUNK


class Rotation:
    r"""Multiplies blocks by :math:`H D`, or undoes it with :math:`D H`.

    Pieces of at most twice ``CHUNK`` elements are seen as an array of shape ``(left, blocks, right)``, so that a block
    is spread over the piece and :math:`H = H_{left} \otimes H_{right}` takes one product of matrices for each side,
    whose other dimension is long. The signs :math:`D` of different elements of a piece are independent; every piece has
    the same ones. What is returned lies in memory that the next call overwrites.

    Args:
        draws: where the signs come from; the same ones rotate and rotate back.

    Example:
        >>> rotation, x = Rotation(Draws(0)), np.arange(1500, dtype=np.float32)
        >>> back = np.empty_like(x)
        >>> for (begin, end), shape in Rotation.pieces(1500):
        ...     _ = rotation.blank(shape).copy_(rotation.apply(x[begin:end], shape).clone())
        ...     back[begin:end] = rotation.undo(shape)[: end - begin]
        >>> bool(np.allclose(back, x, atol=1e-2)), [shape for _, shape in Rotation.pieces(1500)]
        (True, [(32, 1, 32), (16, 1, 32)])
    """

    def __init__(self, draws: Draws) -> None:
        self._signs = torch.from_numpy(draws.signs(_PIECE))
        self._first, self._second = torch.empty(_PIECE), torch.empty(_PIECE)

    @staticmethod
    def pieces(num: int) -> Iterator[tuple[tuple[int, int], tuple[int, int, int]]]:
        """Yield begin and end of each piece and its shape: whole blocks, and one of the next power of two for the rest.

        Args:
            num: elements altogether.
        """
        whole = num // _BLOCK * _BLOCK
        for begin in range(0, whole, _PIECE):
            end = min(begin + _PIECE, whole)
            yield (begin, end), (_LEFT, (end - begin) // _BLOCK, _RIGHT)
        if whole < num:
            power = (num - whole - 1).bit_length()
            yield (whole, num), (1 << power // 2, 1, 1 << (power - power // 2))

    def apply(self, values: Array, shape: tuple[int, int, int]) -> Tensor:
        """Return a piece rotated; zeros fill up what is short of a block."""
        first = self.blank(shape).view(-1)
        if len(values) < len(first):
            first.zero_()
        signs, out = self._signs.numpy()[: len(values)], first[: len(values)].numpy()
        np.multiply(values, signs, out=out, casting="same_kind")
        return self._product(shape)

    def blank(self, shape: tuple[int, int, int]) -> Tensor:
        """Return where to write a piece that :meth:`undo` rotates back."""
        return self._first[: math.prod(shape)].view(shape)

    def scratch(self, shape: tuple[int, int, int]) -> Tensor:
        """Return memory of a piece's size for what is computed from a piece that :meth:`apply` returned."""
        return self._second[: math.prod(shape)].view(shape)

    def undo(self, shape: tuple[int, int, int]) -> Array:
        """Return the piece that stands in :meth:`blank` rotated back, with what filled it up."""
        rotated = self._product(shape).view(-1)
        back: Array = rotated.mul_(self._signs[: len(rotated)]).numpy()
        return back

    def _product(self, shape: tuple[int, int, int]) -> Tensor:
        left, _, right = shape
        first, second = (memory[: math.prod(shape)] for memory in (self._first, self._second))
        torch.mm(_hadamard(left), first.view(left, -1), out=second.view(left, -1))
        torch.mm(second.view(-1, right), _hadamard(right), out=first.view(-1, right))
        return first.view(shape)


@lru_cache
def _hadamard(size: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)
