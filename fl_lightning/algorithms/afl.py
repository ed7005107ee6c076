"""Agnostic federated learning: the model for the worst mixture of the clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch import Callback

from fl_lightning.algorithms.base import Algorithm, OptimizerCallable, SchedulerCallable, State
from fl_lightning.callbacks.checks import positive
from fl_lightning.callbacks.start_pass import StartPass
from fl_lightning.tree import scaled
from fl_lightning.types import ClientTask, ClientUpdate, Contribution, Memory, Tree

__all__ = ["AFL"]

_KEY = "afl"
_OTHERS = "others"
_LOSS = "loss of "


class AFL(Algorithm):
    r"""Agnostic federated learning, :math:`\min_w \max_{\lambda \in \Delta} \sum_k \lambda_k F_k(w)`.

    .. math:: w_{t+1} = w_t + \frac{\sum_k \lambda_k \delta_k}{\sum_k \lambda_k}, \qquad
        \lambda \leftarrow \Pi_\Delta\bigl(\lambda + \gamma\,(F_k(w_t))_k\bigr)

    The mixture :math:`\lambda` starts uniform and moves towards the clients that the model serves worst;
    :math:`\Pi_\Delta` is the projection onto the simplex. It is meant for a few clients (hospitals, languages) that
    take part in every round: the server keeps a number for each client, sends all of them, and learns every
    client's loss. Those that miss a round keep their share until they come back.

    Args:
        step_size: :math:`\gamma` > 0, in shares of the mixture per unit of loss.
        server_optimizer: parameters to the server's torch optimizer; ``None`` is ``SGD(lr=1)``.
        server_lr_scheduler: optimizer to a learning-rate scheduler, stepped once a round.

    Raises:
        MisconfigurationException: for ``step_size <= 0``.

    Example:
        >>> [round(share, 6) for share in simplex([0.5, 0.9, 0.1])]
        [0.3, 0.7, 0.0]

    References:
        Mohri et al., *Agnostic Federated Learning*, 2019, algorithm 1, with several local steps between two steps of
        the mixture and without the average over iterates.
    """

    def __init__(
        self,
        step_size: float = 0.1,
        server_optimizer: OptimizerCallable | None = None,
        server_lr_scheduler: SchedulerCallable | None = None,
    ) -> None:
        super().__init__(server_optimizer, server_lr_scheduler, weights="uniform")
        self.step_size = positive("AFL", "step_size", step_size)

    def client_callbacks(self) -> list[Callback]:
        return [StartPass()]

    def contribute(self, update: ClientUpdate, task: ClientTask, memory: Memory) -> tuple[Contribution, Memory | None]:
        shares, own = task.broadcast[_KEY], repr(update.client_id)
        share = float(shares.get(own, shares[_OTHERS]))
        scalars = {"weight": share, _LOSS + own: float(update.extra["start_loss"])}
        return Contribution({"delta": scaled(update.delta, share)}, scalars), None

    def init_state(self, model: Tree) -> State:
        # before the first round the size of the population is unknown, and any equal shares are uniform
        return {"shares": {}, _OTHERS: 1.0}

    def broadcast(self, state: State) -> Mapping[str, Tree]:
        shares = {**state["shares"], _OTHERS: state[_OTHERS]}
        return {_KEY: {name: torch.tensor(share, dtype=torch.float64) for name, share in shares.items()}}

    def apply(self, total: Contribution, state: State, num_clients: int) -> tuple[Tree, State]:
        losses = {n.removeprefix(_LOSS): value for n, value in total.scalars.items() if n.startswith(_LOSS)}
        present = sorted(losses)
        shares = {name: state["shares"].get(name, 1.0 / num_clients) for name in present}
        # the cohort redistributes what it holds; the shares of absent clients stay as they are
        held = sum(shares.values())
        moved = simplex([shares[name] + self.step_size * losses[name] for name in present], held)
        if total.scalars["weight"] > 0:
            gradient, _ = super().apply(total, state, num_clients)
        else:  # only clients that the mixture gives nothing took part
            gradient = scaled(total.trees["delta"], 0.0)
        others = {**state["shares"], **dict(zip(present, moved, strict=True))}
        return gradient, {"shares": others, _OTHERS: 1.0 / num_clients}


def simplex(values: Sequence[float], total: float = 1.0) -> list[float]:
    """Return the point nearest to ``values`` whose entries are >= 0 and add up to ``total``.

    Args:
        values: any numbers, at least one.
        total: sum of the result, >= 0.

    References:
        Duchi et al., *Efficient Projections onto the l1-Ball for Learning in High Dimensions*, 2008, figure 1.
    """
    shift, above = 0.0, 0.0
    for count, value in enumerate(sorted(values, reverse=True), start=1):
        above += value
        if value - (above - total) / count > 0:
            shift = (above - total) / count
    return [max(0.0, value - shift) for value in values]
