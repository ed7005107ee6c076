"""Equidistant levels: elements to codes, at random or to the nearest, and codes to elements."""

from __future__ import annotations

import numpy as np
import torch

from fl_lightning.transforms.bits import CHUNK, Array
from fl_lightning.transforms.draws import Dither, Draws

__all__ = ["Levels"]


class Levels:
    r"""Rounds pieces of at most ``CHUNK`` elements to the levels :math:`-s, \dots, s` times :math:`m / s`.

    .. math:: c_i = \left\lfloor \frac{s\,x_i}{m} + u_i \right\rfloor + s, \qquad
        u_i \sim U\{0, 2^{-f}, \dots, 1 - 2^{-f}\}

    Thresholds lie in the middle of parts of :math:`2^{-f}`, or, above seven bits, :math:`s x_i / m` is rounded to such
    parts as it is added. The mean of a code is therefore right to about half a part, and zero stays zero whatever is
    drawn. :math:`f` is 16 up to eight bits; above, float32 does not hold more than 24 bits of code and parts together.

    Args:
        bits: of a code, 1 to 16; :math:`s = 2^{b-1} - 1`, and one bit has the two levels :math:`\pm m`.
        draws: where :math:`u` comes from; ``None`` rounds to the nearest level.
        most: the largest number of elements that will come; it bounds the working memory, which has ``CHUNK`` at most.

    Example:
        >>> values, codes = np.array([3.0, -1.9, 0.4, 0.0], np.float32), np.empty(4, np.uint8)
        >>> levels, scales, out = Levels(3, None), np.array([3.0], np.float32), np.empty(4, np.float32)
        >>> levels.round(values, scales, codes), codes.tolist()
        (None, [6, 1, 3, 3])
        >>> levels.values(codes, scales, out), out.tolist()
        (None, [3.0, -2.0, 0.0, 0.0])
    """

    def __init__(self, bits: int, draws: Draws | None, most: int = CHUNK) -> None:
        self.bits, self.steps = bits, max(1, (1 << (bits - 1)) - 1)
        self._half = np.float32(0.5 if bits == 1 else self.steps)
        self._base = 1 << (bits - 1)  # codes are counted from one while they are floating-point numbers
        self._dither = None if draws is None else Dither(draws, min(16, 24 - bits), self._base, most)
        # working memory, which stays in the processor's cache from one piece to the next
        self._value = np.empty(min(most, CHUNK), np.float32)
        self._middle = np.float32(self._base + 0.5)

    def round(self, values: Array, scales: Array, codes: Array) -> None:
        """Write the codes of values.

        Args:
            values: at most ``CHUNK`` of them.
            scales: :math:`m` of each row, when the values are cut into as many rows as there are scales.
            codes: where the codes go, as many as values.
        """
        if self._dither is None and self.bits == 1:
            np.greater_equal(values, 0, out=codes.view(np.bool_))
            return
        value = self._value[: len(values)]
        if self._dither is None:
            value.fill(self._middle)
        else:
            self._dither.fill(value)
        if values.dtype != np.float32:
            values = values.astype(np.float32)
        unit = np.where(scales > 0, scales, np.float32(1)).astype(np.float32)
        # a bit less, so that the largest element and the largest threshold stay below the next whole number
        if unit.min() > 1e-30:
            _multiplied_and_added(values, np.nextafter(self._half / unit, np.float32(0)), value)
        else:  # divided before it is multiplied: 127 / 1e-40 is infinite, 1e-40 / 1e-40 is not
            quotient = (values.reshape(len(unit), -1) / unit[:, None]).reshape(-1)
            quotient *= np.nextafter(self._half, np.float32(0))
            value += quotient
        if self.bits == 1:
            np.greater_equal(value, 1.5, out=codes.view(np.bool_))
            return
        np.copyto(codes, value, casting="unsafe")  # cuts off what is behind the point
        codes -= codes.dtype.type(1)

    def values(self, codes: Array, scales: Array, out: Array) -> None:
        """Undo :meth:`round`, with float32 as ``out``."""
        if self.bits == 1:
            centred = (2 * codes - codes.dtype.type(1)).view(np.int8)  # wraps around: 0 becomes 255, which is -1
        elif self.bits <= 8:
            centred = (codes - codes.dtype.type(self.steps)).view(np.int8)
        else:
            centred = codes.astype(np.int32) - np.int32(self.steps)
        # in memory that is in the cache: that of `out` has not been touched yet
        value, factors = self._value[: len(out)], (scales / np.float32(self.steps)).astype(np.float32)
        np.copyto(value, centred, casting="same_kind")
        shape = (len(factors), -1)
        rows, target = torch.from_numpy(value).view(shape), torch.from_numpy(out).view(shape)
        torch.mul(rows, torch.from_numpy(factors)[:, None], out=target)


def _multiplied_and_added(values: Array, factors: Array, out: Array) -> None:
    """Add rows times their factors to what is there, in one pass."""
    rows, target = (torch.from_numpy(each).view(len(factors), -1) for each in (values, out))
    if len(factors) == 1:
        target.add_(rows, alpha=float(factors[0]))
    else:
        target.addcmul_(rows, torch.from_numpy(factors)[:, None])
