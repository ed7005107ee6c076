"""The optimizer's step for all parameters in a few calls, with the bits of ``torch.optim``.

``torch.optim`` walks over parameters in Python on the CPU. The same arithmetic through ``torch._foreach_*`` is one call
for each operation, and the kernels that run are the same ones. The state lives in ``optimizer.state`` all the time, so
that saving, callbacks and a step by the optimizer itself see what they expect.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

__all__ = ["ordinary", "step_function"]


def step_function(optimizer: Optimizer) -> Callable[[], None]:
    """Return what steps the optimizer: a faster way with the same bits, or ``optimizer.step`` itself.

    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> step = step_function(SGD([weight], lr=0.5))
        >>> weight.grad = torch.tensor([1.0, 2.0])
        >>> step()
        >>> weight.tolist()
        [0.5, 0.0]
    """
    kind = type(optimizer)
    updates: dict[type[Optimizer], Callable[[Optimizer, dict[str, Any]], bool]] = {
        SGD: _sgd, Adam: _adam, AdamW: _adam,
    }  # fmt: skip
    if kind not in updates or not all(ordinary(group) for group in optimizer.param_groups) or _hooked(optimizer):
        return optimizer.step
    update = updates[kind]

    @torch.no_grad()
    def step() -> None:
        for group in optimizer.param_groups:
            if not update(optimizer, group):
                break
        else:
            optimizer._opt_called = True  # type: ignore[attr-defined]  # or a scheduler warns that no step came first
            for hook in tuple(optimizer._optimizer_step_post_hooks.values()):
                hook(optimizer, (), {})
            return
        if group is not optimizer.param_groups[0]:
            raise RuntimeError("the parameter groups of an optimizer differ in which parameters have dense gradients")
        optimizer.step()

    return step


def ordinary(group: dict[str, Any]) -> bool:
    """Whether a parameter group asks for nothing but its optimizer's plain arithmetic on dense CPU tensors."""
    flags = ("maximize", "differentiable", "foreach", "fused", "capturable", "amsgrad")
    numbers = ("lr", "weight_decay", "momentum", "dampening", "eps")
    dense = all(p.device.type == "cpu" and p.is_floating_point() and not p.is_sparse for p in group["params"])
    plain = all(isinstance(group.get(name, 0), int | float) for name in numbers)
    return dense and plain and not any(group.get(flag) for flag in flags)


def _hooked(optimizer: Optimizer) -> bool:
    return bool(optimizer._optimizer_step_pre_hooks or _global_optimizer_pre_hooks or _global_optimizer_post_hooks)


def _gradients(group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]] | None:
    params: list[Tensor] = group["params"]
    grads = [p.grad for p in params]
    if any(grad is None for grad in grads):
        pairs = [(p, g) for p, g in zip(params, grads, strict=True) if g is not None]
        params, found = [p for p, _ in pairs], [g for _, g in pairs]
    else:
        found = grads  # type: ignore[assignment]
    if any(grad.layout is not torch.strided for grad in found):
        return None
    return params, found


def _sgd(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    pair = _gradients(group)
    if pair is None:
        return False
    params, grads = pair
    if not params:
        return True
    if group["weight_decay"]:
        grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
    momentum = group["momentum"]
    if momentum:
        grads = _momentum(optimizer, group, params, grads, momentum)
    torch._foreach_add_(params, grads, alpha=-group["lr"])
    return True


def _momentum(
    optimizer: Optimizer, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], momentum: float
) -> list[Tensor]:
    states = [optimizer.state[p] for p in params]
    buffers = [state.get("momentum_buffer") for state in states]
    known = [(b, g) for b, g in zip(buffers, grads, strict=True) if b is not None]
    if known:
        old = [b for b, _ in known]
        torch._foreach_mul_(old, momentum)
        torch._foreach_add_(old, [g for _, g in known], alpha=1 - group["dampening"])
    for i, (buffer, state) in enumerate(zip(buffers, states, strict=True)):
        if buffer is None:  # the first gradient enters whole, without dampening
            buffers[i] = state["momentum_buffer"] = grads[i].detach().clone()
    if group["nesterov"]:
        return list(torch._foreach_add(grads, buffers, alpha=momentum))
    return buffers


def _adam(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    pair = _gradients(group)
    if pair is None:
        return False
    params, grads = pair
    if not params:
        return True
    states = [optimizer.state[p] for p in params]
    for p, state in zip(params, states, strict=True):
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
    steps = [state["step"] for state in states]
    torch._foreach_add_(steps, 1)
    lr, decay, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
    if decay and group.get("decoupled_weight_decay"):
        torch._foreach_mul_(params, 1 - lr * decay)
    elif decay:
        grads = list(torch._foreach_add(grads, params, alpha=decay))
    first, second = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
    torch._foreach_lerp_(first, grads, 1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, grads, grads, value=1 - beta2)
    counts = [step.item() for step in steps]
    denominators = torch._foreach_sqrt(second)
    torch._foreach_div_(denominators, [(1 - beta2**count) ** 0.5 for count in counts])
    torch._foreach_add_(denominators, group["eps"])
    torch._foreach_addcdiv_(params, first, denominators, [-(lr / (1 - beta1**count)) for count in counts])
    return True
