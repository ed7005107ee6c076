"""Numbers of a few bits, sorted indices and random draws, packed and unpacked without a loop over elements.

Everything works on chunks that fit in a processor's cache: a fresh page of memory costs more than the arithmetic on it.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fl_lightning.transforms.errors import PayloadError

__all__ = ["CHUNK", "Array", "Draws", "index_bits", "pack_bits", "pack_indices", "unpack_bits", "unpack_indices"]

Array: TypeAlias = NDArray[Any]
CHUNK = 1 << 16
"""Elements that are worked on at once; a multiple of every power of two up to itself."""
_WORD = np.dtype("<u8")


def pack_bits(codes: Array, bits: int) -> Array:
    """Return codes of ``bits`` bits as ``bits * ceil(n / 8)`` bytes.

    Eight codes share ``bits`` bytes. Above eight bits the low byte of each code comes first, then the packed rest.

    Args:
        codes: unsigned integers below ``2 ** bits``, in one dimension.
        bits: 1 to 16.

    Example:
        >>> packed = pack_bits(np.array([1, 0, 3, 2, 1]), 2)
        >>> len(packed), unpack_bits(packed, 2, 5).tolist()
        (2, [1, 0, 3, 2, 1])
    """
    parts = [_pack(codes[begin : begin + CHUNK], bits) for begin in range(0, len(codes), CHUNK)]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint8)


def unpack_bits(data: Array, bits: int, num: int) -> Array:
    """Undo :func:`pack_bits` for ``num`` codes.

    Returns:
        Codes in ``uint8`` up to eight bits, in ``uint16`` above.

    Raises:
        PayloadError: when ``data`` has another length than ``num`` codes have.
    """
    expected = bits * -(-num // 8)
    if data.dtype != np.uint8 or data.shape != (expected,):
        raise PayloadError(f"expected {expected} bytes for {num} codes of {bits} bits, got {data.size} of {data.dtype}")
    codes = np.empty(num, np.uint8 if bits <= 8 else np.uint16)
    for begin in range(0, num, CHUNK):
        size = min(CHUNK, num - begin)
        first = begin // 8 * bits
        codes[begin : begin + size] = _unpack(data[first : first + bits * -(-size // 8)], bits)[:size]
    return codes


def _pack(codes: Array, bits: int) -> Array:
    groups = -(-len(codes) // 8)
    if len(codes) < groups * 8:
        codes = np.concatenate([codes, np.zeros(groups * 8 - len(codes), codes.dtype)])
    if bits == 8:
        return codes.astype(np.uint8)
    if bits > 8:
        rest = codes >> 8
        return np.concatenate([(codes & 255).astype(np.uint8), _pack(rest, bits - 8)])
    rows = codes.reshape(8, groups)  # a row is contiguous, so shifts run at the speed of memory
    words = rows[0].astype(_WORD)
    for position in range(1, 8):
        words |= rows[position].astype(_WORD) << np.uint64(position * bits)
    packed: Array = words.view(np.uint8).reshape(groups, 8)[:, :bits].reshape(-1)
    return packed


def _unpack(data: Array, bits: int) -> Array:
    if bits == 8:
        return data
    if bits > 8:
        count = len(data) // bits * 8
        return data[:count].astype(np.uint16) | (_unpack(data[count:], bits - 8).astype(np.uint16) << 8)
    groups = len(data) // bits
    filled = np.zeros((groups, 8), np.uint8)
    filled[:, :bits] = data.reshape(groups, bits)
    words = filled.view(_WORD).reshape(-1)
    rows = np.empty((8, groups), np.uint8)
    mask = np.uint64(2**bits - 1)
    for position in range(8):
        rows[position] = (words >> np.uint64(position * bits)) & mask
    return rows.reshape(-1)


def index_bits(num: int, total: int) -> int | None:
    """Return the low bits that Elias-Fano coding keeps of each index, or ``None`` where a bitmap is smaller."""
    best = min(range(max(total, 1).bit_length()), key=lambda low: _coded_length(num, total, low))
    return best if _coded_length(num, total, best) < -(-total // 8) else None


def _coded_length(num: int, total: int, low: int) -> int:
    return low * -(-num // 8) + -(-(num + (total >> low) + 1) // 8)


def pack_indices(indices: Array, total: int) -> Array:
    r"""Return sorted indices below ``total`` as bytes: Elias-Fano coded, or a bitmap where that is smaller.

    Elias-Fano keeps the low :math:`l` bits of each index as they are and the rest as a bit vector with one bit for each
    index and one for each step of :math:`2^l`. With :math:`l = \log_2(n / k)` it takes about :math:`2 + \log_2(n / k)`
    bits an index, less than half a bit above what any code of :math:`k` out of :math:`n` needs.

    Args:
        indices: strictly increasing integers.
        total: what they are below.

    Example:
        >>> indices = np.array([3, 70, 71, 9_000])
        >>> len(pack_indices(indices, 10_000)), unpack_indices(pack_indices(indices, 10_000), 4, 10_000).tolist()
        (12, [3, 70, 71, 9000])

    References:
        Elias, *Efficient Storage and Retrieval by Content and Address of Static Files*, 1974.
    """
    low = index_bits(len(indices), total)
    if low is None:
        bitmap = np.zeros(total, np.bool_)
        bitmap[indices] = True
        return np.packbits(bitmap, bitorder="little")
    high = np.zeros(len(indices) + (total >> low) + 1, np.bool_)
    high[(indices >> low) + np.arange(len(indices))] = True
    parts = [_pack_wide(indices & ((1 << low) - 1), low), np.packbits(high, bitorder="little")]
    return np.concatenate(parts)


def unpack_indices(data: Array, num: int, total: int) -> Array:
    """Undo :func:`pack_indices` for ``num`` indices below ``total``.

    Raises:
        PayloadError: when ``data`` does not hold that many strictly increasing indices.
    """
    low = index_bits(num, total)
    expected = -(-total // 8) if low is None else _coded_length(num, total, low)
    if data.dtype != np.uint8 or data.shape != (expected,):
        raise PayloadError(f"expected {expected} bytes for {num} of {total} indices, got {data.size} of {data.dtype}")
    if low is None:
        indices = np.flatnonzero(np.unpackbits(data, bitorder="little"))
    else:
        cut = low * -(-num // 8)
        ones = np.flatnonzero(np.unpackbits(data[cut:], bitorder="little"))
        if len(ones) != num:
            raise PayloadError(f"expected {num} indices, got {len(ones)}")
        indices = ((ones - np.arange(num)) << low) | _unpack_wide(data[:cut], low, num)
    if len(indices) != num or (num and (indices[-1] >= total or bool((np.diff(indices) <= 0).any()))):
        raise PayloadError(f"expected {num} increasing indices below {total}, and they are not")
    return indices


def _pack_wide(values: Array, bits: int) -> Array:
    parts = [pack_bits((values >> first) & 0xFFFF, min(16, bits - first)) for first in range(0, bits, 16)]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint8)


def _unpack_wide(data: Array, bits: int, num: int) -> Array:
    values, place = np.zeros(num, np.int64), 0
    for first in range(0, bits, 16):
        width = min(16, bits - first)
        size = width * -(-num // 8)
        values |= unpack_bits(data[place : place + size], width, num).astype(np.int64) << first
        place += size
    return values


class Draws:
    """Random numbers that server and client draw alike from a seed, whatever their NumPy.

    NumPy keeps the raw stream of a bit generator fixed for ever, and of ``Generator``'s methods it does not promise it.

    Args:
        seed: as :meth:`fl_lightning.transforms.Exchange.draws` gives it.

    Example:
        >>> Draws(1).subset(3, 10).tolist() == Draws(1).subset(3, 10).tolist()
        True
    """

    def __init__(self, seed: int) -> None:
        self._source = np.random.SFC64(seed)

    def uniform(self, num: int) -> Array:
        """Return float32 in [0, 1), in multiples of ``2**-24``."""
        words: Array = self._source.random_raw(-(-num // 2)).view(np.uint32)[:num]
        return (words >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)

    def signs(self, num: int) -> Array:
        """Return float32 of -1 and +1."""
        words: Array = self._source.random_raw(-(-num // 64))
        return np.unpackbits(words.view(np.uint8))[:num].astype(np.float32) * np.float32(2) - np.float32(1)

    def subset(self, num: int, total: int) -> Array:
        """Return ``num`` of ``range(total)`` without replacement, sorted; every subset is equally likely."""
        if 2 * num > total:
            chosen = np.ones(total, np.bool_)
            chosen[self.subset(total - num, total)] = False
            return np.flatnonzero(chosen)
        drawn = np.zeros(0, np.int64)
        while True:  # twice as many as wanted hold enough different ones, but for a chance that the loop covers
            more: Array = self._source.random_raw(2 * num + 16) % np.uint64(max(total, 1))
            drawn = np.concatenate([drawn, more.astype(np.int64)])
            different, first = np.unique(drawn, return_index=True)
            if len(different) >= num:
                return np.sort(drawn[np.sort(first)[:num]])
