"""A random rotation before quantisation, so that one bit per element is unbiased at little variance."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fl_lightning.transforms.base import Exchange, Transform, TreeTransform, num_elements
from fl_lightning.transforms.bits import CHUNK, Array, pack_bits, unpack_bits
from fl_lightning.transforms.errors import PayloadError
from fl_lightning.transforms.vectors import as_tensor, bytes_of, joined, sealed_array, split
from fl_lightning.types import Memory, Tree

__all__ = ["Eden", "lloyd_max"]

_BLOCK = 4096


class Eden(TreeTransform):
    r"""Rotates at random, rounds to the best levels for a normal distribution, and rescales so that the mean is right.

    .. math:: z = H D x, \qquad C(x) = \frac{\lVert x \rVert^2}{\langle z, q(z) \rangle}\, D H\, q(z), \qquad
        \frac{\mathbb{E} \lVert C(x) - x \rVert^2}{\lVert x \rVert^2} \approx \frac{1}{1 - D_b} - 1

    :math:`H` is the orthonormal Hadamard matrix on blocks of 4096 elements, :math:`D` random signs from the seed,
    :math:`q` the Lloyd-Max quantiser of :math:`2^b` levels and :math:`D_b` its distortion on a normal variable
    (.3634, .1175, .0345, .0095 for one to four bits). One bit is DRIVE, with an error of
    :math:`\pi/2 - 1 = .571` whatever the dimension; that of plain stochastic rounding to one bit grows with it.

    Args:
        bits: of a code, 1 to 4.
        unbiased: scale as above; ``False`` takes the scale of least error, which is what error feedback takes.

    Raises:
        MisconfigurationException: for bits outside 1 to 4.

    Example:
        >>> transform, exchange = Eden(bits=1), Exchange(seed=0, round=0, client_id="a")
        >>> update = {"w": torch.tensor([4.0, 0.0, 0.0, 0.0])}
        >>> opened, sealed, _ = transform.encode_tree(update, exchange, {})
        >>> transform.decode_tree(opened, sealed, exchange, update)["w"].round().abs().tolist()
        [4.0, 0.0, 0.0, 0.0]

    References:
        Vargaftik et al., *DRIVE: One-bit Distributed Mean Estimation*, 2021, and *EDEN: Communication-Efficient and
        Robust Distributed Mean Estimation*, 2022. The mean is exact for a uniformly random rotation; with Hadamard's
        it is so up to what the papers measure, and for a vector with a few large elements it can be off.
    """

    def __init__(self, bits: int = 1, unbiased: bool = True) -> None:
        if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 4:
            raise MisconfigurationException(
                f"Eden expected bits to be an integer from 1 to 4, got {bits!r}. For more bits "
                "write Quantize(bits=...), which needs no rotation."
            )
        self.bits, self.unbiased = bits, unbiased

    def encode_tree(self, tree: Tree, exchange: Exchange, memory: Memory) -> tuple[Tree, Any, Memory | None]:
        vector = joined(tree)
        draws, centroids = exchange.draws(), lloyd_max(self.bits)
        boundaries = (centroids[1:] + centroids[:-1]) / 2
        codes, scales = [], []
        for begin, size, dim in _blocks(len(vector)):
            rows = _padded(vector[begin : begin + size], dim)
            rotated = _rotate(rows * draws.signs(rows.size).reshape(rows.shape))
            squares = np.square(rows, dtype=np.float64).sum(axis=1)
            deviation = np.sqrt(np.where(squares > 0, squares, 1) / dim).astype(np.float32)
            code = _cells(rotated / deviation[:, None], boundaries)
            level = centroids[code]
            product = (rotated * level).sum(axis=1, dtype=np.float64)
            if self.unbiased:
                scale = squares / np.where(product > 0, product, 1)
            else:
                scale = product / np.square(level, dtype=np.float64).sum(axis=1)
            scales.append(np.where(squares > 0, scale, 0))
            codes.append(code.reshape(-1))
        packed = pack_bits(np.concatenate(codes), self.bits)
        return {}, [as_tensor(np.concatenate(scales).astype(np.float32)), as_tensor(packed)], None

    def decode_tree(self, opened: Tree, sealed: Any, exchange: Exchange, template: Tree) -> Tree:
        num = num_elements(template)
        blocks = list(_blocks(num))
        counts = [-(-size // dim) for _, size, dim in blocks]
        if not isinstance(sealed, list) or len(sealed) != 2:
            raise PayloadError("expected scales and codes")
        scales = sealed_array(sealed[0], sum(counts), torch.float32)
        padded = sum(count * dim for count, (_, _, dim) in zip(counts, blocks, strict=True))
        codes = unpack_bits(bytes_of(sealed[1]), self.bits, padded)
        draws, centroids = exchange.draws(), lloyd_max(self.bits)
        vector = np.empty(num, np.float32)
        first = place = 0
        for (begin, size, dim), count in zip(blocks, counts, strict=True):
            level = centroids[codes[place : place + count * dim]].reshape(count, dim)
            rows = _rotate(level * scales[first : first + count, None])
            rows *= draws.signs(rows.size).reshape(rows.shape)
            vector[begin : begin + size] = rows.reshape(-1)[:size]
            first, place = first + count, place + count * dim
        return split(vector, template)

    def contraction(self) -> Transform:
        return Eden(self.bits, unbiased=False)


def _blocks(num: int) -> Iterator[tuple[int, int, int]]:
    """Yield begin, size and dimension of what is rotated at once: whole blocks, and a smaller one for the rest."""
    whole = num // _BLOCK * _BLOCK
    for begin in range(0, whole, CHUNK):
        yield begin, min(CHUNK, whole - begin), _BLOCK
    if whole < num:
        yield whole, num - whole, 1 << (num - whole - 1).bit_length()


def _cells(values: Array, boundaries: Array) -> Array:
    """Return how many boundaries lie at or below each value; counting up to 15 of them is faster than searching."""
    code = np.zeros(values.shape, np.uint8)
    for boundary in boundaries:
        code += values >= boundary
    return code


def _padded(vector: Array, dim: int) -> Array:
    rows = -(-len(vector) // dim)
    filled = np.zeros(rows * dim, np.float32)
    filled[: len(vector)] = vector
    return filled.reshape(rows, dim)


def _rotate(rows: Array) -> Array:
    """Multiply each row by the orthonormal Hadamard matrix, as two products with matrices of its root's size."""
    power = rows.shape[1].bit_length() - 1
    left, right = _hadamard(power // 2), _hadamard(power - power // 2)
    cube = torch.from_numpy(rows.astype(np.float32)).view(len(rows), len(left), len(right))
    rotated: Array = (left @ (cube @ right)).reshape(rows.shape).numpy()
    return rotated


@lru_cache
def _hadamard(power: int) -> Tensor:
    matrix = torch.ones(1, 1)
    for _ in range(power):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(len(matrix))


@lru_cache
def lloyd_max(bits: int) -> Array:
    """Return the levels of least squared error for a standard normal variable, as float32.

    Args:
        bits: 1 to 4.

    Example:
        >>> lloyd_max(2).round(4).tolist()
        [-1.5104..., -0.4528..., 0.4528..., 1.5104...]

    References:
        Max, *Quantizing for Minimum Distortion*, 1960, table I.
    """
    levels = np.linspace(-2.0, 2.0, 2**bits)
    for _ in range(3000):  # each level moves to the mean of its cell; 16 levels need about 2000 moves
        edges = [-math.inf, *((levels[1:] + levels[:-1]) / 2), math.inf]
        density = np.array([math.exp(-(e**2) / 2) / math.sqrt(2 * math.pi) if math.isfinite(e) else 0.0 for e in edges])
        below = np.array([math.erf(e / math.sqrt(2)) / 2 if math.isfinite(e) else math.copysign(0.5, e) for e in edges])
        levels = -np.diff(density) / np.diff(below)
    levels = (levels - levels[::-1]) / 2
    return levels.astype(np.float32)
