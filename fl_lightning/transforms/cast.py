"""Narrower floating-point types."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fl_lightning.transforms.base import Exchange, TreeTransform, num_elements
from fl_lightning.transforms.bits import CHUNK, Array
from fl_lightning.transforms.errors import PayloadError
from fl_lightning.transforms.vectors import sealed_array
from fl_lightning.types import Memory, Tree

__all__ = ["Cast"]


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
        working = torch.empty(min(CHUNK, len(narrow)))
        for index, tensor in enumerate(tree.values()):
            value = tensor.detach().reshape(-1).cpu()
            if self.dtype != "bfloat16" and value.numel():
                exponents[index] = _exponent(value)
            factor = 2.0 ** -int(exponents[index])
            for piece in torch.split(value, CHUNK):
                scaled = torch.mul(piece, factor, out=working[: len(piece)]) if factor != 1 else piece
                narrow[place : place + len(piece)].copy_(scaled)
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
            value = _wide(narrow[place : place + like.numel()], 2.0 ** int(exponent))
            tree[name] = value.to(like.dtype).reshape(like.shape)
            place += like.numel()
        return tree


def _exponent(value: Tensor) -> int:
    """Return that of the power of two which brings the largest element into [1, 2)."""
    low, high = torch.aminmax(value)
    # a power beyond these has no finite inverse in float32
    return min(max(int(np.frexp(max(float(high), -float(low)))[1]) - 1, -120), 127)


def _wide(narrow: Tensor, factor: float) -> Tensor:
    """Return float32 times a power of two."""
    wide = torch.from_numpy(np.empty(len(narrow), np.float32))  # large pages, which torch's own memory has not
    half = np.empty(min(CHUNK, len(narrow)) if narrow.dtype.itemsize == 1 else 0, np.int16)
    for target, piece in zip(torch.split(wide, CHUNK), torch.split(narrow, CHUNK), strict=True):
        if len(half):
            bits = half[: len(piece)]
            shift = _as_float16(piece.view(torch.uint8).numpy(), bits, narrow.dtype)
            target.copy_(torch.from_numpy(bits).view(torch.float16)).mul_(shift)
        else:
            target.copy_(piece)
        target.mul_(factor)  # float32 may not hold the product of both factors
    return wide


def _as_float16(codes: Array, out: Array, kind: torch.dtype) -> float:
    """Write the bits of numbers of eight bits as those of float16; return what these are to be multiplied by.

    float16 has the exponent of ``float8_e5m2`` and one bit more than that of ``float8_e4m3fn``, so a shift widens both,
    numbers too small for a leading one included. torch's own conversion takes ten times as long.
    """
    np.copyto(out, codes.view(np.int8))  # the sign fills the upper half
    if kind == torch.float8_e5m2:
        out <<= 8
        return 1.0
    magnitudes = codes & np.uint8(0x7F)
    if len(codes) and magnitudes.max() == 0x7F:
        raise PayloadError("it has NaN among its values")
    out <<= 7
    out &= np.int16(-0x4080)  # keeps the sign, and not its copy in the exponent's first bit
    return 256.0  # the exponents count from 7 and from 15
