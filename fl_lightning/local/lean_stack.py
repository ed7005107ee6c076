"""Parameters and optimizer state of a group of clients, stacked along a first axis, and steps for some of them.

Shape:
    Leaves are ``(clients, *param.shape)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from fl_lightning.callbacks.learning_rates import scale_learning_rates
from fl_lightning.local.lean_step import ordinary

__all__ = ["CannotGroup", "Rate", "Rates", "Rows", "StackedOptimizer", "beside", "put", "stacked", "take", "trained"]

Rows: TypeAlias = int | Tensor
"""Some clients of a group: the first ``n``, or those at the positions of a tensor."""
Rate: TypeAlias = float | Tensor


class CannotGroup(Exception):
    """Why clients of this module train one by one."""


def stacked(tensor: Tensor, num_clients: int, turned: bool) -> Tensor:
    """Return copies of a tensor along a new first axis.

    Args:
        tensor: what every client starts from.
        num_clients: how many copies.
        turned: keep each matrix transposed in memory. That is how a batched product gives the gradient of a linear
            layer's weight, and a step over two layouts takes three times as long as over one.

    Example:
        >>> stack = stacked(torch.ones(2, 3), 4, turned=True)
        >>> stack.shape, stack.stride()
        (torch.Size([4, 2, 3]), (6, 1, 2))
    """
    if turned:
        return stacked(tensor.t().contiguous(), num_clients, turned=False).mT
    return tensor.expand(num_clients, *tensor.shape).clone(memory_format=torch.contiguous_format)


def take(stack: Sequence[Tensor], rows: Rows) -> list[Tensor]:
    """Return the rows of each tensor: views of the first ones, copies of others."""
    if isinstance(rows, int):
        return [tensor[:rows] for tensor in stack]
    return [
        tensor.index_select(0, rows) if tensor.is_contiguous() else tensor.mT.index_select(0, rows).mT
        for tensor in stack
    ]


def put(stack: Sequence[Tensor], rows: Rows, values: Sequence[Tensor]) -> None:
    """Write back what :func:`take` copied; views have been written already."""
    if not isinstance(rows, int):
        for tensor, value in zip(stack, values, strict=True):
            tensor.index_copy_(0, rows, value)


def beside(rate: Tensor, tensor: Tensor) -> Tensor:
    """Return one number for each client in a shape that stands against ``(clients, *shape)``."""
    return rate.to(tensor.dtype).view(-1, *[1] * (tensor.ndim - 1))


class Rates:
    """Learning rates of an optimizer by the number of times its scheduler has stepped.

    Args:
        optimizer: fresh from ``configure_optimizers``.
        configs: its scheduler, or none.
        factor: of ``client_lr_schedule``.
        rate: of ``client_overrides``, or ``None``.

    Raises:
        CannotGroup: for several schedulers, or one that changes more than learning rates.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> Rates(SGD([weight], lr=0.5), [], factor=0.5, rate=None).at(7)
        (0.25,)
    """

    def __init__(self, optimizer: Optimizer, configs: Sequence[Any], factor: float, rate: float | None) -> None:
        if len(configs) > 1:
            raise CannotGroup("it has several learning-rate schedulers")
        scale_learning_rates([optimizer], configs, factor, rate)
        self._optimizer = optimizer
        self.config = configs[0] if configs else None
        self._others = self._without_rates()
        self._known = [self._now()]

    def at(self, count: int) -> tuple[float, ...]:
        """Return the rate of each parameter group after ``count`` steps of the scheduler."""
        if self.config is None:
            return self._known[0]
        while len(self._known) <= count:
            self._optimizer._opt_called = True  # type: ignore[attr-defined]  # or the scheduler warns
            self.config.scheduler.step()
            if self._without_rates() != self._others:
                raise CannotGroup("its learning-rate scheduler changes more than learning rates")
            self._known.append(self._now())
        return self._known[count]

    def _now(self) -> tuple[float, ...]:
        return tuple(float(group["lr"]) for group in self._optimizer.param_groups)

    def _without_rates(self) -> list[dict[str, Any]]:
        return [
            {key: value for key, value in group.items() if key not in ("params", "lr")}
            for group in self._optimizer.param_groups
        ]


def trained(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters that an optimizer steps, in the order of its groups: frozen ones have no gradient."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


class StackedOptimizer:
    """SGD, Adam and AdamW for some clients of a group at a time, each client at its own step.

    Args:
        optimizer: fresh from ``configure_optimizers``; says the kind and the numbers.
        params: stacked parameters, in the order of :func:`trained`.

    Raises:
        CannotGroup: for any other optimizer.
    """

    def __init__(self, optimizer: Optimizer, params: Sequence[Tensor]) -> None:
        kind = type(optimizer)
        if kind not in (SGD, Adam, AdamW) or not all(ordinary(group) for group in optimizer.param_groups):
            raise CannotGroup(f"its optimizer is {kind.__name__} with settings that have no stacked form")
        if any(group.get("dampening") for group in optimizer.param_groups):
            raise CannotGroup("its optimizer has dampening, which treats a client's first step in its own way")
        self._groups = optimizer.param_groups
        self._slices, start = [], 0
        for group in self._groups:
            count = sum(p.requires_grad for p in group["params"])
            self._slices.append(slice(start, start + count))
            start += count
        self._adaptive = kind is not SGD
        momentum = self._adaptive or any(group["momentum"] for group in self._groups)
        self._first = [torch.zeros_like(p) for p in params] if momentum else []
        self._second = [torch.zeros_like(p) for p in params] if self._adaptive else []

    def step(
        self,
        rows: Rows,
        params: list[Tensor],
        grads: Sequence[Tensor | None],
        rates: Sequence[Rate],
        counts: Sequence[int],
    ) -> None:
        """Step some clients in place.

        Args:
            rows: which.
            params: their parameters, from :func:`take`.
            grads: their gradients, of the same shapes; ``None`` where plain SGD's step has been made already.
            rates: for each parameter group one learning rate, or one for each of the clients.
            counts: how many steps each of the clients has made before.
        """
        for group, part, rate in zip(self._groups, self._slices, rates, strict=True):
            pairs = [(p, g) for p, g in zip(params[part], grads[part], strict=True) if g is not None]
            left, own = [p for p, _ in pairs], [g for _, g in pairs]
            if self._adaptive:
                self._adam(group, part, rows, left, own, rate, counts)
            else:
                self._sgd(group, part, rows, left, own, rate)

    def _sgd(
        self, group: dict[str, Any], part: slice, rows: Rows, params: list[Tensor], grads: list[Tensor], rate: Rate
    ) -> None:
        if group["weight_decay"]:
            grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
        momentum = group["momentum"]
        if momentum:
            buffers = take(self._first[part], rows)
            # the buffers start from zero, so that the first gradient enters whole, as in torch
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, grads)
            put(self._first[part], rows, buffers)
            grads = list(torch._foreach_add(grads, buffers, alpha=momentum)) if group["nesterov"] else buffers
        if isinstance(rate, float):
            torch._foreach_add_(params, grads, alpha=-rate)
            return
        for param, grad in zip(params, grads, strict=True):
            param.addcmul_(grad, beside(-rate, param))

    def _adam(
        self,
        group: dict[str, Any],
        part: slice,
        rows: Rows,
        params: list[Tensor],
        grads: list[Tensor],
        rate: Rate,
        counts: Sequence[int],
    ) -> None:
        decay, (beta1, beta2) = group["weight_decay"], group["betas"]
        if decay and not group.get("decoupled_weight_decay"):
            grads = list(torch._foreach_add(grads, params, alpha=decay))
        first, second = take(self._first[part], rows), take(self._second[part], rows)
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, value=1 - beta2)
        put(self._first[part], rows, first)
        put(self._second[part], rows, second)
        # each client is at a step of its own, so its bias corrections are its own
        done = torch.tensor(counts, dtype=torch.float64) + 1
        size = rate / (1 - beta1**done)
        root = (1 - beta2**done).sqrt()
        for param, m, v in zip(params, first, second, strict=True):
            if decay and group.get("decoupled_weight_decay"):
                param.mul_(1 - rate * decay if isinstance(rate, float) else beside(1 - rate * decay, param))
            denominator = (v.sqrt() / beside(root, v)).add_(group["eps"])
            param.sub_(m * beside(size, m) / denominator)
