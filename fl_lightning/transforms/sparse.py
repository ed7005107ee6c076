"""Sparsification: a few of the elements travel, the largest or random ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fl_lightning.transforms.base import (
    Exchange,
    State,
    Template,
    Transform,
    TreeTransform,
    common_dtype,
    num_elements,
)
from fl_lightning.transforms.bits import Array, pack_indices, unpack_indices
from fl_lightning.transforms.errors import PayloadError
from fl_lightning.transforms.selection import largest
from fl_lightning.transforms.vectors import as_tensor, bytes_of, flat, gathered, scattered
from fl_lightning.types import Memory, Tree

__all__ = ["RandomK", "TopK"]


class _Sparse(TreeTransform):
    def __init__(self, fraction: float | None, k: int | None, per_tensor: bool) -> None:
        name = type(self).__name__
        if (fraction is None) == (k is None):
            raise MisconfigurationException(
                f"{name} expected one of fraction and k, got fraction={fraction!r} and k={k!r}. Write "
                f"{name}(fraction=0.01) for one element in a hundred, or {name}(k=100) for a hundred."
            )
        number = isinstance(fraction, int | float) and not isinstance(fraction, bool)
        if fraction is not None and not (number and 0.0 < fraction <= 1.0):
            raise MisconfigurationException(
                f"{name} expected fraction in (0, 1], got {fraction!r}. For a number of elements write {name}(k=...)."
            )
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
            raise MisconfigurationException(
                f"{name} expected k to be an integer >= 1, got {k!r}. For a part of the elements write "
                f"{name}(fraction=0.01)."
            )
        self.fraction = None if fraction is None else float(fraction)
        self.k = k
        self.per_tensor = per_tensor

    def init(self, template: Template, seed: int) -> State:
        super().init(template, seed)
        for tree in template.values():
            self._check(num_elements(tree), "the update")
            for name, tensor in tree.items() if self.per_tensor else ():
                self._check(tensor.numel(), f"the tensor {name!r}")
        return {}

    def output_tree(self, template: Tree) -> Tree:
        return {
            key: torch.empty(self.count(num_elements(group)), dtype=common_dtype(group), device="meta")
            for key, group in self.groups(template).items()
        }

    def groups(self, tree: Tree) -> dict[str, Tree]:
        """Return what elements are chosen from, by the name that the chosen ones travel under."""
        return {name: {name: tensor} for name, tensor in tree.items()} if self.per_tensor else {"": tree}

    def count(self, num: int) -> int:
        """Return how many of ``num`` elements travel."""
        if self.k is not None:
            return self.k
        assert self.fraction is not None
        return max(1, round(self.fraction * num)) if num else 0

    def _check(self, num: int, what: str) -> None:
        if self.k is not None and self.k > num:
            raise MisconfigurationException(
                f"{type(self).__name__}(k={self.k}) is larger than {what}, which has {num} elements. Take a smaller k, "
                f"or {type(self).__name__}(fraction=...)."
            )


class TopK(_Sparse):
    r"""Sends the :math:`k` elements of largest absolute value, with their places.

    .. math:: C(x)_i = x_i \text{ if } |x_i| \text{ is among the } k \text{ largest, else } 0, \qquad
        \lVert x - C(x) \rVert^2 \le \left(1 - \frac{k}{n}\right) \lVert x \rVert^2

    It is biased: on its own it may diverge, so wrap it in :class:`~fl_lightning.transforms.ErrorFeedback`. Of equal
    values the first ones are taken. Places are Elias-Fano coded, or a bitmap where that is smaller.

    Args:
        fraction: part of the elements, in (0, 1]; at least one element. 1 changes no bit.
        k: number of elements instead, >= 1.
        per_tensor: choose within each tensor; otherwise among all elements of the update together.

    Raises:
        MisconfigurationException: for a fraction outside (0, 1], for ``k < 1``, and at the start of a fit for ``k``
            larger than what it is chosen from.

    Example:
        >>> transform, exchange = TopK(k=2), Exchange(seed=0, round=0)
        >>> update = {"w": torch.tensor([0.1, -3.0, 0.2, 2.0])}
        >>> opened, sealed, _ = transform.encode_tree(update, exchange, {})
        >>> transform.decode_tree(opened, sealed, exchange, update)["w"].tolist()
        [0.0, -3.0, 0.0, 2.0]

    References:
        Stich et al., *Sparsified SGD with Memory*, 2018, definition 2.1.
    """

    def __init__(self, fraction: float | None = None, k: int | None = None, per_tensor: bool = False) -> None:
        super().__init__(fraction, k, per_tensor)

    def encode_tree(self, tree: Tree, exchange: Exchange, memory: Memory) -> tuple[Tree, Any, Memory | None]:
        opened, sealed = {}, []
        for key, group in self.groups(tree).items():
            arrays, num = flat(group), num_elements(group)
            places = largest(arrays, self.count(num))
            opened[key] = as_tensor(gathered(arrays, places)).to(common_dtype(group))
            sealed.append(as_tensor(pack_indices(places, num) if len(places) < num else np.zeros(0, np.uint8)))
        return opened, sealed, None

    def decode_tree(self, opened: Tree, sealed: Any, exchange: Exchange, template: Tree) -> Tree:
        groups = self.groups(template)
        if not isinstance(sealed, list) or len(sealed) != len(groups):
            raise PayloadError(f"expected places for {len(groups)} groups of elements")
        tree: dict[str, Tensor] = {}
        for (key, group), packed in zip(groups.items(), sealed, strict=True):
            num = num_elements(group)
            count = self.count(num)
            values = _values(opened, key, count)
            places = unpack_indices(bytes_of(packed), count, num) if count < num else np.arange(num)
            tree.update(scattered(values, places, group))
        return tree


class RandomK(_Sparse):
    r"""Sends :math:`k` random elements; their places come from the seed, so that only values travel.

    .. math:: C(x)_i = \frac{n}{k} x_i \text{ if } i \in S, \text{ else } 0, \qquad \mathbb{E}\,C(x) = x, \qquad
        \mathbb{E} \lVert C(x) - x \rVert^2 = \left(\frac{n}{k} - 1\right) \lVert x \rVert^2

    Args:
        fraction: part of the elements of an update, in (0, 1]; at least one element. 1 changes no bit.
        k: number of elements instead, >= 1.
        unbiased: multiply by :math:`n/k`. ``False`` is what error feedback takes, with
            :math:`\mathbb{E} \lVert C(x) - x \rVert^2 = (1 - k/n) \lVert x \rVert^2`.
        shared: all clients of a round choose the same places. Their sum then has :math:`k` elements and is decoded
            once; the errors of the clients no longer cancel each other.
        per_tensor: choose within each tensor, so that none is left out and :math:`n` and :math:`k` are a tensor's own;
            otherwise among all elements of the update together.

    Raises:
        MisconfigurationException: as for :class:`TopK`.

    Example:
        >>> transform, exchange = RandomK(fraction=0.5), Exchange(seed=0, round=0, client_id="a")
        >>> update = {"w": torch.ones(4)}
        >>> opened, sealed, _ = transform.encode_tree(update, exchange, {})
        >>> sorted(transform.decode_tree(opened, sealed, exchange, update)["w"].tolist())
        [0.0, 0.0, 2.0, 2.0]

    References:
        Konečný et al., *Federated Learning: Strategies for Improving Communication Efficiency*, 2016, section 3.
    """

    def __init__(
        self,
        fraction: float | None = None,
        k: int | None = None,
        unbiased: bool = True,
        shared: bool = False,
        per_tensor: bool = False,
    ) -> None:
        super().__init__(fraction, k, per_tensor)
        self.unbiased = unbiased
        self.shared = shared

    @property
    def on_sum(self) -> bool:  # type: ignore[override]
        return self.shared

    def encode_tree(self, tree: Tree, exchange: Exchange, memory: Memory) -> tuple[Tree, Any, Memory | None]:
        draws, opened = exchange.draws(shared=self.shared), {}
        for key, group in self.groups(tree).items():
            num = num_elements(group)
            values = gathered(flat(group), draws.subset(self.count(num), num))
            opened[key] = as_tensor(values).to(common_dtype(group))
        return opened, None, None

    def decode_tree(self, opened: Tree, sealed: Any, exchange: Exchange, template: Tree) -> Tree:
        draws, tree = exchange.draws(shared=self.shared), {}
        for key, group in self.groups(template).items():
            num = num_elements(group)
            count = self.count(num)
            values = _values(opened, key, count)
            if self.unbiased and count < num:
                # the server multiplies: a transform behind this one then sees the client's own values
                values = values * values.dtype.type(num / count)
            tree.update(scattered(values, draws.subset(count, num), group))
        return tree

    def contraction(self) -> Transform:
        return RandomK(self.fraction, self.k, unbiased=False, shared=self.shared, per_tensor=self.per_tensor)


def _values(opened: Tree, key: str, count: int) -> Array:
    values = opened.get(key)
    if values is None or values.shape != (count,) or not values.is_floating_point():
        found = "none" if values is None else f"{values.dtype} of shape {tuple(values.shape)}"
        raise PayloadError(f"expected {count} values, got {found}")
    return flat({key: values})[0]
