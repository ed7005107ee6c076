"""The module that clients train in: one per process, as good as new for each client."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from fl_lightning.types import Tree

__all__ = ["Worker", "copied_module", "load_tensors", "moved", "read_tensors"]

_TENSOR_DICTS = ("_parameters", "_buffers", "_modules")
_ATOMIC = (int, float, complex, bool, str, bytes, type(None), type, torch.dtype, torch.device, torch.Size)


def copied_module(module: pl.LightningModule) -> pl.LightningModule:
    """Return a deep copy of a user's module that can log.

    Raises:
        MisconfigurationException: when an attribute of the module cannot be copied.
    """
    try:
        duplicate = copy.deepcopy(module)
    except Exception as error:  # whatever a user's attribute raises
        raise MisconfigurationException(
            f"{type(module).__name__} cannot be copied for the clients: {type(error).__name__}: {error}. Every client "
            "trains in a copy of the module: create open files, locks and connections in setup() or on_fit_start()."
        ) from error
    # Lightning keeps metric attributes by object id; the copies of the metrics have other ids
    duplicate._metric_attributes = None
    return duplicate


class Worker:
    """A module that forgets every client.

    :meth:`restore` puts back parameters, buffers, submodules and all other attributes as they were at construction:
    counters, lists, metrics and layers that ``setup`` builds do not leak from one client to the next. The module
    object itself stays the same.

    Args:
        module: a copy of the user's module, which is the worker's from now on.
        device: where clients train.
    """

    def __init__(self, module: pl.LightningModule, device: torch.device) -> None:
        self.module = module
        self.module.to(device)
        self._requires_grad = {p: p.requires_grad for p in self.module.parameters()}
        self._values = {p: p.detach().clone() for p in self._requires_grad if not p.requires_grad}
        self._tensors: list[tuple[nn.Module, dict[str, dict[str, Any]]]] = []
        self._fixed: list[dict[str, Any]] = []
        mutable: list[dict[str, Any]] = []
        for part in self.module.modules():
            self._tensors.append((part, {name: dict(part.__dict__[name]) for name in _TENSOR_DICTS}))
            rest = {name: value for name, value in part.__dict__.items() if name not in _TENSOR_DICTS}
            self._fixed.append({name: value for name, value in rest.items() if isinstance(value, _ATOMIC)})
            mutable.append({name: value for name, value in rest.items() if not isinstance(value, _ATOMIC)})
        self._buffers = [(b, b.detach().clone()) for b in self.module.buffers()]
        self._mutable = copy.deepcopy(mutable, self._identities())

    def _identities(self) -> dict[int, Any]:
        # modules, parameters and buffers that an attribute refers to stay themselves in a copy of the attribute
        memo: dict[int, Any] = {id(part): part for part, _ in self._tensors}
        for _, groups in self._tensors:
            for group in ("_parameters", "_buffers"):
                memo.update({id(tensor): tensor for tensor in groups[group].values() if tensor is not None})
        return memo

    def restore(self) -> None:
        """Make the module as good as new; the values of trainable parameters are the caller's to load."""
        mutable = copy.deepcopy(self._mutable, self._identities())
        for (part, groups), fixed, changed in zip(self._tensors, self._fixed, mutable, strict=True):
            part.__dict__.clear()
            part.__dict__.update(fixed)
            part.__dict__.update(changed)
            for name, group in groups.items():
                part.__dict__[name] = dict(group)
        for parameter, requires_grad in self._requires_grad.items():
            parameter.requires_grad_(requires_grad)
            parameter.grad = None
        with torch.no_grad():
            for parameter, value in self._values.items():
                parameter.copy_(value)
            for buffer, value in self._buffers:
                buffer.copy_(value)


@torch.no_grad()
def load_tensors(module: nn.Module, trees: Iterable[Tree]) -> None:
    """Copy named values into a module's parameters and buffers, whatever their precision.

    Raises:
        MisconfigurationException: when the module has no tensor of that name or shape.
    """
    own: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    own.update(module.named_buffers(remove_duplicate=False))
    for tree in trees:
        for name, value in tree.items():
            target = own.get(name)
            if target is None or target.shape != value.shape:
                found = "nothing" if target is None else f"shape {tuple(target.shape)}"
                raise MisconfigurationException(
                    f"Expected {name!r} of shape {tuple(value.shape)} in the client's {type(module).__name__}, got "
                    f"{found}. setup() and configure_model() must build the same layers on every client."
                )
            target.copy_(value)


@torch.no_grad()
def read_tensors(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return copies of the named parameters and buffers."""
    own: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    own.update(module.named_buffers(remove_duplicate=False))
    return {name: own[name].detach().clone() for name in names}


@torch.no_grad()
def moved(module: nn.Module, start: Tree) -> dict[str, Tensor]:
    """Return ``local - start`` in the precision of ``start``.

    Under ``bf16-true`` the client starts from the rounded global model; the difference is taken from what it started
    from, so that a client that does not move contributes exactly zero.
    """
    own: Mapping[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    names = list(start)
    if not names:
        return {}
    local = [own[name].detach() for name in names]
    begin = [start[name] for name in names]
    if any(a.dtype != b.dtype for a, b in zip(local, begin, strict=True)):
        return {n: a.to(b.dtype) - b.to(a.dtype).to(b.dtype) for n, a, b in zip(names, local, begin, strict=True)}
    return dict(zip(names, torch._foreach_sub(local, begin), strict=True))
