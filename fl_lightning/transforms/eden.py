"""A random rotation before quantisation, so that one bit per element is unbiased at little variance."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fl_lightning.transforms.base import Exchange, Transform, TreeTransform
from fl_lightning.transforms.bits import Array, pack_bits, unpack_bits
from fl_lightning.transforms.draws import Draws
from fl_lightning.transforms.errors import PayloadError
from fl_lightning.transforms.rotation import BLOCK, Rotation
from fl_lightning.transforms.vectors import as_tensor, bytes_of, flat, sealed_array
from fl_lightning.types import Memory, Tree

__all__ = ["Eden", "lloyd_max"]


class Eden(TreeTransform):
    r"""Rotates at random, rounds to the best levels for a normal distribution, and rescales so that the mean is right.

    .. math:: z = H D x, \qquad C(x) = \frac{\lVert x \rVert^2}{\langle z, q(z) \rangle}\, D H\, q(z), \qquad
        \frac{\mathbb{E} \lVert C(x) - x \rVert^2}{\lVert x \rVert^2} \approx \frac{1}{1 - D_b} - 1

    :math:`H` is the orthonormal Hadamard matrix on blocks of 1024 elements, :math:`D` random signs from the seed,
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
        arrays, draws = flat(tree), exchange.draws()
        rotation = Rotation(draws, max(map(len, arrays), default=0))
        codes = np.empty(sum(_num_codes(len(array)) for array in arrays), np.uint8)
        sums, place = [(np.zeros(0),) * 3], 0
        for array in arrays:
            for (begin, end), shape in Rotation.pieces(len(array)):
                rotated = rotation.apply(array[begin:end], shape)
                code = codes[place : place + math.prod(shape)]
                sums.append(self._quantized(rotated, rotation.scratch(shape), code))
                place += len(code)
        squares, levels, product = (np.concatenate(each) for each in zip(*sums, strict=True))
        # the product is positive unless all of a block is zero
        with np.errstate(divide="ignore", invalid="ignore"):
            scales = np.where(squares > 0, squares / product if self.unbiased else product / levels, 0)
        return {}, [as_tensor(_short(scales, draws)), as_tensor(pack_bits(codes, self.bits))], None

    def decode_tree(self, opened: Tree, sealed: Any, exchange: Exchange, template: Tree) -> Tree:
        if not isinstance(sealed, list) or len(sealed) != 2:
            raise PayloadError("expected scales and codes")
        sizes = [tensor.numel() for tensor in template.values()]
        num_scales = sum(shape[1] for size in sizes for _, shape in Rotation.pieces(size))
        scales = _long(sealed_array(sealed[0], num_scales, torch.int16))
        num_codes = sum(map(_num_codes, sizes))
        rotation, packed = Rotation(exchange.draws(), max(sizes, default=0)), bytes_of(sealed[1])
        codes = unpack_bits(packed, self.bits, num_codes) if self.bits > 1 else _checked(packed, num_codes)
        tree: dict[str, Tensor] = {}
        first = place = 0
        for (name, like), size in zip(template.items(), sizes, strict=True):
            dense = np.empty(size, np.float32)
            for (begin, end), shape in Rotation.pieces(size):
                num, scale, out = math.prod(shape), scales[first : first + shape[1]], dense[begin:end]
                if self.bits == 1 and place % 8 == 0 and num == end - begin and num % BLOCK == 0:
                    one = float(lloyd_max(1)[1])
                    rotation.undo_signs(packed[place // 8 : (place + num) // 8], scale.numpy() * one, shape, out)
                else:
                    code = codes[place : place + num] if self.bits > 1 else _bits(packed, place, num)
                    self._levels(code, scale, rotation.blank(shape))
                    rotation.undo(shape, out)
                first, place = first + shape[1], place + num
            tree[name] = torch.from_numpy(dense).reshape(like.shape).to(like.dtype)
        return tree

    def _levels(self, codes: Array, scales: Tensor, out: Tensor) -> None:
        levels, code = torch.from_numpy(lloyd_max(self.bits)), torch.from_numpy(codes)
        torch.index_select(levels, 0, code.int(), out=out.view(-1))
        out *= scales[:, None]

    def contraction(self) -> Transform:
        return Eden(self.bits, unbiased=False)

    def _quantized(self, rotated: Tensor, scratch: Tensor, codes: Array) -> tuple[Array, Array, Array]:
        """Write the codes of rotated blocks; return their squares, those of their levels, and the product of both."""
        levels, dim = lloyd_max(self.bits), rotated[:, 0].numel()
        squares = _sums(np.square(rotated.numpy(), out=scratch.numpy()))
        if self.bits == 1:
            np.greater_equal(rotated.numpy(), 0, out=codes.view(np.bool_).reshape(rotated.shape))
            product = _sums(np.abs(rotated.numpy(), out=scratch.numpy())) * levels[1]
            return squares, np.full(len(squares), dim * levels[1] ** 2), product
        deviation = np.sqrt(np.where(squares > 0, squares, 1) / dim).astype(np.float32)
        standard = torch.div(rotated, torch.from_numpy(deviation)[:, None], out=scratch)
        cell = torch.zeros(rotated.shape, dtype=torch.uint8)
        for boundary in (levels[1:] + levels[:-1]) / 2:  # counting up to 15 of them is faster than searching
            cell += standard >= boundary
        np.copyto(codes, cell.view(-1).numpy())
        level = torch.index_select(torch.from_numpy(levels), 0, cell.view(-1).int()).view(rotated.shape)
        return squares, _sums((level * level).numpy()), _sums((rotated * level).numpy())


def _sums(values: Array) -> Array:
    """Return the sum of each block, given ``(left, blocks, right)``, in float64."""
    rows = np.add.reduce(values, axis=0)
    sums: Array = (rows @ np.ones(values.shape[2], np.float32)).astype(np.float64)  # faster than a sum of short rows
    return sums


def _num_codes(size: int) -> int:
    return sum(math.prod(shape) for _, shape in Rotation.pieces(size))


def _checked(packed: Array, num: int) -> Array:
    if len(packed) != -(-num // 8):
        raise PayloadError(f"expected {-(-num // 8)} bytes for {num} codes of 1 bit, got {len(packed)}")
    return packed


def _bits(packed: Array, begin: int, num: int) -> Array:
    """Return some of many bits."""
    few = np.unpackbits(packed[begin // 8 : -(-(begin + num) // 8)], bitorder="little")
    return few[begin % 8 : begin % 8 + num]


def _short(scales: Array, draws: Draws) -> Array:
    """Return the upper halves of float32, rounded at random: a block is short, and a scale of four bytes would show."""
    words = scales.astype(np.float32).view(np.uint32) + draws.shorts(len(scales))
    return (words >> 16).astype(np.uint16).view(np.int16)


def _long(halves: Array) -> Tensor:
    scales = (halves.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if not np.isfinite(scales).all():
        raise PayloadError("expected finite scales, got NaN or infinity")
    return torch.from_numpy(scales)


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
