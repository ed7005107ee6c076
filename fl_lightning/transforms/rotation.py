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

__all__ = ["BLOCK", "Rotation"]

_LEFT, _RIGHT = 64, 16
BLOCK = _LEFT * _RIGHT
"""Elements that are rotated together; a vector's rest is rotated in a block of the next power of two."""
_PIECE = CHUNK


class Rotation:
    r"""Multiplies blocks by :math:`H D`, or undoes it with :math:`D H`.

    Pieces of at most ``CHUNK`` elements are seen as an array of shape ``(left, blocks, right)``, so that a block is
    spread over the piece and :math:`H = H_{left} \otimes H_{right}` takes one product of matrices for each side, whose
    other dimension is long; on a side of 64, a product with 16 and two rounds of sums and differences. The signs
    :math:`D` of different elements of a piece are independent; every piece has the same ones. What is returned lies in
    memory that the next call overwrites.

    Args:
        draws: where the signs come from; the same ones rotate and rotate back.
        most: the largest number of elements of a tensor; it bounds the memory.

    Example:
        >>> rotation, x = Rotation(Draws(0), 1500), np.arange(1500, dtype=np.float32)
        >>> back = np.empty_like(x)
        >>> for (begin, end), shape in Rotation.pieces(1500):
        ...     _ = rotation.blank(shape).copy_(rotation.apply(x[begin:end], shape).clone())
        ...     rotation.undo(shape, back[begin:end])
        >>> bool(np.allclose(back, x, atol=1e-2)), [shape for _, shape in Rotation.pieces(1500)]
        (True, [(64, 1, 16), (16, 1, 32)])
    """

    def __init__(self, draws: Draws, most: int) -> None:
        size = min(_PIECE, -(-most // BLOCK) * BLOCK)
        self._signs = draws.signs(size)
        self._first, self._second = np.empty(size, np.float32), np.empty(size, np.float32)

    @staticmethod
    def pieces(num: int) -> Iterator[tuple[tuple[int, int], tuple[int, int, int]]]:
        """Yield begin and end of each piece and its shape: whole blocks, and one of the next power of two for the rest.

        Args:
            num: elements altogether.
        """
        whole = num // BLOCK * BLOCK
        for begin in range(0, whole, _PIECE):
            end = min(begin + _PIECE, whole)
            yield (begin, end), (_LEFT, (end - begin) // BLOCK, _RIGHT)
        if whole < num:
            power = (num - whole - 1).bit_length()
            yield (whole, num), (1 << power // 2, 1, 1 << (power - power // 2))

    def apply(self, values: Array, shape: tuple[int, int, int]) -> Tensor:
        """Return a piece rotated; zeros fill up what is short of a block."""
        first = self._first[: math.prod(shape)]
        if len(values) < len(first):
            first.fill(0)
        np.multiply(values, self._signs[: len(values)], out=first[: len(values)], casting="same_kind")
        return torch.from_numpy(self._product(shape)).view(shape)

    def blank(self, shape: tuple[int, int, int]) -> Tensor:
        """Return where to write a piece that :meth:`undo` rotates back."""
        return torch.from_numpy(self._first[: math.prod(shape)]).view(shape)

    def scratch(self, shape: tuple[int, int, int]) -> Tensor:
        """Return memory of a piece's size for what is computed from a piece that :meth:`apply` returned."""
        return torch.from_numpy(self._second[: math.prod(shape)]).view(shape)

    def undo(self, shape: tuple[int, int, int], out: Array) -> None:
        """Write the piece that stands in :meth:`blank` rotated back, without what filled it up."""
        rotated = self._product(shape)[: len(out)]
        np.multiply(rotated, self._signs[: len(out)], out=out)

    def undo_signs(self, packed: Array, scales: Array, shape: tuple[int, int, int], out: Array) -> None:
        """Write a piece of plus and minus one, times the scale of its block, rotated back.

        A table has the Hadamard transform of each eight of them, and sums of ones are small integers, so this takes
        half the time of :meth:`undo`.

        Args:
            packed: a bit for each element, as :func:`~fl_lightning.transforms.bits.pack_bits` has them.
            scales: of each block.
            shape: of a piece of whole blocks.
            out: where the elements go.
        """
        left, blocks, right = shape
        pairs = np.empty((len(packed) // 2, 2), np.uint64)
        one, other = (np.take(_eights(), packed[side::2], mode="clip").view(np.int8) for side in (0, 1))
        pairs[:, 0], pairs[:, 1] = (one + other).view(np.uint64), (one - other).view(np.uint64)
        sums = pairs.view(np.int8).reshape(-1)  # at most 16 in magnitude
        sums = _summed(_summed(sums, blocks * right * 32), blocks * right * 16).astype(np.int16)
        spare = np.empty_like(sums)
        for run in (8, 4, 2, 1):
            spare, sums = sums, _summed(sums, blocks * right * run, spare)
        first = self._first[: len(sums)]
        np.copyto(first, sums)
        rows = first.reshape(left, -1)
        rows *= np.repeat(scales.astype(np.float32) / np.float32(math.sqrt(BLOCK)), right)
        np.multiply(first, self._signs[: len(out)], out=out)

    def _product(self, shape: tuple[int, int, int]) -> Array:
        left, blocks, right = shape
        first, second = (memory[: math.prod(shape)] for memory in (self._first, self._second))
        outer = left
        if left == _LEFT:
            outer, run = left // 4, blocks * right
            _summed(_summed(first, 2 * run, second), run, first)
        matrices = _hadamard(outer) / math.sqrt(left // outer), _hadamard(right)
        one, two = torch.from_numpy(first), torch.from_numpy(second)
        torch.mm(matrices[0], one.view(outer, -1), out=two.view(outer, -1))
        torch.mm(two.view(-1, right), matrices[1], out=one.view(-1, right))
        return first


def _summed(values: Array, run: int, out: Array | None = None) -> Array:
    """Return sums and differences of neighbouring runs of elements, in their places."""
    found: Array = np.empty_like(values) if out is None else out
    pairs, target = values.reshape(-1, 2, run), found.reshape(-1, 2, run)
    np.add(pairs[:, 0], pairs[:, 1], out=target[:, 0])
    np.subtract(pairs[:, 0], pairs[:, 1], out=target[:, 1])
    return found


@lru_cache
def _hadamard(size: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


@lru_cache
def _eights() -> Array:
    """Return the transform of the signs that the bits of each byte stand for, eight integers of a byte in one."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    matrix = (_hadamard(8).numpy() * math.sqrt(8)).round().astype(np.int8)
    products: Array = np.ascontiguousarray((2 * bits.astype(np.int8) - 1) @ matrix)
    return products.view(np.uint64)[:, 0]
