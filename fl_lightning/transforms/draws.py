"""Random numbers that server and client draw alike from a seed."""

from __future__ import annotations

import math

import numpy as np

from fl_lightning.transforms.bits import CHUNK, Array

__all__ = ["Dither", "Draws"]


def _different(values: Array) -> Array:
    """Return sorted values, each once; several times as fast as NumPy's own, which keeps account of more."""
    values = np.sort(values)
    first: Array = np.ones(len(values), np.bool_)
    np.not_equal(values[1:], values[:-1], out=first[1:])
    return values[first]


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

    def shorts(self, num: int) -> Array:
        """Return integers of 16 bits."""
        words: Array = self._source.random_raw(-(-num // 4)).view(np.uint16)[:num]
        return words

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
        different = np.zeros(0, np.uint64)
        wanted = num + num * num // max(total, 1) + 5 * math.isqrt(num) + 16  # integers, so that both sides agree
        while len(different) < num:  # as many draws hold enough different ones, but for a chance that the loop covers
            more: Array = self._source.random_raw(wanted) % np.uint64(max(total, 1))
            different = _different(np.concatenate([different, more]))
        # whatever their number is, every set of that many is equally likely; so is every part of it
        if num < len(different):
            kept = np.argpartition(self._source.random_raw(len(different)), num)[:num]
            different = np.sort(different[kept])
        return different.astype(np.int64)


class Dither:
    """Random thresholds of a few bits, any two of which are independent, for one exclusive-or each.

    A table of random numbers serves every chunk of elements, each time combined with another random number. Each
    threshold is then uniform, and any two are independent, so mean and variance of what is rounded with them, and of
    any sum of it, are those of independent thresholds; only products of three or more could tell the difference.
    Drawing ten million numbers anew takes as long as everything else in quantisation.

    What is combined are the bits behind the point of float32 between ``base`` and ``base + 1``, so that no threshold
    is ever converted. Where there is a bit left, thresholds stand in the middle of their part of ``2 ** -bits``.

    Args:
        draws: where the numbers come from.
        bits: of a threshold, 1 to 16.
        base: what is added to thresholds in [0, 1), a power of two of at least one; it leaves 23 bits behind the point
            of one, 22 behind that of two, and so on.
        most: the largest number of elements that will come; it bounds the table, which has ``CHUNK`` at most.

    Example:
        >>> thresholds = Dither(Draws(0), bits=8, base=4)
        >>> out = np.empty(4, np.float32)
        >>> thresholds.fill(out)
        >>> bool(4 <= out.min() <= out.max() < 5)
        True
    """

    def __init__(self, draws: Draws, bits: int, base: int = 1, most: int = CHUNK) -> None:
        behind = 24 - base.bit_length()
        self._draws, self._bits, self._place = draws, bits, behind - bits
        middle = 1 << (self._place - 1) if self._place else 0
        fixed = int(np.float32(base).view(np.int32)) | middle
        self._table = (
            (draws.shorts(min(most, CHUNK)).astype(np.int32) >> np.int32(16 - bits)) << self._place
        ) | np.int32(fixed)

    def fill(self, out: Array) -> None:
        """Write base and the thresholds of the next elements, at most ``CHUNK`` of them, into a float32 array."""
        constant = np.int32(int(self._draws.shorts(1)[0]) >> (16 - self._bits) << self._place)
        np.bitwise_xor(self._table[: len(out)], constant, out=out.view(np.int32))
