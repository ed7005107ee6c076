"""FedProx: local training with a pull towards the global model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.pytorch import Callback

from fl_lightning.algorithms.base import Algorithm, OptimizerCallable, SchedulerCallable, State, Weights
from fl_lightning.callbacks import ProximalTerm
from fl_lightning.callbacks.checks import flag, non_negative
from fl_lightning.callbacks.start_pass import StartPass
from fl_lightning.types import ClientTask, ClientUpdate, Contribution, Memory, Tree

__all__ = ["FedProx"]

_STEP = 0.1
"""How far mu moves at a time (Li et al. 2020, section 5.3.2)."""
_KEY = "start loss"
_PATIENCE = 5
"""Rounds of falling loss after which mu goes down (the same section)."""


class FedProx(Algorithm):
    r"""Federated averaging of proximal local problems; the pull lets clients do unequal amounts of work.

    .. math:: \min_w F_k(w) + \frac{\mu}{2} \lVert w - w_t \rVert^2, \qquad
        w_{t+1} = w_t + \frac{\sum_k n_k \delta_k}{\sum_k n_k}

    What a client did before a deadline counts as it is: partial work needs no special case.

    Args:
        mu: strength of the proximal term, >= 0; 0 is FedAvg, bit for bit.
        adaptive: start from ``mu`` and let it follow the loss of the global model: up by 0.1 when it rose, down by 0.1
            after five rounds in which it fell. Each client of the cohort compares with the last time that it took part,
            because another cohort has another loss also when the model stays. Costs a pass over the clients' data.
        server_optimizer: parameters to the server's torch optimizer; ``None`` is ``SGD(lr=1)``.
        server_lr_scheduler: optimizer to a learning-rate scheduler, stepped once a round.
        weights: ``"examples"``, ``"uniform"``, or a callable ``ClientUpdate -> float``.

    Raises:
        MisconfigurationException: for ``mu < 0``, or an ``adaptive`` that is no bool.

    Example:
        >>> [type(callback).__name__ for callback in FedProx(mu=0.1).client_callbacks()]
        ['ProximalTerm']

    References:
        Li et al., *Federated Optimization in Heterogeneous Networks*, 2020, algorithm 2. There clients are drawn with
        probability proportional to their size and averaged uniformly; here the sampler draws and ``weights`` weighs.
    """

    def __init__(
        self,
        mu: float = 0.01,
        adaptive: bool = False,
        server_optimizer: OptimizerCallable | None = None,
        server_lr_scheduler: SchedulerCallable | None = None,
        weights: Weights = "examples",
    ) -> None:
        super().__init__(server_optimizer, server_lr_scheduler, weights)
        self.mu = non_negative("FedProx", "mu", mu, "mu=0 is FedAvg")
        self.adaptive = flag("FedProx", "adaptive", adaptive)

    def client_callbacks(self) -> list[Callback]:
        return [_BroadcastProximalTerm(), StartPass()] if self.adaptive else [ProximalTerm(self.mu)]

    def contribute(self, update: ClientUpdate, task: ClientTask, memory: Memory) -> tuple[Contribution, Memory | None]:
        contribution, memory_next = super().contribute(update, task, memory)
        if self.adaptive:
            loss = float(update.extra["start_loss"])
            # who was never asked before has nothing to compare with
            contribution.scalars["rise"] = contribution.scalars["weight"] * (loss - memory.get(_KEY, loss))
            memory_next = {_KEY: loss}
        return contribution, memory_next

    def init_state(self, model: Tree) -> State:
        return {"mu": self.mu, "falling": 0} if self.adaptive else {}

    def broadcast(self, state: State) -> Mapping[str, Tree]:
        return {"fedprox": {"mu": torch.tensor(state["mu"], dtype=torch.float64)}} if self.adaptive else {}

    def apply(self, total: Contribution, state: State, num_clients: int) -> tuple[Tree, State]:
        gradient, state = super().apply(total, state, num_clients)
        if self.adaptive:
            state = _followed(state, total.scalars["rise"])
        return gradient, state


class _BroadcastProximalTerm(ProximalTerm):
    """The proximal term whose strength the server sends."""

    def __init__(self) -> None:
        super().__init__(mu=0.0)

    def begin(self, task: ClientTask, memory: Memory) -> None:
        super().begin(task, memory)
        self.mu = float(task.broadcast["fedprox"]["mu"])


def _followed(state: State, rise: float) -> State:
    """Return the state after a round before which the loss rose by this much, or fell."""
    mu, falling = float(state["mu"]), int(state["falling"])
    if rise > 0:
        mu, falling = mu + _STEP, 0
    elif rise < 0:
        falling += 1
        if falling == _PATIENCE:
            mu, falling = max(0.0, mu - _STEP), 0
    return {"mu": mu, "falling": falling}
