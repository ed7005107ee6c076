"""The module that clients train in: one per process, as good as new for each client."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import AttributeDict
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from fl_lightning.types import Tree

__all__ = ["Worker", "copied_module", "load_tensors", "moved", "read_tensors"]

_TENSOR_DICTS = ("_parameters", "_buffers", "_modules")
_ATOMIC = (int, float, complex, bool, str, bytes, type(None), type, torch.dtype, torch.device, torch.Size)
_COMPARED = (int, float, complex, bool, str, bytes, torch.dtype, torch.device, torch.Size)
# what a loop sets while it trains
_LIGHTNINGS_OWN = {"_trainer", "_current_fx_name", "_metric_attributes", "log"}
_MAPPINGS = (dict, OrderedDict, AttributeDict)


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
    _copy_hooks(module, duplicate)
    return duplicate


def _copy_hooks(module: nn.Module, duplicate: nn.Module) -> None:
    """Register the hooks of parameters again, which a copy of a tensor does not have."""
    for own, other in zip(module.parameters(), duplicate.parameters(), strict=True):
        for hook in (own._backward_hooks or {}).values():
            other.register_hook(hook)  # type: ignore[no-untyped-call]
        for hook in (getattr(own, "_post_accumulate_grad_hooks", None) or {}).values():
            other.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]


class Worker:
    """A module that forgets every client.

    :meth:`restore` puts back parameters, buffers, submodules and all other attributes as they were at construction:
    counters, lists, metrics and layers that ``setup`` builds do not leak from one client to the next. The module
    object itself stays the same.

    Containers of numbers, strings and the like are compared with how they were, which is much cheaper than copying
    them; everything that cannot be compared is copied for every client.

    Args:
        module: a copy of the user's module, which is the worker's from now on.
        device: where clients train.
        memory_format: ``"channels_last"`` lays out four-dimensional weights by pixel.
    """

    def __init__(self, module: pl.LightningModule, device: torch.device, memory_format: str = "contiguous") -> None:
        self.module = module
        self.module.to(device)
        if memory_format == "channels_last":
            for parameter in self.module.parameters():
                if parameter.ndim == 4:
                    # `contiguous` would leave the strides of a single channel, and torch then takes the other kernels
                    parameter.data = parameter.data.to(memory_format=torch.channels_last)
        self._requires_grad = [(p, p.requires_grad) for p in self.module.parameters()]
        frozen = [p for p, requires_grad in self._requires_grad if not requires_grad]
        self._values: list[Tensor] = [*frozen, *self.module.buffers()]
        self._saved_values = [tensor.detach().clone() for tensor in self._values]
        self._parts = [_Part(part) for part in self.module.modules()]
        self._sort_attributes()

    def _sort_attributes(self) -> None:
        """Sort what is no plain value into what can be compared with a copy of itself and what cannot."""
        attributes = [(part.own, name, value) for part in self._parts for name, value in part.mutable.items()]
        copies = copy.deepcopy([value for _, _, value in attributes], self._identities())
        same = [_same(value, saved) for (_, _, value), saved in zip(attributes, copies, strict=True)]
        seen: set[int] = set()
        for (_, _, value), comparable in zip(attributes, same, strict=True):
            if comparable:
                _containers(value, seen)
        memo = self._identities()
        rest = [value for (_, _, value), comparable in zip(attributes, same, strict=True) if not comparable]
        copy.deepcopy(rest, memo)
        if seen & memo.keys():  # an object that both kinds share has to stay one object in their copies
            same = [False] * len(same)
        rows = list(zip(attributes, copies, same, strict=True))
        self._compared = [(*attribute, saved) for attribute, saved, comparable in rows if comparable]
        opaque = [(*attribute, saved) for attribute, saved, comparable in rows if not comparable]
        self._opaque = [(own, name) for own, name, _, _ in opaque]
        self._saved_opaque = [saved for *_, saved in opaque]

    def _identities(self) -> dict[int, Any]:
        # modules, parameters and buffers that an attribute refers to stay themselves in a copy of the attribute
        memo: dict[int, Any] = {}
        for part in self._parts:
            memo[id(part.module)] = part.module
            for group in ("_parameters", "_buffers"):
                memo.update({id(tensor): tensor for tensor in part.groups[group].values() if tensor is not None})
        return memo

    def restore(self) -> None:
        """Make the module as good as new; the values of trainable parameters are the caller's to load."""
        for part in self._parts:
            part.restore()
        if not self._unchanged():
            self._renew()
        elif self._opaque:
            copies = copy.deepcopy(self._saved_opaque, self._identities())
            for (own, name), value in zip(self._opaque, copies, strict=True):
                own[name] = value
        for parameter, requires_grad in self._requires_grad:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            parameter.grad = None
        if self._values:
            with torch.no_grad():
                torch._foreach_copy_(self._values, self._saved_values)

    def changed(self) -> str | None:
        """Return the name of a plain attribute that is not as :meth:`restore` left it, or ``None``."""
        for part in self._parts:
            for name, value in part.fixed.items():
                if name not in _LIGHTNINGS_OWN and part.own.get(name) is not value and part.own.get(name) != value:
                    return name
            new = part.own.keys() - part.names - _LIGHTNINGS_OWN
            if new:
                return min(new)
        for own, name, value, saved in self._compared:
            if name not in _LIGHTNINGS_OWN and (own.get(name) is not value or not _same(value, saved)):
                return name
        return None

    def _unchanged(self) -> bool:
        for own, name, value, saved in self._compared:
            if own.get(name) is not value or ((value or saved) and not _same(value, saved)):
                return False
        return True

    def _renew(self) -> None:
        saved = [saved for *_, saved in self._compared]
        compared, opaque = copy.deepcopy((saved, self._saved_opaque), self._identities())
        renewed = []
        for (own, name, _, old), value in zip(self._compared, compared, strict=True):
            own[name] = value
            renewed.append((own, name, value, old))
        self._compared = renewed
        for (own, name), value in zip(self._opaque, opaque, strict=True):
            own[name] = value


