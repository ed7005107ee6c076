"""Trees as flat arrays in memory, without a copy where they already are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fl_lightning.transforms.bits import CHUNK, Array
from fl_lightning.transforms.errors import PayloadError
from fl_lightning.types import Tree

__all__ = ["as_tensor", "bytes_of", "flat", "gathered", "joined", "pieces", "scattered", "sealed_array", "split"]


def flat(tree: Tree) -> list[Array]:
    """Return each tensor as a flat array; half precisions, which NumPy lacks or computes slowly in, as float32."""
    arrays = []
    for tensor in tree.values():
        tensor = tensor.detach().reshape(-1).cpu()
        if tensor.dtype not in (torch.float32, torch.float64):
            tensor = tensor.float()
        arrays.append(tensor.numpy())
    return arrays


def joined(tree: Tree) -> Array:
    """Return all elements in one array, in the order of the names."""
    arrays = flat(tree)
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def split(vector: Array, template: Tree) -> dict[str, Tensor]:
    """Undo :func:`joined`, with the names, shapes and types of ``template``."""
    tree, place = {}, 0
    for name, like in template.items():
        piece = torch.from_numpy(vector[place : place + like.numel()])
        tree[name] = piece.reshape(like.shape).to(like.dtype)
        place += like.numel()
    return tree


def pieces(arrays: Sequence[Array]) -> Iterator[tuple[int, Array]]:
    """Yield pieces that fit in the cache, each with the place of its first element among all."""
    place = 0
    for array in arrays:
        for begin in range(0, len(array), CHUNK):
            yield place + begin, array[begin : begin + CHUNK]
        place += len(array)


def gathered(arrays: Sequence[Array], indices: Array) -> Array:
    """Return the elements at sorted places among all."""
    place, found = 0, []
    for array in arrays:
        low, high = np.searchsorted(indices, (place, place + len(array)))
        found.append(array[indices[low:high] - place])
        place += len(array)
    return found[0] if len(found) == 1 else np.concatenate(found)


def scattered(values: Array, indices: Array, template: Tree) -> dict[str, Tensor]:
    """Return a tree of zeros with values at sorted places among all its elements."""
    tree, place = {}, 0
    for name, like in template.items():
        low, high = np.searchsorted(indices, (place, place + like.numel()))
        dense = torch.zeros(like.numel(), dtype=torch.from_numpy(values[:0]).dtype)
        dense.numpy()[indices[low:high] - place] = values[low:high]  # several times as fast as torch's own
        tree[name] = dense.reshape(like.shape).to(like.dtype)
        place += like.numel()
    return tree


def as_tensor(array: Array) -> Tensor:
    """Return an array as a tensor that owns writable memory in order."""
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def bytes_of(value: object) -> Array:
    """Return sealed bytes.

    Raises:
        PayloadError: for anything but a flat tensor of bytes.
    """
    if not isinstance(value, Tensor) or value.dtype != torch.uint8 or value.ndim != 1:
        raise PayloadError(f"expected a flat tensor of bytes, got {_shown(value)}")
    return value.numpy()


def sealed_array(value: object, num: int, dtype: torch.dtype) -> Array:
    """Return ``num`` sealed finite numbers.

    Raises:
        PayloadError: for another type, number or shape.
    """
    if not isinstance(value, Tensor) or value.dtype != dtype or value.shape != (num,):
        raise PayloadError(f"expected {num} numbers of {dtype}, got {_shown(value)}")
    array: Array = value.numpy()
    if not np.isfinite(array).all():
        raise PayloadError("expected finite scales, got NaN or infinity")
    return array


def _shown(value: object) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
