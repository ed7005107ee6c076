"""HeteroFL: weak devices train the first part of every hidden layer, strong ones all of it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from fl_lightning.algorithms.base import Algorithm, State
from fl_lightning.algorithms.layer_chain import check_chain
from fl_lightning.callbacks.base import GradientCorrection
from fl_lightning.types import ClientTask, ClientUpdate, Contribution, Memory, Tree

__all__ = ["HeteroFL", "kept_lengths"]

_PREFIX = "width "


class HeteroFL(Algorithm):
    r"""Clients of different width, one model: each trains the leading part of every hidden layer.

    .. math:: w_{t+1}[e] = w_t[e] + \frac{\sum_{k:\,e \in S_k} n_k\,\delta_k[e]}{\sum_{k:\,e \in S_k} n_k}

    :math:`S_k` are the entries that a client of width :math:`r_k` holds: of a hidden layer of :math:`m` units the first
    :math:`\lceil r_k m \rceil`; inputs of the first layer and outputs of the last stay. Entries that nobody of a cohort
    holds stay as they are. With everyone at width 1 it is FedAvg.

    A client's width is its ``Work.width``: from ``client_overrides={"phone": {"width": 0.5}}``, or from a policy of
    devices such as :class:`~fl_lightning.devices.AdaptiveWidth`.

    What can be cut is one chain of linear and convolution layers that feed one another in the order of the model's
    parameters, with a single output layer at its end; skip connections around layers of equal size are right. The
    layers' calls are followed by ``torch.fx``, and what cannot be followed is refused. So is, by name, everything else:
    normalisation, whose statistics would mix clients of different width, embeddings, transposed and grouped
    convolutions, recurrent layers, attention, a second head, a head that is declared before the body.

    A client contributes nothing outside of what it holds, whatever it sends: neither an attacker nor the noise of a
    lossy transform gets there. (A transform that is decoded on the sum can, at entries that others hold.)

    The simulation trains the whole model with the other entries at zero and their gradients as well, which is the
    narrow model to rounding, whatever the activation; dropout draws for the whole width. It saves no time here: that of
    the devices is what ``AdaptiveWidth`` counts. Bytes in reports are those of the whole model unless a transform
    leaves zeros out, as ``TopK`` and ``DeadZone`` do.

    Args:
        server_optimizer: as in :class:`FedAvg`.
        server_lr_scheduler: as in :class:`FedAvg`.
        weights: as in :class:`FedAvg`.

    Example:
        >>> model = {"0.weight": torch.zeros(4, 9), "0.bias": torch.zeros(4), "1.weight": torch.zeros(3, 4)}
        >>> kept_lengths({name: tensor.shape for name, tensor in model.items()}, 0.5)
        {'0.weight': (2, 9), '0.bias': (2,), '1.weight': (3, 2)}

    References:
        Diao et al., *HeteroFL: Computation and Communication Efficient Federated Learning for Heterogeneous Clients*,
        2021, equations 1 to 4. Its static batch normalisation, scaler and masked cross-entropy are left out; updates
        are averaged instead of models, so an entry that nobody trains keeps its value there as here.
    """

    def client_callbacks(self) -> list[Callback]:
        return [_WithinWidth()]

    def narrowed(self, model: Tree, width: float) -> Tree:
        lengths = kept_lengths({name: tensor.shape for name, tensor in model.items()}, width)
        return {name: _within(tensor, lengths[name]) for name, tensor in model.items()}

    def contribute(self, update: ClientUpdate, task: ClientTask, memory: Memory) -> tuple[Contribution, Memory | None]:
        contribution, kept = super().contribute(update, task, memory)
        contribution = self.opened(contribution, task)
        # the server knows from a width who holds which entry: no mask has to travel
        contribution.scalars[f"{_PREFIX}{task.work.width!r}"] = contribution.scalars["weight"]
        return contribution, kept

    def opened(self, contribution: Contribution, task: ClientTask) -> Contribution:
        delta = contribution.trees.get("delta")
        if task.work.width == 1.0 or delta is None:
            return contribution
        shapes = {name: tensor.shape for name, tensor in task.broadcast["model"].items()}
        if {name: tensor.shape for name, tensor in delta.items()} != shapes:  # not decoded before the sum
            return contribution
        trees = {**contribution.trees, "delta": self.narrowed(delta, task.work.width)}
        return Contribution(trees, contribution.scalars)

    def check_narrow(self, module: nn.Module, names: Collection[str]) -> None:
        check_chain(module, names)

    def apply(self, total: Contribution, state: State, num_clients: int) -> tuple[Tree, State]:
        weights = {float(n.removeprefix(_PREFIX)): w for n, w in total.scalars.items() if n.startswith(_PREFIX)}
        if set(weights) <= {1.0}:
            return super().apply(total, state, num_clients)
        delta = total.trees["delta"]
        held = {name: torch.zeros_like(tensor) for name, tensor in delta.items()}
        for width, weight in sorted(weights.items()):
            lengths = kept_lengths({name: tensor.shape for name, tensor in delta.items()}, width)
            for name, tensor in held.items():
                tensor[tuple(slice(length) for length in lengths[name])] += weight
        return {name: -torch.where(held[name] > 0, t / held[name], 0.0) for name, t in delta.items()}, state


class _WithinWidth(GradientCorrection):
    """No gradient outside of what the client holds."""

    def correct(self, grads: Tree, params: Tree, task: ClientTask) -> dict[str, Tensor]:
        if task.work.width == 1.0:
            return dict(grads)
        model = task.broadcast["model"]
        lengths = kept_lengths({name: tensor.shape for name, tensor in model.items()}, task.work.width)
        return {name: _within(grad, lengths[name]) if name in lengths else grad for name, grad in grads.items()}


def kept_lengths(shapes: Mapping[str, tuple[int, ...]], width: float) -> dict[str, tuple[int, ...]]:
    """Return how much of each dimension of each parameter belongs to a model of some width.

    Args:
        shapes: of all parameters, in the order of the layers.
        width: part of the hidden units, in (0, 1].

    Raises:
        MisconfigurationException: names the parameter that cannot be cut.
    """
    weights = [name for name, shape in shapes.items() if len(shape) > 1]
    kept: dict[str, tuple[int, ...]] = {}
    units = held = depth = 0  # of the layer before
    for name, shape in shapes.items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and len(shape) > 1:
            first, last = name == weights[0], name == weights[-1]
            flattened = len(shape) == 2 and depth > 2  # a linear layer behind a convolution
            if not first and (shape[1] % units if flattened else shape[1] != units):
                raise _refusal(name, shape, f"takes {shape[1]} inputs, and the layer before it has {units} outputs")
            inputs = shape[1] if first else held * (shape[1] // units)
            units, held = shape[0], shape[0] if last else math.ceil(width * shape[0] - 1e-9)
            kept[name] = (held, inputs, *shape[2:])
            depth = len(shape)
        elif kind == "bias" and len(shape) == 1 and f"{layer}.weight" in kept:
            kept[name] = (kept[f"{layer}.weight"][0],)
        else:
            raise _refusal(name, shape, "belongs to no linear or convolution layer")
    return kept


def _within(tensor: Tensor, lengths: tuple[int, ...]) -> Tensor:
    part = tensor[tuple(slice(length) for length in lengths)]
    missing = [size - length for size, length in zip(tensor.shape, lengths, strict=True)]
    # padded and not written into, so that it runs under vmap
    return torch.nn.functional.pad(part, [side for size in reversed(missing) for side in (0, size)])


def _refusal(name: str, shape: tuple[int, ...], why: str) -> MisconfigurationException:
    return MisconfigurationException(
        f"HeteroFL cannot cut {name!r} of shape {tuple(shape)}: it {why}. Use linear and convolution layers that feed "
        "one another in their order, or give every client width 1."
    )
