"""Arithmetic on named tensors. Trees are never changed in place unless a name says so."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fl_lightning.types import Tree

__all__ = [
    "add_",
    "difference",
    "divided",
    "from_vector",
    "non_finite",
    "num_bytes",
    "scaled",
    "to_vector",
    "zeros_like",
]


def scaled(tree: Tree, factor: float) -> dict[str, Tensor]:
    """Return ``factor * tree``.

    Example:
        >>> scaled({"w": torch.tensor([1.0, 2.0])}, 3.0)["w"].tolist()
        [3.0, 6.0]
    """
    names, tensors = list(tree), list(tree.values())
    return dict(zip(names, torch._foreach_mul(tensors, factor), strict=True)) if tensors else {}


def divided(tree: Tree, divisor: float) -> dict[str, Tensor]:
    """Return ``tree / divisor``: one rounding, where a multiplication by ``1 / divisor`` has two.

    Example:
        >>> divided({"w": torch.tensor([3.0, 6.0])}, 3.0)["w"].tolist()
        [1.0, 2.0]
    """
    names, tensors = list(tree), list(tree.values())
    return dict(zip(names, torch._foreach_div(tensors, divisor), strict=True)) if tensors else {}


def difference(left: Tree, right: Tree) -> dict[str, Tensor]:
    """Return ``left - right`` for the names of ``left``."""
    names = list(left)
    if not names:
        return {}
    return dict(zip(names, torch._foreach_sub([left[n] for n in names], [right[n] for n in names]), strict=True))


def add_(total: dict[str, Tensor], tree: Tree) -> None:
    """Add ``tree`` to ``total`` in place; names that ``total`` lacks are copied in."""
    if total.keys() == tree.keys():
        torch._foreach_add_(list(total.values()), [tree[name] for name in total])
        return
    known = [name for name in tree if name in total]
    if known:
        torch._foreach_add_([total[name] for name in known], [tree[name] for name in known])
    for name in tree:
        if name not in total:
            total[name] = tree[name].clone()


def zeros_like(tree: Tree) -> dict[str, Tensor]:
    """Return zeros of the same names, shapes, types and devices."""
    return {name: torch.zeros_like(tensor) for name, tensor in tree.items()}


def num_bytes(trees: Iterable[Tree]) -> int:
    """Return the bytes of the tensors' elements."""
    return sum(tensor.numel() * tensor.element_size() for tree in trees for tensor in tree.values())


def non_finite(tree: Tree) -> str | None:
    """Return the name of the first tensor with a NaN or an infinity, or ``None``.

    Example:
        >>> non_finite({"a": torch.zeros(2), "b": torch.tensor([1.0, float("nan")])})
        'b'
    """
    for name, tensor in tree.items():
        # a sum is NaN or infinite whenever one element is; only then is the slower exact check worth its time
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum())) and not _all_finite(tensor):
            return name
    return None


def norm(tree: Tree) -> float:
    """Return the Euclidean norm of all elements: NaN or infinite when one of them is.

    Example:
        >>> norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
        5.0
    """
    tensors = [tensor if tensor.is_floating_point() else tensor.float() for tensor in tree.values()]
    if not tensors:
        return 0.0
    parts = torch._foreach_norm(tensors)
    if tensors[0].device.type != "cpu":  # one wait for the device and not one for each tensor
        return math.hypot(*torch.stack([part.double() for part in parts]).tolist())
    return math.hypot(*(part.item() for part in parts))


def _all_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def to_vector(tree: Tree) -> Tensor:
    """Return all elements in one vector, in the order of the names.

    Shape:
        ``(sum of numel,)`` of the widest floating type in the tree.
    """
    tensors = list(_in_order(tree))
    if not tensors:
        return torch.zeros(0)
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def from_vector(vector: Tensor, template: Tree) -> dict[str, Tensor]:
    """Undo :func:`to_vector`, with the names, shapes and types of ``template``."""
    tree, position = {}, 0
    for name, tensor in template.items():
        chunk = vector[position : position + tensor.numel()]
        tree[name] = chunk.reshape(tensor.shape).to(tensor.dtype)
        position += tensor.numel()
    return tree


def _in_order(tree: Tree) -> Iterator[Tensor]:
    yield from tree.values()
