"""The coordinates in which earlier rounds' updates were uncorrelated."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fl_lightning.transforms.base import (
    Broadcast,
    Exchange,
    Payload,
    State,
    Template,
    Transform,
    common_dtype,
    num_elements,
)
from fl_lightning.transforms.bits import Array
from fl_lightning.transforms.errors import PayloadError
from fl_lightning.types import ClientId, Contribution, Memory, Tree

__all__ = ["Eigenbasis"]


class Eigenbasis(Transform):
    r"""Turns each matrix into coordinates in which a few large numbers hold most of it, and sorts all numbers by size.

    With :math:`G_t` the sum of the updates of one matrix in round :math:`t`,

    .. math:: \sum_{s<t} \frac{G_s G_s^\top}{\lVert G_s \rVert^2} = U \Lambda U^\top, \qquad
        \sum_{s<t} \frac{G_s^\top G_s}{\lVert G_s \rVert^2} = V M V^\top, \qquad C(x) = U^\top x\, V

    and the numbers of all tensors together are sent in the order of what is expected of their squares,
    :math:`\lambda_i \mu_j`. Nothing is lost but rounding of the order of :math:`2^{-11}`, and nothing is saved either:
    that is for what stands behind it in the chain, as in ``chain(Eigenbasis(), DeadZone(4.0))``. Errors made there keep
    their size on the way back. Unlike ``PowerSGD`` it restricts an update to no subspace, a client sends no basis and
    keeps none, and the basis comes from the mean of a cohort, which is less noisy than any client's own.

    The basis is public: the server makes it from sums it has anyway, and clients download it in float16 with the
    model. That is :math:`r^2 + c^2` numbers for a matrix of :math:`r` rows and :math:`c` columns, several times the
    model, so this is for where uploads are what is short. The first dimension makes the rows; in the first round, for
    vectors, and for sides longer than ``longest``, coordinates stay as they are.

    Args:
        longest: sides up to this length are turned, >= 1. The server's time in a round grows with its cube: about .2
            seconds for 784, 1 for 2000.

    Raises:
        MisconfigurationException: for ``longest`` below 1, and at the start of a fit when no matrix can be turned.

    Example:
        >>> transform, exchange = Eigenbasis(), Exchange(seed=0, round=1)
        >>> update = {"w": torch.outer(torch.tensor([3.0, 4.0]), torch.tensor([0.6, 0.8]))}
        >>> _, state = transform.finish(Contribution({"delta": update}), {})
        >>> sent = transform.broadcast(update, ["a"], exchange, state)
        >>> exchange = Exchange(seed=0, round=1, public={exchange.public_key: sent.public})
        >>> payload, _ = transform.encode(Contribution({"delta": update}), exchange, {})
        >>> payload.contribution.trees["delta"][""].abs().round(decimals=2).tolist()
        [5.0, 0.0, 0.0, 0.0]

    References:
        Goyal, *Theoretical Foundations of Transform Coding*, 2001 (the Karhunen-Loeve transform); Gupta et al.,
        *Shampoo: Preconditioned Stochastic Tensor Optimization*, 2018 (one basis for each side of a matrix).
    """

    def __init__(self, longest: int = 1024) -> None:
        if isinstance(longest, bool) or not isinstance(longest, int) or longest < 1:
            raise MisconfigurationException(f"Eigenbasis expected longest to be an integer >= 1, got {longest!r}.")
        self.longest = longest

    def init(self, template: Template, seed: int) -> State:
        self._refuse_empty(template)
        for tree in template.values():
            if not any(self._sides(tensor) for tensor in tree.values()):
                raise MisconfigurationException(
                    f"Eigenbasis(longest={self.longest}) has no matrix to turn. Put it first, as in "
                    "chain(Eigenbasis(), DeadZone(4.0)), with longest at least the shorter side of a matrix."
                )
        return {}

    def output(self, template: Template) -> Template:
        return {
            key: {"": torch.empty(num_elements(tree), dtype=common_dtype(tree), device="meta")}
            for key, tree in template.items()
        }

    # ---- client half, and what undoes it -----------------------------------------------------------------------

    def encode(self, contribution: Contribution, exchange: Exchange, memory: Memory) -> tuple[Payload, Memory | None]:
        public, trees = exchange.public_tree(), dict[str, Tree]()
        for key, tree in contribution.trees.items():
            parts = [self._turned(name, tensor.detach().cpu(), public, back=False) for name, tensor in tree.items()]
            values = torch.cat([part.reshape(-1).to(common_dtype(tree)) for part in parts])
            trees[key] = {"": torch.from_numpy(np.take(values.numpy(), _order(tree, public)))}
        return Payload(Contribution(trees, dict(contribution.scalars)), {}), None

    def decode(self, payload: Payload, exchange: Exchange, template: Template) -> Contribution:
        public, trees = exchange.public_tree(), dict[str, Tree]()
        for key, like in template.items():
            values = payload.contribution.trees.get(key, {}).get("")
            if values is None or values.shape != (num_elements(like),):
                raise PayloadError(f"expected {num_elements(like)} values of {key!r}")
            unsorted, sent = torch.zeros_like(values), np.flatnonzero(values.numpy())
            unsorted.numpy()[_order(like, public)[sent]] = values.numpy()[sent]
            parts = torch.split(unsorted, [tensor.numel() for tensor in like.values()])
            trees[key] = {
                name: self._turned(name, part.reshape(tensor.shape), public, back=True).to(tensor.dtype)
                for part, (name, tensor) in zip(parts, like.items(), strict=True)
            }
        return Contribution(trees, dict(payload.contribution.scalars))

    def _turned(self, name: str, tensor: Tensor, public: Tree, back: bool) -> Tensor:
        rows, columns = (public.get(f"{name}#{side}") for side in ("rows", "columns"))
        if rows is None and columns is None:
            return tensor
        matrix = tensor.reshape(tensor.shape[0], -1)
        if back:
            return _turned_back(matrix, rows, columns).reshape(tensor.shape)
        if rows is not None:
            matrix = rows.to(matrix).T @ matrix
        if columns is not None:
            matrix = matrix @ columns.to(matrix)
        return matrix.reshape(tensor.shape)

    # ---- server half -------------------------------------------------------------------------------------------

    def finish(self, total: Contribution, state: State) -> tuple[Contribution, State]:
        grams = dict(state.get("grams", {}))
        power = {}
        for tree in total.trees.values():
            for name, tensor in tree.items():
                power[name] = float(tensor.double().square().sum())
                for side, gram in self._grams(tensor, power[name]).items():
                    key = f"{name}#{side}"
                    grams[key] = grams[key] + gram if key in grams else gram
        return total, {"grams": grams, "power": power} if grams else state

    def broadcast(self, model: Tree, cohort: Sequence[ClientId], exchange: Exchange, state: State) -> Broadcast:
        public: dict[str, Tensor] = {}
        for key, gram in state.get("grams", {}).items():
            # a matrix product may be asymmetric in the last bit, and the library reads one half
            values, vectors = torch.linalg.eigh((gram + gram.T).cpu() / 2)
            public[key] = vectors.flip(1).to(torch.float16)
            public[f"{key} size"] = values.flip(0).clamp(min=0).float()
        powers = state.get("power", {})
        largest = max(powers.values(), default=0.0) or 1.0
        for name, power in powers.items():
            public[f"{name}#power"] = torch.tensor([power / largest], dtype=torch.float32)
        return Broadcast(model, state, public={name: tensor.to(_device(model)) for name, tensor in public.items()})

    def _grams(self, tensor: Tensor, power: float) -> dict[str, Tensor]:
        if not power > 0:
            return {}
        # scaled before the square of 1e30 overflows float32, which is enough for bases that travel in float16
        matrix = (tensor.double() / math.sqrt(power)).float().reshape(tensor.shape[0] if tensor.ndim else 1, -1)
        sides = {"rows": matrix, "columns": matrix.T}
        return {side: _gram(sides[side]).double() for side in self._sides(tensor)}

    def _sides(self, tensor: Tensor) -> list[str]:
        if tensor.ndim < 2 or not tensor.numel():
            return []
        rows = tensor.shape[0]
        lengths = {"rows": rows, "columns": tensor.numel() // rows}
        return [side for side, length in lengths.items() if 1 < length <= self.longest]


def _order(tree: Tree, public: Tree) -> Array:
    """Return the places of all elements, those first of which most is expected."""
    expected = []
    for name, tensor in tree.items():
        power = public.get(f"{name}#power")
        size = np.full(tensor.numel(), float(power) / max(1, tensor.numel()) if power is not None else 1.0, np.float32)
        if tensor.ndim > 1 and tensor.numel():
            grid = size.reshape(tensor.shape[0], -1)
            for side, shape in (("rows", (-1, 1)), ("columns", (1, -1))):
                own = public.get(f"{name}#{side} size")
                if own is not None:
                    grid *= (own / own.mean().clamp(min=1e-30)).cpu().numpy().reshape(shape)
        expected.append(size)
    # the upper bits of a positive float32 grow with it: four steps for each power of two, 64 powers below the largest.
    # So few kinds are sorted in one pass and without comparing
    steps = np.concatenate(expected).view(np.int32) >> 21
    order: Array = np.argsort(np.minimum(steps.max(initial=0) - steps, 255).astype(np.uint8), kind="stable")
    return order


def _turned_back(matrix: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Return ``rows @ matrix @ columns.T``; rows and columns of zeros are left out where they are many."""
    filled = matrix != 0
    if rows is not None:
        rows, matrix = _without_zeros(rows.to(matrix), matrix, filled.any(dim=1), 0)
    if columns is not None:
        columns, matrix = _without_zeros(columns.to(matrix), matrix, filled.any(dim=0), 1)
        matrix = matrix @ columns.T
    return matrix if rows is None else rows @ matrix


def _without_zeros(basis: Tensor, matrix: Tensor, filled: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    if 4 * int(filled.sum()) > 3 * len(filled):  # copying what is left would take longer than it saves
        return basis, matrix
    kept = torch.nonzero(filled)[:, 0]
    return basis.index_select(1, kept), matrix.index_select(dim, kept)


def _gram(matrix: Tensor) -> Tensor:
    """Return the matrix times its transpose; NumPy computes one half of it."""
    if matrix.device.type != "cpu":
        return matrix @ matrix.T
    array = np.ascontiguousarray(matrix.numpy())
    return torch.from_numpy(array @ array.T)


def _device(model: Tree) -> torch.device:
    return next(iter(model.values())).device
