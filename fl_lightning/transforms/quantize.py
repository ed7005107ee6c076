"""Quantisation to a few bits, to signs, and to narrower floating-point types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fl_lightning.transforms.base import Exchange, Transform, TreeTransform, num_elements
from fl_lightning.transforms.bits import CHUNK, Array, Draws, pack_bits, unpack_bits
from fl_lightning.transforms.errors import PayloadError
from fl_lightning.transforms.vectors import as_tensor, bytes_of, flat, sealed_array
from fl_lightning.types import Memory, Tree

__all__ = ["Cast", "Quantize", "Sign"]


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

    @property
    def levels(self) -> int:
        """Levels on each side of zero; one bit has none but the scale itself."""
        return max(1, (1 << (self.bits - 1)) - 1)

    def encode_tree(self, tree: Tree, exchange: Exchange, memory: Memory) -> tuple[Tree, Any, Memory | None]:
        arrays = flat(tree)
        codes = np.empty(sum(map(len, arrays)), np.uint8 if self.bits <= 8 else np.uint16)
        draws = exchange.draws() if self.stochastic else None
        scales: list[Array] = []
        place = 0
        for array in arrays:
            for rows, scale in self._scaled(array):
                codes[place : place + rows.size] = self._codes(rows, scale, draws).reshape(-1)
                place += rows.size
                scales.append(scale)
        packed = as_tensor(pack_bits(codes, self.bits))
        own = np.concatenate(self._distinct(scales, [len(array) for array in arrays])) if scales else np.zeros(0)
        return {}, [as_tensor(own.astype(np.float32)), packed], None

    def decode_tree(self, opened: Tree, sealed: Any, exchange: Exchange, template: Tree) -> Tree:
        if not isinstance(sealed, list) or len(sealed) != 2:
            raise PayloadError("expected scales and codes")
        sizes = [tensor.numel() for tensor in template.values()]
        scales = sealed_array(sealed[0], sum(map(self._num_scales, sizes)), torch.float32)
        codes = unpack_bits(bytes_of(sealed[1]), self.bits, num_elements(template))
        tree: dict[str, Tensor] = {}
        first = place = 0
        for name, like in template.items():
            size, count = like.numel(), self._num_scales(like.numel())
            dense = torch.empty(like.shape, dtype=like.dtype)
            self._fill(dense.view(-1), codes[place : place + size], scales[first : first + count])
            tree[name] = dense
            first, place = first + count, place + size
        return tree

    def contraction(self) -> Transform:
        """Return the one that rounds to the nearest level: no element's error is then larger than the element."""
        return Quantize(self.bits, stochastic=False, block=self.block)

    # ---- scales ------------------------------------------------------------------------------------------------

    def _num_scales(self, size: int) -> int:
        if not size:
            return 0
        return 1 if self.block is None else -(-size // self.block)

    def _scaled(self, array: Array) -> Iterator[tuple[Array, Array]]:
        """Yield pieces of an array as rows that share a scale, with their scales."""
        if not len(array):
            return
        if self.block is None:
            scale = self._scale(array[None])
            for begin in range(0, len(array), CHUNK):
                yield array[None, begin : begin + CHUNK], scale
            return
        whole = len(array) // self.block * self.block
        step = max(1, CHUNK // self.block) * self.block
        for begin in range(0, whole, step):
            rows = array[begin : min(begin + step, whole)].reshape(-1, self.block)
            yield rows, self._scale(rows)
        if whole < len(array):
            rows = array[None, whole:]
            yield rows, self._scale(rows)

    def _distinct(self, scales: list[Array], sizes: list[int]) -> list[Array]:
        if self.block is not None:
            return scales
        firsts, place = [], 0
        for size in sizes:  # the pieces of one tensor share a scale, which travels once
            if size:
                firsts.append(scales[place])
                place += -(-size // CHUNK)
        return firsts

    def _scale(self, rows: Array) -> Array:
        if self.bits == 1 and not self.stochastic:
            means: Array = np.abs(rows).mean(axis=1, dtype=np.float64)
            return means.astype(np.float32)
        if self.norm == "2":
            pieces = range(0, rows.shape[1], CHUNK)
            squares = [np.square(rows[:, begin : begin + CHUNK], dtype=np.float64).sum(axis=1) for begin in pieces]
            return _rounded_up(np.sqrt(np.sum(squares, axis=0)))
        return _rounded_up(np.maximum(rows.max(axis=1), -rows.min(axis=1)))

    # ---- codes -------------------------------------------------------------------------------------------------

    def _codes(self, rows: Array, scale: Array, draws: Draws | None) -> Array:
        if self.bits == 1 and draws is None:
            return rows >= 0
        divisor = np.where(scale > 0, scale, 1)[:, None].astype(rows.dtype)
        half = rows.dtype.type(0.5 if self.bits == 1 else self.levels)
        if divisor.min() > 1e-30:
            value: Array = rows * (half / divisor)
        else:  # divided before it is multiplied: 127 / 1e-40 is infinite, 1e-40 / 1e-40 is not
            value = rows / divisor * half
        if self.bits == 1:
            value += half
        value += rows.dtype.type(0.5) if draws is None else draws.uniform(rows.size).reshape(rows.shape)
        np.floor(value, out=value)  # before the codes are made positive: a zero stays one whatever was drawn
        if self.bits > 1:
            value += half
        return np.clip(value, 0, 1 if self.bits == 1 else 2 * self.levels, out=value)

    def _fill(self, dense: Tensor, codes: Array, scales: Array) -> None:
        for begin in range(0, len(codes), CHUNK):
            piece = codes[begin : begin + CHUNK].astype(np.float32)
            # at one bit a code of 0 is minus the scale and 1 plus it
            value = piece * np.float32(2) - np.float32(1) if self.bits == 1 else piece - np.float32(self.levels)
            unit = (scales / np.float32(self.levels)).astype(np.float32)
            if self.block is None:
                value *= unit[0]
            else:
                value *= unit[np.arange(begin, begin + len(piece)) // self.block]
            dense[begin : begin + len(piece)] = torch.from_numpy(value)


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


class Cast(TreeTransform):
    """Sends elements in a narrower floating-point type, rounded to the nearest.

    Types of little range get a power of two for each tensor, which is exact, so that nothing overflows.

    Args:
        dtype: ``"bfloat16"``, ``"float16"``, ``"float8_e4m3fn"`` or ``"float8_e5m2"``.

    Raises:
        MisconfigurationException: for another type, or one that this torch does not have.

    Example:
        >>> transform, exchange = Cast("float16"), Exchange(seed=0, round=0)
        >>> update = {"w": torch.tensor([1e6, 0.1])}
        >>> opened, sealed, _ = transform.encode_tree(update, exchange, {})
        >>> transform.decode_tree(opened, sealed, exchange, update)["w"].tolist()  # beyond float16's 65504
        [999936.0, 0.09375]
    """

    TYPES = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")

    def __init__(self, dtype: str = "float16") -> None:
        if dtype not in self.TYPES or not hasattr(torch, dtype):
            raise MisconfigurationException(f"Cast expected dtype to be one of {list(self.TYPES)}, got {dtype!r}.")
        self.dtype = dtype

    def encode_tree(self, tree: Tree, exchange: Exchange, memory: Memory) -> tuple[Tree, Any, Memory | None]:
        kind = getattr(torch, self.dtype)
        exponents = np.zeros(len(tree), np.int16)
        narrow, place = torch.empty(num_elements(tree), dtype=kind), 0
        for index, tensor in enumerate(tree.values()):
            value = tensor.detach().reshape(-1).cpu()
            if self.dtype != "bfloat16" and value.numel():
                largest = float(torch.linalg.vector_norm(value, ord=float("inf")))
                # largest / 2**exponent is in [1, 2); a power beyond these has no finite inverse in float32
                exponents[index] = min(max(int(np.frexp(largest)[1]) - 1, -120), 127)
            for begin in range(0, value.numel(), CHUNK):
                piece = value[begin : begin + CHUNK]
                narrow[place : place + len(piece)] = (
                    piece * 2.0 ** -int(exponents[index]) if exponents[index] else piece
                )
                place += len(piece)
        return {}, [narrow, torch.from_numpy(exponents)], None

    def decode_tree(self, opened: Tree, sealed: Any, exchange: Exchange, template: Tree) -> Tree:
        kind, num = getattr(torch, self.dtype), num_elements(template)
        if not isinstance(sealed, list) or len(sealed) != 2:
            raise PayloadError("expected values and exponents")
        narrow, exponents = sealed[0], sealed_array(sealed[1], len(template), torch.int16)
        if not isinstance(narrow, Tensor) or narrow.dtype != kind or narrow.shape != (num,):
            raise PayloadError(f"expected {num} values of {self.dtype}")
        tree, place = {}, 0
        for exponent, (name, like) in zip(exponents, template.items(), strict=True):
            value = narrow[place : place + like.numel()].to(like.dtype).reshape(like.shape)
            tree[name] = value.mul_(2.0 ** int(exponent)) if exponent else value
            place += like.numel()
        return tree


def _rounded_up(scale: Array) -> Array:
    """Return float32 that is no smaller: an element above its scale would be cut, and the mean be wrong."""
    narrow: Array = scale.astype(np.float32)
    narrow[narrow < scale] = np.nextafter(narrow[narrow < scale], np.float32(np.inf))
    return narrow
