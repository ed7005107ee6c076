"""Linear layers of a group of clients, whose weights take plain SGD's step without a gradient ever being written.

A gradient of all weights is as large as the weights of the whole group, which no cache holds. Writing it and reading it
again is most of what a step costs. So the backward pass stops at the outputs ``z = x·Wᵀ + b`` of linear layers, and the
product that would be the gradient is added to the weight at once::

    W ← (1 − η·λ)·W − η·(∂L/∂z)ᵀ·x

That is SGD's step with another rounding, as groups round differently anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.optim import SGD, Optimizer

from fl_lightning.local.lean_stack import Rate, beside

__all__ = ["CannotFuse", "FusedLinears", "plain_sgd", "step_weight"]


class CannotFuse(Exception):
    """A weight is used for more than its layer: the group starts again with whole gradients."""


def plain_sgd(optimizer: Optimizer) -> bool:
    """Whether a step only adds the gradient and decays the weight.

    Example:
        >>> weight = nn.Parameter(torch.ones(1))
        >>> plain_sgd(SGD([weight], lr=0.1)), plain_sgd(SGD([weight], lr=0.1, momentum=0.9))
        (True, False)
    """
    return type(optimizer) is SGD and not any(group["momentum"] for group in optimizer.param_groups)


@dataclass(slots=True)
class FusedLinears:
    """The linear layers of a module whose weights take their steps from the layers' inputs and outputs.

    Args:
        parts: layers by the name of their weight.
    """

    parts: Mapping[str, nn.Linear]
    _now: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False)

    @classmethod
    def of(cls, module: nn.Module, names: Sequence[str]) -> FusedLinears:
        """Return the layers of exactly that type whose weight is a parameter of the optimizer and of no other layer."""
        owners: dict[int, list[nn.Module]] = {}
        for part in module.modules():
            for own in part.parameters(recurse=False):
                owners.setdefault(id(own), []).append(part)
        parts = {}
        for name, parameter in module.named_parameters():
            first, *others = owners[id(parameter)]
            if name in names and not others and type(first) is nn.Linear and first.weight is parameter:
                parts[name] = first
        return cls(parts)

    @contextmanager
    def forwards(self) -> Iterator[None]:
        """Let the layers keep what goes in and comes out."""
        try:
            for name, part in self.parts.items():
                vars(part)["forward"] = self._forward(name, part)
            yield
        finally:
            for part in self.parts.values():
                vars(part).pop("forward", None)

    def _forward(self, name: str, part: nn.Linear) -> Any:
        def forward(inputs: Tensor) -> Tensor:
            if name in self._now:
                raise CannotFuse(f"the layer of {name!r} runs twice in a step")
            outputs = nn.functional.linear(inputs, part.weight, part.bias)
            self._now[name] = inputs, outputs
            return outputs

        return forward

    def begin(self) -> None:
        """Before ``training_step``."""
        self._now.clear()

    def kept(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return what went in and came out of each layer in this call; ``vmap`` turns it into all clients'."""
        return dict(self._now)

    def outputs(self, losses: Tensor, leaves: Mapping[str, Tensor], kept: Mapping[str, tuple[Tensor, Tensor]]) -> Any:
        """Return the tensors at which the backward pass stops.

        Args:
            losses: the end of the graph.
            leaves: all parameters by name.
            kept: from :meth:`kept`.

        Raises:
            CannotFuse: when a weight is used outside of its layer, or a layer's input or output was changed in place,
                so that the gradient at its output is not the weight's whole story.
        """
        if kept.keys() != self.parts.keys():
            raise CannotFuse("a layer did not run")
        if any(x._version or z._version for x, z in kept.values()):
            raise CannotFuse("something works in place on what a layer takes or gives")
        ends = {get_gradient_edge(leaves[name]).node: name for name in self.parts}
        uses = dict.fromkeys(self.parts, 0)
        seen, todo = set(), [losses.grad_fn]
        while todo:
            node = todo.pop()
            for following, _ in node.next_functions:  # type: ignore[union-attr]
                if following in ends:
                    uses[ends[following]] += 1
                elif following is not None and following not in seen:
                    seen.add(following)
                    todo.append(following)
        if any(count != 1 for count in uses.values()):
            raise CannotFuse("a weight is used outside of its layer")
        return [kept[name][1] for name in self.parts]


@torch.no_grad()  # what went into a layer still has its graph, which the weight must not carry on
def step_weight(weight: Tensor, inputs: Tensor, grad: Tensor, rate: Rate, decay: float) -> None:
    """Make plain SGD's step in place.

    Args:
        weight: of all clients.
        inputs: what went into the layer.
        grad: the loss by what came out of it.
        rate: one learning rate, or one for each client.
        decay: weight decay.

    Shape:
        ``(clients, out, in)``, ``(clients, *rows, in)`` and ``(clients, *rows, out)``.

    Example:
        >>> weight = torch.ones(1, 1, 2)
        >>> step_weight(weight, torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0]]]), 0.5, decay=1.0)
        >>> weight.tolist()
        [[[-1.0, -2.5]]]
    """
    x, g = (t.reshape(t.shape[0], -1, t.shape[-1]) for t in (inputs, grad))
    if isinstance(rate, float):
        weight.baddbmm_(g.mT, x, beta=1 - rate * decay, alpha=-rate)
        return
    if decay:
        weight.mul_(beside(1 - rate * decay, weight))
    weight.baddbmm_((g * beside(-rate, g)).mT, x)
