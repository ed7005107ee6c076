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

    The sum is one of integers that count parts of :math:`2^{-f}`, to the nearest of which :math:`s x_i / m` is rounded
    first. The mean of a code is therefore right to half such a part, and zero stays zero whatever is drawn. :math:`f`
    is 16 up to eight bits; above, float32 does not hold more than 24 bits of code and parts together.

    Args:
        bits: of a code, 1 to 16; :math:`s = 2^{b-1} - 1`, and one bit has the two levels :math:`\pm m`.
        draws: where :math:`u` comes from; ``None`` rounds to the nearest level.

    Example:
        >>> values, codes = np.array([3.0, -1.9, 0.4, 0.0], np.float32), np.empty(4, np.uint8)
        >>> levels, scales, out = Levels(3, None), np.array([3.0], np.float32), np.empty(4, np.float32)
        >>> levels.round(values, scales, codes), codes.tolist()
        (None, [6, 1, 3, 3])
        >>> levels.values(codes, scales, out), out.tolist()
        (None, [3.0, -2.0, 0.0, 0.0])
    """

    def __init__(self, bits: int, draws: Draws | None) -> None:
        self.bits, self.steps = bits, max(1, (1 << (bits - 1)) - 1)
        self._half = 0.5 if bits == 1 else float(self.steps)
        self._fraction = 0 if draws is None else min(16, 24 - bits)
        self._dither = None if draws is None else Dither(draws, self._fraction)
        # working memory, which stays in the processor's cache from one piece to the next
        self._value, self._parts = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.int32)
        self._thresholds = np.empty(CHUNK, np.int32)

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
        value, parts = self._value[: len(values)], self._parts[: len(values)]
        rows, out = values.reshape(len(scales), -1), value.reshape(len(scales), -1)
        one = self._half * (1 << self._fraction)
        unit = np.where(scales > 0, scales, 1).astype(values.dtype)[:, None]
        if unit.min() > 1e-30:
            np.multiply(rows, one / unit, out=out, casting="same_kind")
        else:  # divided before it is multiplied: 127 / 1e-40 is infinite, 1e-40 / 1e-40 is not
            np.divide(rows, unit, out=out, casting="same_kind")
            value *= np.float32(one)
        value += np.float32(one + 0.5)  # now positive, so that cutting off what is behind the point rounds to a part
        np.copyto(parts, value, casting="unsafe")
        if self._dither is not None:
            thresholds = self._thresholds[: len(values)]
            self._dither.fill(thresholds)
            parts += thresholds
            parts >>= np.int32(self._fraction)
        torch.from_numpy(parts).clamp_(max=1 if self.bits == 1 else 2 * self.steps)  # three times as fast as NumPy's
        np.copyto(codes, parts, casting="unsafe")

    def values(self, codes: Array, scales: Array, out: Array) -> None:
        """Undo :meth:`round`, with float32 as ``out``."""
        if self.bits == 1:
            centred = (2 * codes - codes.dtype.type(1)).view(np.int8)  # wraps around: 0 becomes 255, which is -1
        elif self.bits <= 8:
            centred = (codes - codes.dtype.type(self.steps)).view(np.int8)
        else:
            centred = codes.astype(np.int32) - np.int32(self.steps)
        np.copyto(out, centred, casting="same_kind")
        rows = out.reshape(len(scales), -1)
        rows *= (scales / np.float32(self.steps)).astype(np.float32)[:, None]
