"""Multiples of a step, most of them zero, in about as many bits as they hold information."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fl_lightning.transforms.base import Exchange, TreeTransform, num_elements
from fl_lightning.transforms.bits import Array
from fl_lightning.transforms.errors import PayloadError
from fl_lightning.transforms.sparse_bits import pack_sparse, unpack_sparse
from fl_lightning.transforms.vectors import as_tensor, bytes_of, flat, gathered, pieces, scattered
from fl_lightning.types import Memory, Tree

__all__ = ["DeadZone"]

_LARGEST = (1 << 24) - 1


class DeadZone(TreeTransform):
    r"""Rounds to multiples of a step, small elements to zero, and lets the bytes follow from what is left.

    .. math:: \Delta = \min(s \cdot \text{rms}(x), \max_i |x_i|), \qquad
        q_i = \operatorname{sign}(x_i) \left\lfloor \frac{|x_i|}{\Delta} + 1 - z \right\rfloor, \qquad C(x) = \Delta\,q

    Elements are cut into blocks, each half again as long as the one before it. In each, the places of the non-zeros are
    Elias-Fano coded or a bitmap, signs take a bit, and :math:`|q| - 1` has a Rice code. That is close to the entropy
    where the elements of a block are alike, and it pays most behind :class:`~fl_lightning.transforms.Eigenbasis`, which
    brings the large ones to the front.

    It is biased, and a contraction: no element's error is larger than the element. Unlike ``TopK`` it does not send a
    fixed number of elements: an update that is spread evenly costs more bytes.

    Args:
        step: :math:`s > 0`, in root mean squares over all tensors together; larger sends less.
        zone: :math:`z`, in [0.5, 1): below that part of a step an element becomes zero. 0.5 rounds to the nearest.

    Raises:
        MisconfigurationException: for a step that is not positive and finite, or a zone outside [0.5, 1).

    Example:
        >>> transform, exchange = DeadZone(step=1.0), Exchange(seed=0, round=0)
        >>> update = {"w": torch.tensor([0.1, -3.0, 0.2, 1.0])}
        >>> opened, sealed, _ = transform.encode_tree(update, exchange, {})
        >>> transform.decode_tree(opened, sealed, exchange, update)["w"].tolist()
        [0.0, -3.17..., 0.0, 1.58...]

    References:
        Sullivan, *Efficient Scalar Quantization of Exponential and Laplacian Random Variables*, 1996 (the zone);
        Rice, *Some Practical Universal Noiseless Coding Techniques*, 1979.
    """

    def __init__(self, step: float = 4.0, zone: float = 0.6) -> None:
        if isinstance(step, bool) or not isinstance(step, int | float) or not 0 < step < math.inf:
            raise MisconfigurationException(
                f"DeadZone expected step to be a positive number of root mean squares, got {step!r}. Write step=4.0."
            )
        if isinstance(zone, bool) or not isinstance(zone, int | float) or not 0.5 <= zone < 1:
            raise MisconfigurationException(
                f"DeadZone expected zone in [0.5, 1), got {zone!r}. For fewer bytes write a larger step."
            )
        self.step, self.zone = float(step), float(zone)

    def encode_tree(self, tree: Tree, exchange: Exchange, memory: Memory) -> tuple[Tree, Any, Memory | None]:
        arrays = flat(tree)
        unit = self._unit(arrays)
        found = [np.zeros(0, np.int64)]
        if unit > 0:
            found += [np.flatnonzero(np.abs(piece) >= self.zone * unit) + place for place, piece in pieces(arrays)]
        places = np.concatenate(found)
        values = gathered(arrays, places).astype(np.float64) / (unit or 1.0)
        codes = np.minimum(np.floor(np.abs(values) + (1 - self.zone)), _LARGEST) * np.sign(values)
        kept = codes != 0  # the last bit of the comparison above
        counts, powers, data = pack_sparse(places[kept], codes[kept].astype(np.int64), num_elements(tree))
        return {}, [unit, counts, powers, as_tensor(data)], None

    def decode_tree(self, opened: Tree, sealed: Any, exchange: Exchange, template: Tree) -> Tree:
        if not isinstance(sealed, list) or len(sealed) != 4 or not all(isinstance(part, list) for part in sealed[1:3]):
            raise PayloadError("expected a step, counts, powers and bytes")
        unit, counts, powers, data = sealed
        if not isinstance(unit, float) or not 0 <= unit < math.inf:
            raise PayloadError(f"expected a finite step, got {unit!r}")
        places, codes = unpack_sparse(counts, powers, bytes_of(data), num_elements(template))
        wide = any(tensor.dtype == torch.float64 for tensor in template.values())
        with np.errstate(over="ignore"):  # what became infinite is found with everything else that is not finite
            values = (codes * unit).astype(np.float64 if wide else np.float32)
        return scattered(values, places, template)

    def _unit(self, arrays: Sequence[Array]) -> float:
        squares, largest, num = 0.0, 0.0, 0
        for _, piece in pieces(arrays):
            most = float(np.maximum(piece.max(), -piece.min()))
            largest, num = max(largest, most), num + len(piece)
            if most > 0:  # scaled, because the square of 1e30 is no float32
                scaled = piece / most
                squares += float(np.dot(scaled, scaled)) * most**2
        if not num:
            return 0.0
        # in float32, as the server multiplies
        return float(np.float32(min(self.step * math.sqrt(squares / num), largest)))
