"""Quantisation to a few bits, and to signs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fl_lightning.transforms.base import Exchange, Transform, TreeTransform, num_elements
from fl_lightning.transforms.bits import CHUNK, Array, pack_bits, unpack_bits
from fl_lightning.transforms.errors import PayloadError
from fl_lightning.transforms.levels import Levels
from fl_lightning.transforms.vectors import as_tensor, bytes_of, flat, sealed_array
from fl_lightning.types import Memory, Tree

__all__ = ["Quantize", "Sign"]


class Quantize(TreeTransform):
    r"""Rounds each element to one of :math:`2^b - 1` equidistant levels, at random so that the mean is right.

    With :math:`s = 2^{b-1} - 1` levels on each side of zero and a scale :math:`m` for each tensor or block,

    .. math:: C(x)_i = m \cdot \frac{\lfloor s\,x_i / m + u_i \rfloor}{s}, \qquad u_i \sim U[0, 1), \qquad
        \mathbb{E}\,C(x) = x, \qquad
        \mathbb{E} \lVert C(x) - x \rVert^2 \le \min\!\left(\frac{n}{s^2}, \frac{\sqrt n}{s}\right) \lVert x \rVert^2

    One bit has the two levels :math:`\pm m`, drawn so that the mean is right; its variance is
    :math:`n m^2 - \lVert x \rVert^2`.

    Args:
        bits: of a code, 1 to 16.
        stochastic: round at random; ``False`` rounds to the nearest level, which is biased (one bit then is
            :class:`Sign`).
        block: elements that share a scale; ``None`` gives each tensor one.
        norm: ``"max"`` scales by the largest absolute value, ``"2"`` by the 2-norm as QSGD does: most codes are then
            zero, at most :math:`s(s + \sqrt n)` are not, and the error is larger.

    Raises:
        MisconfigurationException: for bits outside 1 to 16, another norm, or a block below 1.

    Example:
        >>> transform, exchange = Quantize(bits=3, stochastic=False), Exchange(seed=0, round=0)
        >>> update = {"w": torch.tensor([3.0, -1.9, 0.4, 0.0])}
        >>> opened, sealed, _ = transform.encode_tree(update, exchange, {})
        >>> transform.decode_tree(opened, sealed, exchange, update)["w"].tolist()
        [3.0, -2.0, 0.0, 0.0]

    References:
        Alistarh et al., *QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding*, 2017, section 3.1.
        The default differs by its scale, which is never larger; the bounds hold for both.
    """

    def __init__(
        self, bits: int = 8, stochastic: bool = True, block: int | None = None, norm: Literal["max", "2"] = "max"
    ) -> None:
        if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 16:
            raise MisconfigurationException(
                f"Quantize expected bits to be an integer from 1 to 16, got {bits!r}. For half precision write "
                "Cast('float16'), for full precision leave the transform out."
            )
        if block is not None and (isinstance(block, bool) or not isinstance(block, int) or block < 1):
            raise MisconfigurationException(
                f"Quantize expected block to be an integer >= 1, or None for a scale per tensor, got {block!r}."
            )
        if norm not in ("max", "2"):
            raise MisconfigurationException(f"Quantize expected norm='max' or norm='2', got {norm!r}.")
        if bits == 1 and norm == "2":
            raise MisconfigurationException(
                "Quantize(bits=1, norm='2') has no level but plus and minus the norm; use norm='max', or bits=2."
            )
        self.bits, self.stochastic, self.block, self.norm = bits, stochastic, block, norm

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        return self.stochastic

    def encode_tree(self, tree: Tree, exchange: Exchange, memory: Memory) -> tuple[Tree, Any, Memory | None]:
        arrays = flat(tree)
        num = sum(map(len, arrays))
        codes = np.zeros(
            -(-num // 8) * 8, np.uint8 if self.bits <= 8 else np.uint16
        )  # whole groups for what packs them
        levels = Levels(self.bits, exchange.draws() if self.stochastic else None, num)
        scales, place = [np.zeros(0, np.float32)], 0
        for array in arrays:
            # a scale of a block that fits in the cache is found when its elements are there anyway
            scale = self._scales(array) if (self.block or len(array)) > CHUNK else None
            for elements, own in self._pieces(len(array)):
                piece = array[elements]
                found = self._scales(piece) if scale is None else scale[own]
                levels.round(piece, found, codes[place : place + len(piece)])
                scales += [] if scale is not None else [found]
                place += len(piece)
            scales += [] if scale is None else [scale]
        return {}, [as_tensor(np.concatenate(scales)), as_tensor(pack_bits(codes, self.bits))], None

    def decode_tree(self, opened: Tree, sealed: Any, exchange: Exchange, template: Tree) -> Tree:
        if not isinstance(sealed, list) or len(sealed) != 2:
            raise PayloadError("expected scales and codes")
        sizes = [tensor.numel() for tensor in template.values()]
        scales = sealed_array(sealed[0], sum(map(self._num_scales, sizes)), torch.float32)
        codes = unpack_bits(bytes_of(sealed[1]), self.bits, num_elements(template))
        tree: dict[str, Tensor] = {}
        levels, first, place = Levels(self.bits, None, max(sizes, default=0)), 0, 0
        for (name, like), size in zip(template.items(), sizes, strict=True):
            dense, scale = np.empty(size, np.float32), scales[first : first + self._num_scales(size)]
            for elements, own in self._pieces(size):
                out = dense[elements]
                levels.values(codes[place : place + len(out)], scale[own], out)
                place += len(out)
            tree[name] = torch.from_numpy(dense).reshape(like.shape).to(like.dtype)
            first += len(scale)
        return tree

    def contraction(self) -> Transform:
        """Return the one that rounds to the nearest level: no element's error is then larger than the element."""
        return Quantize(self.bits, stochastic=False, block=self.block)

    def _num_scales(self, size: int) -> int:
        return -(-size // (self.block or size)) if size else 0

    def _pieces(self, size: int) -> Iterator[tuple[slice, slice]]:
        """Yield pieces that fit in the cache, and which scales they have: one, or one for each of equal rows."""
        span = self.block or size
        if span > CHUNK:
            for index, row in enumerate(range(0, size, span)):
                end = min(row + span, size)
                for begin in range(row, end, CHUNK):
                    yield slice(begin, min(begin + CHUNK, end)), slice(index, index + 1)
        elif size:
            whole = size // span
            step = CHUNK // span
            for index in range(0, whole, step):
                last = min(index + step, whole)
                yield slice(index * span, last * span), slice(index, last)
            if whole * span < size:
                yield slice(whole * span, size), slice(whole, whole + 1)

    def _scales(self, array: Array) -> Array:
        found = np.zeros(self._num_scales(len(array)))
        lengths = found.copy()
        for elements, own in self._pieces(len(array)):
            rows = array[elements].reshape(own.stop - own.start, -1)
            if self.norm == "max" and len(rows) == 1 and (self.bits > 1 or self.stochastic):
                low, high = torch.aminmax(torch.from_numpy(rows))  # both in one pass
                found[own] = np.maximum(found[own], max(float(high), -float(low)))
                continue
            if self.bits == 1 and not self.stochastic:
                found[own] += np.abs(rows).sum(axis=1, dtype=np.float64)
                lengths[own] += rows.shape[1]
            elif self.norm == "2":
                found[own] += np.square(rows, dtype=np.float64).sum(axis=1)
            else:
                found[own] = np.maximum(found[own], np.maximum(rows.max(axis=1), -rows.min(axis=1)))
        if self.bits == 1 and not self.stochastic:
            return (found / lengths).astype(np.float32)
        return _rounded_up(np.sqrt(found) if self.norm == "2" else found)


class Sign(TreeTransform):
    r"""Sends the sign of each element, and the mean absolute value of each tensor.

    .. math:: C(x) = \frac{\lVert x \rVert_1}{n} \operatorname{sign}(x), \qquad
        \lVert x - C(x) \rVert^2 = \left(1 - \frac{\lVert x \rVert_1^2}{n \lVert x \rVert_2^2}\right) \lVert x \rVert^2

    It is biased; wrap it in :class:`~fl_lightning.transforms.ErrorFeedback`. Zero counts as positive.

    Args:
        block: elements that share a scale; ``None`` gives each tensor one.

    Raises:
        MisconfigurationException: for a block below 1.

    Example:
        >>> transform, exchange = Sign(), Exchange(seed=0, round=0)
        >>> update = {"w": torch.tensor([3.0, -1.0])}
        >>> opened, sealed, _ = transform.encode_tree(update, exchange, {})
        >>> transform.decode_tree(opened, sealed, exchange, update)["w"].tolist()
        [2.0, -2.0]

    References:
        Karimireddy et al., *Error Feedback Fixes SignSGD and other Gradient Compression Schemes*, 2019, lemma 8.
    """

    def __init__(self, block: int | None = None) -> None:
        self._rule = Quantize(1, stochastic=False, block=block)
        self.block = block

    def encode_tree(self, tree: Tree, exchange: Exchange, memory: Memory) -> tuple[Tree, Any, Memory | None]:
        return self._rule.encode_tree(tree, exchange, memory)

    def decode_tree(self, opened: Tree, sealed: Any, exchange: Exchange, template: Tree) -> Tree:
        return self._rule.decode_tree(opened, sealed, exchange, template)


def _rounded_up(scale: Array) -> Array:
    """Return float32 that is no smaller: an element above its scale would be cut, and the mean be wrong."""
    narrow: Array = scale.astype(np.float32)
    narrow[narrow < scale] = np.nextafter(narrow[narrow < scale], np.float32(np.inf))
    return narrow
