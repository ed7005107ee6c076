"""Federated averaging with a named server optimizer: FedAvgM, FedAdagrad, FedAdam and FedYogi."""

from __future__ import annotations

from functools import partial

import torch

from fl_lightning.algorithms.base import Algorithm, SchedulerCallable, Weights
from fl_lightning.algorithms.server_optimizers import (
    ServerAdagrad,
    ServerAdam,
    ServerOptimizer,
    ServerYogi,
    checked_settings,
)
from fl_lightning.callbacks.checks import in_unit_interval, positive

__all__ = ["FedAdagrad", "FedAdam", "FedAvgM", "FedYogi"]

# The optimizers are made with `partial` and not with a lambda: the client half of an algorithm must pickle.


class FedAvgM(Algorithm):
    r"""Federated averaging with momentum on the server.

    .. math:: v \leftarrow \beta v + \bar\delta_t, \qquad w_{t+1} = w_t + \eta\, v, \qquad
        \bar\delta_t = \frac{\sum_k n_k \delta_k}{\sum_k n_k}

    Args:
        momentum: :math:`\beta` in [0, 1); 0 with ``lr=1`` is FedAvg, bit for bit.
        lr: server learning rate :math:`\eta`, > 0.
        nesterov: look ahead, :math:`w_{t+1} = w_t + \eta\,(\bar\delta_t + \beta v)`.
        server_lr_scheduler: optimizer to a learning-rate scheduler, stepped once a round.
        weights: ``"examples"``, ``"uniform"``, or a callable ``ClientUpdate -> float``.

    Raises:
        MisconfigurationException: for a value out of range.

    Example:
        >>> optimizer = FedAvgM(momentum=0.9).server_optimizer([torch.nn.Parameter(torch.zeros(1))])
        >>> type(optimizer).__name__, optimizer.param_groups[0]["momentum"], optimizer.param_groups[0]["lr"]
        ('SGD', 0.9, 1.0)

    References:
        Hsu et al., *Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification*,
        2019, section 4.3.
    """

    def __init__(
        self,
        momentum: float = 0.9,
        lr: float = 1.0,
        nesterov: bool = False,
        server_lr_scheduler: SchedulerCallable | None = None,
        weights: Weights = "examples",
    ) -> None:
        self.momentum = in_unit_interval("FedAvgM", "momentum", momentum, "0 is FedAvg")
        self.lr = positive("FedAvgM", "lr", lr)
        # torch refuses the look-ahead without momentum, where it changes nothing
        ahead = nesterov and self.momentum > 0
        optimizer = partial(torch.optim.SGD, lr=self.lr, momentum=self.momentum, nesterov=ahead)
        super().__init__(optimizer, server_lr_scheduler, weights)


class _FedOpt(Algorithm):
    """Common constructor of the three adaptive algorithms."""

    _optimizer: type[ServerOptimizer]

    def __init__(
        self,
        lr: float = 0.01,
        beta1: float = 0.9,
        beta2: float = 0.99,
        tau: float = 1e-3,
        initial_v: float | None = None,
        server_lr_scheduler: SchedulerCallable | None = None,
        weights: Weights = "examples",
    ) -> None:
        optimizer = partial(self._optimizer, lr=lr, beta1=beta1, beta2=beta2, tau=tau, initial_v=initial_v)
        # a value out of range is an error here and not in the first round
        checked_settings(type(self).__name__, lr, beta1, beta2, tau, initial_v)
        super().__init__(optimizer, server_lr_scheduler, weights)