class _Part:
    """The attributes of one module of a tree, as they were."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.own = vars(module)
        self.groups: dict[str, dict[str, Any]] = {name: dict(self.own[name]) for name in _TENSOR_DICTS}
        rest = {name: value for name, value in self.own.items() if name not in _TENSOR_DICTS}
        self.fixed = {name: value for name, value in rest.items() if isinstance(value, _ATOMIC)}
        self.mutable = {name: value for name, value in rest.items() if name not in self.fixed}
        self.names = frozenset((*self.groups, *rest))
        self._identities = {name: _identity(group) for name, group in self.groups.items()}

    def restore(self) -> None:
        """Put back plain values and the dictionaries of tensors and submodules, and forget new attributes."""
        own = self.own
        if own.keys() != self.names:
            for name in own.keys() - self.names:
                del own[name]
        own.update(self.fixed)
        for name, identity in self._identities.items():
            group = own.get(name)
            if group is None or _identity(group) != identity:
                own[name] = dict(self.groups[name])


def _identity(group: Mapping[str, Any]) -> tuple[Any, ...]:
    return (*group, *map(id, group.values()))


def _same(value: Any, saved: Any) -> bool:
    """Whether a value is known to be what it was: plain values, and containers of them, of the very same types."""
    if value is saved:
        return True
    kind = type(value)
    if kind is not type(saved):
        return False
    if kind in _MAPPINGS:
        if len(value) != len(saved):
            return False
        pairs = zip(value.items(), saved.items(), strict=True)
        return all(a[0] == b[0] and type(a[0]) is type(b[0]) and _same(a[1], b[1]) for a, b in pairs)
    if kind is list or kind is tuple:
        return len(value) == len(saved) and all(_same(a, b) for a, b in zip(value, saved, strict=True))
    if kind is set:
        return bool(value == saved) and {type(item) for item in value} <= set(_COMPARED)
    return kind in _COMPARED and bool(value == saved)


def _containers(value: Any, seen: set[int]) -> None:
    """Collect the ids of the containers in a value that can be compared."""
    if type(value) in _MAPPINGS:
        seen.add(id(value))
        for item in value.values():
            _containers(item, seen)
    elif type(value) in (list, tuple, set):
        seen.add(id(value))
        for item in value:
            _containers(item, seen)


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
