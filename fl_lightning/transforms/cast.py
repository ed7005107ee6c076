"""Narrower floating-point types."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fl_lightning.transforms.base import Exchange, TreeTransform, num_elements
from fl_lightning.transforms.bits import CHUNK
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
        working = torch.empty(CHUNK)
        for index, tensor in enumerate(tree.values()):
            value = tensor.detach().reshape(-1).cpu()
            if self.dtype != "bfloat16" and value.numel():
                exponents[index] = _exponent(value)
            factor = 2.0 ** -int(exponents[index])
            for begin in range(0, value.numel(), CHUNK):
                piece = value[begin : begin + CHUNK]
                scaled = torch.mul(piece, factor, out=working[: len(piece)]) if factor != 1 else piece
                _narrow(scaled, narrow[place : place + len(piece)])
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


def _narrow(value: Tensor, out: Tensor) -> None:
    """Write a piece in the narrow type of ``out``.

    For types of eight bits torch's own cast is slow, and a table with a row for each number of the upper sixteen bits
    of float32 takes its place. Rounding to those first, and then to the type, would round twice; rounding to odd, which
    sets the last bit where anything is cut off, changes nothing where the type has at least two bits less (Boldo and
    Melquiond, *Emulation of FMA and Correctly Rounded Sums: Proved Algorithms Using Rounding to Odd*, 2008).
    """
    if out.dtype.itemsize > 1:
        out.copy_(value)
        return
    whole = value.float().numpy().view(np.uint32)
    rest = whole & np.uint32(0xFFFF)
    rest += np.uint32(0xFFFF)  # carries into the last of the upper bits unless nothing is cut off
    rest |= whole
    rest >>= np.uint32(16)
    torch.index_select(_table(out.dtype), 0, torch.from_numpy(rest.view(np.int32)), out=out.view(torch.uint8))


def _wide(narrow: Tensor, factor: float) -> Tensor:
    """Return float32 times a power of two."""
    if narrow.dtype.itemsize > 1:
        return narrow.float().mul_(factor)
    table = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(narrow.dtype).float().mul_(factor)
    codes, wide = narrow.view(torch.uint8), torch.empty(len(narrow))
    for begin in range(0, len(codes), CHUNK):
        torch.index_select(table, 0, codes[begin : begin + CHUNK].int(), out=wide[begin : begin + CHUNK])
    return wide


@lru_cache
def _table(kind: torch.dtype) -> Tensor:
    upper = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    return upper.float().to(kind).view(torch.uint8)
