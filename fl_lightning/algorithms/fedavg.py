"""Federated averaging."""

from __future__ import annotations

from fl_lightning.algorithms.base import Algorithm

__all__ = ["FedAvg"]


class FedAvg(Algorithm):
    r"""Federated averaging: the server moves by the weighted mean of the clients' updates.

    .. math:: w_{t+1} = w_t + \frac{\sum_k n_k \delta_k}{\sum_k n_k}, \qquad \delta_k = w_t^k - w_t

    With another ``server_optimizer`` the negative mean update is that optimizer's gradient (FedOpt, Reddi et al. 2021,
    algorithm 1): ``FedAvg(server_optimizer=lambda params: torch.optim.Adam(params, lr=0.01))``.

    Args:
        server_optimizer: parameters to the server's torch optimizer; ``None`` is ``SGD(lr=1)``, the paper's server.
        server_lr_scheduler: optimizer to a learning-rate scheduler, stepped once a round.
        weights: ``"examples"`` (:math:`n_k`), ``"uniform"``, or a callable ``ClientUpdate -> float``.

    Example:
        >>> from fl_lightning.types import ClientUpdate, ClientTask
        >>> import torch
        >>> algorithm, task = FedAvg(), ClientTask("a", 0, 0, {}, seed=0)
        >>> update = ClientUpdate("a", {"w": torch.tensor([2.0])}, {}, num_examples=3, num_steps=1)
        >>> total, _ = algorithm.contribute(update, task, {})
        >>> gradient, _ = algorithm.apply(total, {}, num_clients=1)
        >>> gradient["w"].tolist()
        [-2.0]

    References:
        McMahan et al., *Communication-Efficient Learning of Deep Networks from Decentralized Data*, 2017, algorithm 1.
        Updates are averaged instead of models: the same in exact arithmetic, and right for weights of any sum.
    """
