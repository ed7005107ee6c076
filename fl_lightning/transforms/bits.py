"""Numbers of a few bits and sorted indices, packed and unpacked without a loop over elements.

Everything works on chunks that fit in a processor's cache: a fresh page of memory costs more than the arithmetic on it.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fl_lightning.transforms.errors import PayloadError

__all__ = [
    "CHUNK",
    "Array",
    "index_bits",
    "indices_length",
    "pack_bits",
    "pack_indices",
    "pack_wide",
    "unpack_bits",
    "unpack_indices",
    "unpack_wide",
]

Array: TypeAlias = NDArray[Any]
CHUNK = 1 << 18
"""Elements that are worked on at once; a multiple of every power of two up to itself."""


def pack_bits(codes: Array, bits: int) -> Array:
    """Return codes of ``bits`` bits as ``bits * ceil(n / 8)`` bytes.

    Up to eight bits a code begins where the one before it ends, as in a little-endian number. Above eight bits the low
    bytes of all codes come first, then the rests, packed.

    Args:
        codes: unsigned integers below ``2 ** bits``, in one dimension.
        bits: 1 to 16.

    Example:
        >>> packed = pack_bits(np.array([1, 0, 3, 2, 1]), 2)
        >>> packed.tolist(), unpack_bits(packed, 2, 5).tolist()
        ([177, 1], [1, 0, 3, 2, 1])
    """
    if bits > 8:
        return np.concatenate([_filled(codes & 255), pack_bits(codes >> 8, bits - 8)])
    filled = _filled(codes)
    if bits == 8:
        return filled
    packed = np.empty(bits * len(filled) // 8, np.uint8)
    for begin in range(0, len(filled), CHUNK):
        piece = filled[begin : begin + CHUNK]
        packed[bits * begin // 8 : bits * (begin + len(piece)) // 8] = _narrowed(piece, bits)
    return packed


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
    if bits == 8:
        return data[:num]
    if bits > 8:
        cut = 8 * -(-num // 8)
        rest: Array = unpack_bits(data[cut:], bits - 8, num).astype(np.uint16)
        both: Array = data[:num] | (rest << np.uint16(8))
        return both
    codes = np.empty(expected // bits * 8, np.uint8)
    for begin in range(0, len(codes), CHUNK):
        piece = codes[begin : begin + CHUNK]
        piece[:] = _widened(data[bits * begin // 8 : bits * (begin + len(piece)) // 8], bits)
    return codes[:num]


def _filled(codes: Array) -> Array:
    """Return codes as bytes in whole groups of eight."""
    groups = -(-len(codes) // 8)
    if len(codes) == groups * 8:
        same: Array = codes.astype(np.uint8, copy=False)
        return same
    filled = np.zeros(groups * 8, np.uint8)
    filled[: len(codes)] = codes
    return filled


def _narrowed(codes: Array, bits: int) -> Array:
    """Join neighbours in words of twice the width, until eight codes share a word or a byte is full."""
    if bits == 1:
        return np.packbits(codes, bitorder="little")
    if 8 % bits == 0:  # one product moves each code to its place in the uppermost byte, and nothing else reaches it
        width = 64 // bits
        words = codes.view(f"<u{width // 8}")
        factor = sum(1 << (width - 8) - (8 - bits) * index for index in range(8 // bits))
        words = words * words.dtype.type(factor)
        words >>= words.dtype.type(width - 8)
        bytewise: Array = words.astype(np.uint8)
        return bytewise
    held, words = bits, codes
    for width in (16, 32, 64):
        words = words.view(f"<u{width // 8}")
        low, word = (1 << held) - 1, words.dtype.type
        words = (words & word(low)) | ((words >> word(width // 2 - held)) & word(low << held))
        held *= 2
        if held == 8:
            full: Array = words.astype(np.uint8)
            return full
    packed: Array = words.view(np.uint8).reshape(-1, 8)[:, :bits].reshape(-1)
    return packed


def _widened(data: Array, bits: int) -> Array:
    if bits == 1:
        return np.unpackbits(data, bitorder="little")
    if 8 % bits:
        filled = np.zeros((len(data) // bits, 8), np.uint8)
        filled[:, :bits] = data.reshape(-1, bits)
        width, words = 64, filled.reshape(-1).view("<u8")
    else:
        width = 64 // bits
        words = data.astype(f"<u{width // 8}")
    while width > 8:
        held = bits * width // 16  # in each half
        low, word = (1 << held) - 1, words.dtype.type
        if 8 % bits == 0:  # what is shifted does not meet the lower codes
            words |= words << word(width // 2 - held)
            words &= word(low | low << width // 2)
        else:
            words = (words & word(low)) | ((words << word(width // 2 - held)) & word(low << width // 2))
        width //= 2
        words = words.view(f"<u{width // 8}")
    return words


def index_bits(num: int, total: int) -> int | None:
    """Return the low bits that Elias-Fano coding keeps of each index, or ``None`` where a bitmap is smaller."""
    best = min(range(max(total, 1).bit_length()), key=lambda low: _coded_length(num, total, low))
    return best if _coded_length(num, total, best) < -(-total // 8) else None


def indices_length(num: int, total: int) -> int:
    """Return how many bytes :func:`pack_indices` takes for ``num`` indices below ``total``."""
    low = index_bits(num, total)
    return -(-total // 8) if low is None else _coded_length(num, total, low)


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
    parts = [pack_wide(indices & ((1 << low) - 1), low), np.packbits(high, bitorder="little")]
    return np.concatenate(parts)


def unpack_indices(data: Array, num: int, total: int) -> Array:
    """Undo :func:`pack_indices` for ``num`` indices below ``total``.

    Raises:
        PayloadError: when ``data`` does not hold that many strictly increasing indices.
    """
    low, expected = index_bits(num, total), indices_length(num, total)
    if data.dtype != np.uint8 or data.shape != (expected,):
        raise PayloadError(f"expected {expected} bytes for {num} of {total} indices, got {data.size} of {data.dtype}")
    if low is None:
        indices = np.flatnonzero(np.unpackbits(data, bitorder="little"))
    else:
        cut = low * -(-num // 8)
        ones = np.flatnonzero(np.unpackbits(data[cut:], bitorder="little"))
        if len(ones) != num:
            raise PayloadError(f"expected {num} indices, got {len(ones)}")
        indices = ((ones - np.arange(num)) << low) | unpack_wide(data[:cut], low, num)
    if len(indices) != num or (num and (indices[-1] >= total or bool((np.diff(indices) <= 0).any()))):
        raise PayloadError(f"expected {num} increasing indices below {total}, and they are not")
    return indices


def pack_wide(values: Array, bits: int) -> Array:
    """Return integers of any width as bytes."""
    parts = [pack_bits((values >> first) & 0xFFFF, min(16, bits - first)) for first in range(0, bits, 16)]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint8)


def unpack_wide(data: Array, bits: int, num: int) -> Array:
    """Undo :func:`pack_wide` for ``num`` integers.

    Raises:
        PayloadError: when ``data`` is too short.
    """
    values, place = np.zeros(num, np.int64), 0
    for first in range(0, bits, 16):
        width = min(16, bits - first)
        size = width * -(-num // 8)
        values |= unpack_bits(data[place : place + size], width, num).astype(np.int64) << first
        place += size
    return values