class FedAdam(_FedOpt):
    r"""Federated averaging whose server is Adam as Reddi et al. write it.

    .. math:: m \leftarrow \beta_1 m + (1-\beta_1)\,\bar\delta_t, \qquad
        v \leftarrow \beta_2 v + (1-\beta_2)\,\bar\delta_t^2, \qquad
        w_{t+1} = w_t + \eta \frac{m}{\sqrt{v} + \tau}

    There is no bias correction, and :math:`v` starts at :math:`\tau^2`. torch's Adam corrects:
    ``FedAvg(server_optimizer=lambda params: torch.optim.Adam(params, lr=0.01))`` is the alternative.

    Args:
        lr: server learning rate :math:`\eta`, > 0.
        beta1: decay of the mean update, in [0, 1).
        beta2: decay of its square, in [0, 1).
        tau: degree of adaptivity, > 0, in units of the update.
        initial_v: :math:`v` before the first round, >= 0; ``None`` is :math:`\tau^2`.
        server_lr_scheduler: optimizer to a learning-rate scheduler, stepped once a round.
        weights: ``"examples"``, ``"uniform"``, or a callable ``ClientUpdate -> float``.

    Raises:
        MisconfigurationException: for a value out of range.

    Example:
        >>> optimizer = FedAdam(lr=0.1).server_optimizer([torch.nn.Parameter(torch.zeros(1))])
        >>> type(optimizer).__name__, optimizer.param_groups[0]["tau"]
        ('ServerAdam', 0.001)

    References:
        Reddi et al., *Adaptive Federated Optimization*, 2021, algorithm 2.
    """

    _optimizer = ServerAdam


class FedYogi(_FedOpt):
    r"""Federated averaging whose server is Yogi: the second moment moves by bounded steps.

    .. math:: v \leftarrow v - (1-\beta_2)\,\bar\delta_t^2\,\mathrm{sign}(v - \bar\delta_t^2)

    and everything else as in :class:`FedAdam`.

    Args:
        lr: server learning rate :math:`\eta`, > 0.
        beta1: decay of the mean update, in [0, 1).
        beta2: decay of its square, in [0, 1).
        tau: degree of adaptivity, > 0, in units of the update.
        initial_v: :math:`v` before the first round, >= 0; ``None`` is :math:`\tau^2`.
        server_lr_scheduler: optimizer to a learning-rate scheduler, stepped once a round.
        weights: ``"examples"``, ``"uniform"``, or a callable ``ClientUpdate -> float``.

    Raises:
        MisconfigurationException: for a value out of range.

    Example:
        >>> type(FedYogi().server_optimizer([torch.nn.Parameter(torch.zeros(1))])).__name__
        'ServerYogi'

    References:
        Reddi et al., *Adaptive Federated Optimization*, 2021, algorithm 2.
    """

    _optimizer = ServerYogi


class FedAdagrad(_FedOpt):
    r"""Federated averaging whose server is Adagrad: the second moment only grows.

    .. math:: v \leftarrow v + \bar\delta_t^2

    and everything else as in :class:`FedAdam`.

    Args:
        lr: server learning rate :math:`\eta`, > 0.
        beta1: decay of the mean update, in [0, 1); 0 as in the paper's experiments.
        tau: degree of adaptivity, > 0, in units of the update.
        initial_v: :math:`v` before the first round, >= 0; ``None`` is :math:`\tau^2`.
        server_lr_scheduler: optimizer to a learning-rate scheduler, stepped once a round.
        weights: ``"examples"``, ``"uniform"``, or a callable ``ClientUpdate -> float``.

    Raises:
        MisconfigurationException: for a value out of range.

    Example:
        >>> FedAdagrad().server_optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]["beta1"]
        0.0

    References:
        Reddi et al., *Adaptive Federated Optimization*, 2021, algorithm 2.
    """

    _optimizer = ServerAdagrad

    def __init__(
        self,
        lr: float = 0.01,
        beta1: float = 0.0,
        tau: float = 1e-3,
        initial_v: float | None = None,
        server_lr_scheduler: SchedulerCallable | None = None,
        weights: Weights = "examples",
    ) -> None:
        super().__init__(lr, beta1, 0.0, tau, initial_v, server_lr_scheduler, weights)
