"""The adaptive server optimizers of Reddi et al., as torch optimizers, so that checkpoints and schedulers know them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from fl_lightning.callbacks.checks import in_unit_interval, non_negative, positive

__all__ = ["ServerAdagrad", "ServerAdam", "ServerOptimizer", "ServerYogi", "checked_settings"]


class ServerOptimizer(Optimizer):
    r"""Algorithm 2 of Reddi et al. 2021; a subclass says how the second moment grows.

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1)\,\Delta, \qquad x \leftarrow x + \eta \frac{m}{\sqrt{v} + \tau}

    :math:`\Delta = -g` is the mean update of the clients. There is no bias correction, and :math:`\tau` stands outside
    of the root: ``torch.optim.Adam`` differs in the first.

    Args:
        params: parameters or parameter groups.
        lr: server learning rate :math:`\eta`, > 0.
        beta1: decay of the first moment, in [0, 1).
        beta2: decay of the second moment, in [0, 1).
        tau: degree of adaptivity, > 0; larger is closer to plain averaging.
        initial_v: second moment before the first round, >= 0; ``None`` is :math:`\tau^2`, the paper's.

    Raises:
        MisconfigurationException: for a value out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        beta1: float = 0.9,
        beta2: float = 0.99,
        tau: float = 1e-3,
        initial_v: float | None = None,
    ) -> None:
        super().__init__(params, checked_settings(type(self).__name__, lr, beta1, beta2, tau, initial_v))

    def second_moment(self, v: Tensor, squared: Tensor, beta2: float) -> None:
        """Bring ``v`` up to date in place, given the squared update of this round."""
        raise NotImplementedError(f"{type(self).__name__} must define second_moment(v, squared, beta2).")

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step once; Lightning's closure runs the round."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)
        return loss

    def _step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["m"] = torch.zeros_like(parameter)
            state["v"] = torch.full_like(parameter, group["initial_v"])
        m, v = state["m"], state["v"]
        m.mul_(group["beta1"]).add_(gradient, alpha=-(1 - group["beta1"]))
        self.second_moment(v, gradient * gradient, group["beta2"])
        parameter.addcdiv_(m, v.sqrt().add_(group["tau"]), value=group["lr"])


def checked_settings(
    owner: str, lr: float, beta1: float, beta2: float, tau: float, initial_v: float | None
) -> dict[str, float]:
    """Return the settings of a :class:`ServerOptimizer`.

    Args:
        owner: the class that the user wrote, for the error.
        lr, beta1, beta2, tau, initial_v: as in :class:`ServerOptimizer`.

    Raises:
        MisconfigurationException: for a value out of range.
    """
    tau = positive(owner, "tau", tau)
    return {
        "lr": positive(owner, "lr", lr),
        "beta1": in_unit_interval(owner, "beta1", beta1),
        "beta2": in_unit_interval(owner, "beta2", beta2),
        "tau": tau,
        "initial_v": tau**2 if initial_v is None else non_negative(owner, "initial_v", initial_v),
    }


class ServerAdagrad(ServerOptimizer):
    r""":class:`ServerOptimizer` with :math:`v \leftarrow v + \Delta^2`; ``beta2`` has no effect.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = ServerAdagrad([weight], lr=1.0, beta1=0.0, tau=1.0)
        >>> weight.grad = torch.full((1,), -3.0**0.5)  # v = 1 + 3, so the step is sqrt(3) / (2 + 1)
        >>> optimizer.step()
        >>> round(weight.item(), 4)
        0.5774
    """

    def second_moment(self, v: Tensor, squared: Tensor, beta2: float) -> None:
        v.add_(squared)


class ServerAdam(ServerOptimizer):
    r""":class:`ServerOptimizer` with :math:`v \leftarrow \beta_2 v + (1 - \beta_2)\,\Delta^2`.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = ServerAdam([weight], lr=1.0, beta1=0.0, beta2=0.5, tau=1.0)
        >>> weight.grad = torch.full((1,), -(7.0**0.5))  # v = (1 + 7) / 2
        >>> optimizer.step()
        >>> round(weight.item(), 4)
        0.8819
    """

    def second_moment(self, v: Tensor, squared: Tensor, beta2: float) -> None:
        v.mul_(beta2).add_(squared, alpha=1 - beta2)


class ServerYogi(ServerOptimizer):
    r""":class:`ServerOptimizer` with :math:`v \leftarrow v - (1 - \beta_2)\,\Delta^2\,\mathrm{sign}(v - \Delta^2)`.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = ServerYogi([weight], lr=1.0, beta1=0.0, beta2=0.5, tau=1.0)
        >>> weight.grad = torch.full((1,), -(6.0**0.5))  # v = 1 + 6 / 2
        >>> optimizer.step()
        >>> round(weight.item(), 4)
        0.8165
    """

    def second_moment(self, v: Tensor, squared: Tensor, beta2: float) -> None:
        v.sub_((1 - beta2) * squared * torch.sign(v - squared))
