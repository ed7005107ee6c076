"""A few integers among many zeros, coded in blocks that adapt to how many they are and how large."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fl_lightning.transforms.bits import Array, indices_length, pack_indices, pack_wide, unpack_indices, unpack_wide
from fl_lightning.transforms.errors import PayloadError

__all__ = ["pack_sparse", "unpack_sparse"]

_FIRST = 256
_MOST = 24


def pack_sparse(places: Array, values: Array, total: int) -> tuple[list[int], list[int], Array]:
    """Return the non-zeros of a vector as counts and Rice parameters of its blocks, and bytes.

    A block is half again as long as the one before it. Its places are Elias-Fano coded or a bitmap; of a magnitude less
    one, the low ``p`` bits travel as they are and the rest in unary.

    Args:
        places: strictly increasing, below ``total``.
        values: what stands there, not zero, below ``2 ** 24`` in magnitude.
        total: length of the vector.

    Example:
        >>> counts, powers, data = pack_sparse(np.array([2, 3, 400]), np.array([5, -1, 1]), 1000)
        >>> counts, powers, len(data)
        ([2, 1], [1, 0], 17)
        >>> [part.tolist() for part in unpack_sparse(counts, powers, data, 1000)]
        [[2, 3, 400], [5, -1, 1]]
    """
    bounds = _bounds(total)
    cuts = np.searchsorted(places, bounds)
    counts = np.diff(cuts)
    counts = counts[: int(np.flatnonzero(counts)[-1]) + 1] if len(places) else counts[:0]
    extra = np.abs(values) - 1
    powers, streams, quotients = [], [], [extra[:0]]
    for block in range(len(counts)):
        own = slice(cuts[block], cuts[block + 1])
        power = _power(extra[own])
        powers.append(power)
        streams.append(pack_indices(places[own] - bounds[block], bounds[block + 1] - bounds[block]))
        streams.append(pack_wide(extra[own] & ((1 << power) - 1), power))
        quotients.append(extra[own] >> power)
    ends = np.cumsum(np.concatenate(quotients) + 1)
    unary = np.zeros(int(ends[-1]) if len(ends) else 0, np.bool_)
    unary[ends - 1] = True
    tail = [np.packbits(values < 0, bitorder="little"), np.packbits(unary, bitorder="little")]
    return counts.tolist(), powers, np.concatenate([*streams, *tail])


def unpack_sparse(counts: Sequence[int], powers: Sequence[int], data: Array, total: int) -> tuple[Array, Array]:
    """Undo :func:`pack_sparse`.

    Raises:
        PayloadError: when the bytes do not hold such a vector.
    """
    bounds = _bounds(total)
    _check(counts, powers, bounds)
    where, low, cut = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for block, (count, power) in enumerate(zip(counts, powers, strict=True)):
        size = bounds[block + 1] - bounds[block]
        length, width = indices_length(count, size), power * -(-count // 8)
        where.append(unpack_indices(data[cut : cut + length], count, size) + bounds[block])
        low.append(unpack_wide(data[cut + length : cut + length + width], power, count))
        cut += length + width
    num = sum(counts)
    signs, unary = data[cut : cut + -(-num // 8)], data[cut + -(-num // 8) :]
    ends = np.flatnonzero(np.unpackbits(unary, bitorder="little"))
    if len(signs) != -(-num // 8) or len(ends) != num or len(unary) != (-(-(int(ends[-1]) + 1) // 8) if num else 0):
        raise PayloadError(f"expected {num} magnitudes and signs, got {len(ends)} in {len(unary)} bytes")
    quotients = np.diff(ends, prepend=-1) - 1
    values = 1 + ((quotients << np.repeat(np.asarray(powers, np.int64), counts)) | np.concatenate(low))
    negative = np.unpackbits(signs, bitorder="little")[:num].astype(np.bool_)
    return np.concatenate(where), np.where(negative, -values, values)


def _check(counts: Sequence[int], powers: Sequence[int], bounds: Sequence[int]) -> None:
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in [*counts, *powers])
    if not whole or len(counts) != len(powers) or len(counts) >= len(bounds) or max(powers, default=0) > _MOST:
        raise PayloadError(f"expected a count and a power below {_MOST} for each of at most {len(bounds) - 1} blocks")
    for block, count in enumerate(counts):
        size = bounds[block + 1] - bounds[block]
        if count > size:
            raise PayloadError(f"expected at most {size} values in block {block}, got {count}")


def _bounds(total: int) -> list[int]:
    bounds, size = [0], _FIRST
    while bounds[-1] < total:
        bounds.append(min(bounds[-1] + size, total))
        size += size // 2
    return bounds


def _power(extra: Array) -> int:
    """Return the number of low bits that makes the code of these numbers shortest, or nearly."""
    if not len(extra):
        return 0
    near = int(extra.mean()).bit_length()
    return min((max(near - 1, 0), near), key=lambda power: len(extra) * power + int((extra >> power).sum()))
